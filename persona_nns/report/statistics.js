// Medians and quartiles, shares and their intervals, of what a selection leaves.

// The labels of a dimension. Of the cells of a grid also `persona` and `task`, which share its axis.
function labelsOf(body, dim) {
  if (body.dims[dim]) return body.dims[dim];
  return [...new Set(body.along[dim])];
}

const isAlong = (body, dim) => !body.dims[dim] && body.along[dim] !== undefined;

// The dimension of the array that a dimension of a figure lies on.
const axisOf = (body, dim) => (isAlong(body, dim) ? "cell" : dim);

// For each label of a dimension of the array: its part in the number of a group, or −1.
function placesOn(body, variable, roles, at) {
  const sizes = roles.map((dim) => (dim ? labelsOf(body, dim).length : 1));
  const strides = sizes.map((_, k) => sizes.slice(k + 1).reduce((a, b) => a * b, 1));
  const places = variable.dims.map((axis) => {
    const place = new Int32Array(body.dims[axis].length);
    for (const label of variable.absent?.[axis] ?? []) place[body.dims[axis].indexOf(label)] = -1;
    const mark = (dim, change) => {
      const labels = labelsOf(body, dim);
      const number = new Map(labels.map((label, k) => [label, k]));
      const own = isAlong(body, dim) ? body.along[dim] : labels;
      own.forEach((label, i) => {
        if (place[i] >= 0) place[i] = change(place[i], number.get(label), label);
      });
    };
    for (const [dim, label] of Object.entries(at)) {
      if (axisOf(body, dim) === axis) mark(dim, (sum, _, own) => (own === label ? sum : -1));
    }
    roles.forEach((dim, k) => {
      if (dim && axisOf(body, dim) === axis) mark(dim, (sum, number) => sum + number * strides[k]);
    });
    return place;
  });
  return { places, nGroups: sizes.reduce((a, b) => a * b, 1), sizes };
}

// Numbers of a selection by group: [facet][y][x] in one row, each with what was measured in it.
// `roles` are the dimensions [facet, y, x], `at` the labels that are chosen of others.
async function summarise(body, variable, roles, at) {
  const { places, nGroups, sizes } = placesOn(body, variable, roles, at);
  const ready = await fromSummary(body, variable, roles, at, nGroups);
  if (ready) return { ...ready, sizes };
  if (variable.blobs === null) return null;
  const values = Array.from({ length: nGroups }, () => []);
  const asked = new Float64Array(nGroups);
  const cut = variable.blobs === undefined ? -1 : variable.dims.indexOf(variable.along);
  const isWanted = (i) => cut < 0 || places[cut][i] >= 0;
  for (const part of await partsOf(body, variable, isWanted)) collect(part, places, values, asked);
  const groups = values.map((of) => (variable.kind === "bool" ? shareOf(of) : quartilesOf(of)));
  return { groups, asked, sizes };
}

function collect(part, places, values, asked) {
  const last = part.shape.length - 1;
  const walk = (d, offset, group) => {
    const place = places[d];
    const start = d === part.axis ? part.start : 0;
    for (let i = 0; i < part.shape[d]; i++) {
      const own = place[i + start];
      if (own < 0) continue;
      if (d < last) {
        walk(d + 1, (offset + i) * part.shape[d + 1], group + own);
        continue;
      }
      const value = part.values[offset + i];
      asked[group + own] += 1;
      if (Number.isFinite(value)) values[group + own].push(value);
    }
  };
  if (last < 0) {
    asked[0] = 1;
    if (Number.isFinite(part.values[0])) values[0].push(part.values[0]);
    return;
  }
  walk(0, 0, 0);
}

