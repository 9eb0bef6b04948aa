// What is drawn of a variable before anybody chooses: which dimension goes where, at which labels.

// Dimensions along which things change, those that are asked about first.
const ALONG =
  "turn budget alpha step layer attention_layer layer_set layer_band depth_band degree position component head kv_head token place tau tau_value".split(
    " ",
  );
// Dimensions whose labels are put beside each other.
const BESIDE =
  "condition graft blocked source control ranking component method split head kv_head site position unit direction bound statistic layer".split(
    " ",
  );
// Dimensions of samples: they are summarised over, like units.
const SAMPLED = "question pair sample row answer neutral conversation prompt".split(" ");
const MANY_LINES = 6;
const MANY_NAMES = 24;
const MANY_PANELS = 6;
const MANY_CELLS = 150;

// The dimensions of a figure of a variable; those of the cells of a grid are persona and task too.
function dimsOf(variable) {
  return variable.dims.flatMap((dim) => {
    const along = dim === "cell" ? ["persona", "task"].filter((name) => isAlong(body, name)) : [];
    const isShort = body.dims[dim].length <= MANY_CELLS;
    return along.length ? [...along, ...(isShort ? [dim] : [])] : [dim];
  });
}

const isUnit = (dim) => body.units.includes(axisOf(body, dim)) || SAMPLED.includes(dim);
const isNumbered = (dim) => labelsOf(body, dim).every((label) => typeof label === "number");
const manyOf = (dim) => labelsOf(body, dim).length;

function chooseVariable(name) {
  view.v = name;
  const variable = variableNamed(name);
  const dims = dimsOf(variable).filter((dim) => manyOf(dim) > 1 && dim !== "cell");
  const own = dims.filter((dim) => !isUnit(dim));
  const units = dims.filter(isUnit);
  const twins = pairOfTwins(dims);
  const pick = (order, from) => order.find((dim) => from.includes(dim));
  let [x, y, f] = ["", "", ""];
  if (twins && !variable.dims.includes("component") && variable.dims.length < 4) {
    [y, x] = twins;
  } else {
    const all = [...own, ...units];
    x = pick(ALONG, all) ?? own.find(isNumbered) ?? own[0] ?? units[0] ?? dimsOf(variable)[0] ?? "";
    const left = own.filter((dim) => dim !== x);
    y = pick(BESIDE, left) ?? left[0] ?? "";
    if (!y && (!own.length || (x && isUnit(x)))) y = units.find((dim) => dim !== x) ?? "";
  }
  const rest = own.filter((dim) => dim !== x && dim !== y && !ALONG.includes(dim));
  f = rest.find((dim) => manyOf(dim) <= MANY_PANELS) ?? "";
  const kept = view.at;
  Object.assign(view, { x, y, f, at: {}, kind: "auto" });
  for (const dim of dimsOf(variable)) {
    if ([x, y, f].includes(dim) || dim === "cell") continue;
    const labels = labelsOf(body, dim);
    if (dim in kept && labels.includes(kept[dim])) view.at[dim] = kept[dim];
    else if (!isUnit(dim) || (dim === "trait" && labels.length > 1)) view.at[dim] = usualLabel(dim);
  }
}

// Two dimensions with the same labels, such as role and other_role.
function pairOfTwins(dims) {
  for (const one of dims) {
    for (const other of dims) {
      if (one >= other || isNumbered(one)) continue;
      if (String(labelsOf(body, one)) === String(labelsOf(body, other))) {
        return one.length < other.length ? [one, other] : [other, one];
      }
    }
  }
  return null;
}

// The label that stands for a dimension: all layers, the middle one, the median, or the first.
function usualLabel(dim) {
  const labels = labelsOf(body, dim);
  for (const usual of ["all", "median", "response_avg"]) if (labels.includes(usual)) return usual;
  const isDepth = dim.includes("layer") && isNumbered(dim);
  if (dim === "alpha") return labels[labels.length - 1];
  return labels[isDepth ? Math.floor(labels.length / 2) : 0];
}

function fittingKind() {
  if (!view.y) return "curves";
  const named = !isNumbered(view.x);
  if ((isUnit(view.x) && isUnit(view.y)) || pairOfTwins([view.x, view.y])) return "heatmap";
  if (view.y.includes("head") || (view.y === "layer" && view.x !== "alpha")) return "heatmap";
  return manyOf(view.y) > MANY_LINES || (named && manyOf(view.x) > MANY_NAMES)
    ? "heatmap"
    : "curves";
}

// See that every dimension is either drawn, or at one label, or summarised over.
function settle() {
  const variable = current();
  if (variable) {
    const dims = dimsOf(variable);
    for (const role of ["x", "y", "f"]) if (!dims.includes(view[role])) view[role] = "";
    if (!view.x) view.x = dims.find((dim) => ![view.y, view.f].includes(dim)) ?? "";
    for (const dim of Object.keys(view.at)) {
      const isDrawn = [view.x, view.y, view.f].includes(dim);
      if (isDrawn || !dims.includes(dim)) delete view.at[dim];
    }
  }
  writeAddress();
}