// What was summarised when the page was made, where that is what is asked for: over all units, or
// over those of a persona or of a task, and over nothing else.
async function fromSummary(body, variable, roles, at, nGroups) {
  if (!variable.summaries) return null;
  const onUnits = [...roles.filter(Boolean), ...Object.keys(at)].filter(
    (dim) => axisOf(body, dim) === variable.along,
  );
  const others = variable.dims.filter((dim) => dim !== variable.along);
  if (onUnits.length > 1 || (onUnits[0] && !(onUnits[0] in variable.summaries))) return null;
  if (!others.every((dim) => roles.includes(dim) || dim in at)) return null;
  const by = onUnits[0] ?? "";
  const groupLabels = by ? labelsOf(body, by) : [""];
  const sizes = [groupLabels.length, ...others.map((dim) => body.dims[dim].length)];
  const n = sizes.reduce((a, b) => a * b, 1);
  const read = await numberPiece(variable.summaries[by], "float64");
  const dims = [by, ...others];
  const strides = sizes.map((_, k) => sizes.slice(k + 1).reduce((a, b) => a * b, 1));
  const roleSizes = roles.map((dim) => (dim ? labelsOf(body, dim).length : 1));
  const many = groupLabels.map((label) =>
    by ? body.along[by].filter((own) => own === label).length : body.dims[variable.along].length,
  );
  const groups = [];
  const asked = new Float64Array(nGroups);
  for (let g = 0; g < nGroups; g++) {
    let rest = g;
    const index = {};
    for (let k = roles.length - 1; k >= 0; k--) {
      if (roles[k]) index[roles[k]] = rest % roleSizes[k];
      rest = Math.floor(rest / roleSizes[k]);
    }
    let place = 0;
    let isThere = true;
    dims.forEach((dim, k) => {
      if (!dim) return;
      const chosen = dim in at ? labelsOf(body, dim).indexOf(at[dim]) : index[dim];
      if (dim in at && dim in index && index[dim] !== chosen) isThere = false;
      place += chosen * strides[k];
    });
    const counted = read[3 * n + place];
    if (
      dims.some(
        (dim) =>
          dim &&
          variable.absent?.[dim]?.includes(dim in at ? at[dim] : labelsOf(body, dim)[index[dim]]),
      )
    )
      isThere = false;
    asked[g] = isThere ? many[by ? Math.floor(place / strides[0]) : 0] : 0;
    if (!isThere || !counted) groups.push(nothing);
    else if (variable.kind === "bool") groups.push(wilson(read[place], counted));
    else
      groups.push({
        middle: read[place],
        low: read[n + place],
        high: read[2 * n + place],
        n: counted,
      });
  }
  return { groups, asked };
}

const nothing = { middle: NaN, low: NaN, high: NaN, n: 0 };

function quantile(sorted, share) {
  const place = share * (sorted.length - 1);
  const low = Math.floor(place);
  const high = Math.min(low + 1, sorted.length - 1);
  return sorted[low] + (place - low) * (sorted[high] - sorted[low]);
}

function quartilesOf(values) {
  if (!values.length) return nothing;
  const sorted = Float64Array.from(values).sort();
  const [middle, low, high] = [0.5, 0.25, 0.75].map((share) => quantile(sorted, share));
  return { middle, low, high, n: sorted.length };
}

function shareOf(values) {
  if (!values.length) return nothing;
  return wilson(values.reduce((a, b) => a + b, 0) / values.length, values.length);
}

// A share with its 95 % Wilson interval.
function wilson(share, n) {
  const z = 1.959963984540054;
  const scale = 1 + (z * z) / n;
  const centre = (share + (z * z) / (2 * n)) / scale;
  const half = (z / scale) * Math.sqrt((share * (1 - share)) / n + (z * z) / (4 * n * n));
  return { middle: share, low: centre - half, high: centre + half, n };
}

function brief(value) {
  if (!Number.isFinite(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e7) return String(value);
  if (size >= 1e5 || size < 1e-3) return value.toExponential(2).replace("-", "−");
  return String(Number(value.toPrecision(4))).replace("-", "−");
}
