// What is selected: kept in the address, so that a view can be linked, and chosen by lists.

const view = {
  run: 0,
  v: "",
  kind: "auto",
  x: "",
  y: "",
  f: "",
  say: "",
  against: "",
  at: {},
  text: {},
};
let body = null; // of the run that is shown

const $ = (id) => document.getElementById(id);

// An element with attributes and children; what a store holds only ever becomes text.
function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined) made.setAttribute(key, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

const words = (name) => name.replaceAll("_", " ");
const said = (of) => (of.units === "1" ? of.long_name : `${of.long_name} in ${of.units}`);
const variableNamed = (name) => body.numbers.find((of) => of.name === name);
const current = () => variableNamed(view.v);

function writeAddress() {
  const known = new URLSearchParams();
  const run = index.runs[view.run];
  known.set("run", `${run.experiment}/${run.run}`);
  for (const name of ["v", "kind", "x", "y", "f", "say", "against"])
    if (view[name]) known.set(name, view[name]);
  for (const [dim, label] of Object.entries(view.at)) known.set(`at.${dim}`, label);
  for (const [dim, label] of Object.entries(view.text)) known.set(`text.${dim}`, label);
  if (location.hash.slice(1) !== known.toString()) {
    history.replaceState(null, "", `#${known}`);
  }
}

// Read the address; what it does not say, or says wrongly, is chosen by `choices`.
async function readAddress() {
  const known = new URLSearchParams(location.hash.slice(1));
  const named = index.runs.findIndex((run) => `${run.experiment}/${run.run}` === known.get("run"));
  Object.assign(view, { v: "", at: {} });
  await openRun(Math.max(named, 0));
  if (variableNamed(known.get("v"))) chooseVariable(known.get("v"));
  const dims = current() ? dimsOf(current()) : [];
  for (const name of ["x", "y", "f"]) {
    const dim = known.get(name);
    if (known.has("x")) view[name] = dims.includes(dim) ? dim : "";
  }
  if (["auto", "heatmap", "curves"].includes(known.get("kind"))) view.kind = known.get("kind");
  if (known.has("x")) view.at = {};
  for (const name of ["say", "against"]) view[name] = known.get(name) ?? "";
  for (const [key, value] of known) {
    const [where, ...rest] = key.split(".");
    const dim = rest.join(".");
    if (!["at", "text"].includes(where) || !(body.dims[dim] || body.along[dim])) continue;
    const label = labelsOf(body, dim).find((each) => String(each) === value);
    if (label !== undefined) view[where][dim] = label;
  }
  settle();
}

async function openRun(number) {
  forgetPieces();
  const isSame = index.runs[number].experiment === index.runs[view.run].experiment;
  view.run = number;
  body = await jsonPiece(index.runs[number].body);
  view.text = {};
  if (!isSame) view.at = {};
  const kept =
    (isSame && variableNamed(view.v)) ||
    (body.numbers.find((of) => of.measured) ?? body.numbers[0]);
  view.v = "";
  if (kept) chooseVariable(kept.name);
}

// Change what is selected, and show it.
async function change(changes) {
  Object.assign(view, changes);
  settle();
  await show();
}

// A list with a label. `options` are [value, text] pairs; values are given back as they are.
function choice(id, label, options, chosen, onChange) {
  const select = element("select", { id: `choose-${id}` });
  options.forEach(([value, text], k) => {
    const option = element("option", { value: String(k) }, text);
    option.selected = value === chosen;
    select.append(option);
  });
  select.disabled = options.length < 2;
  select.addEventListener("change", () => onChange(options[Number(select.value)][0]));
  return element("div", { class: "choice" }, element("label", { for: select.id }, label), select);
}

function group(title, ...choices) {
  return element("fieldset", {}, element("legend", {}, title), ...choices);
}

function showChoices() {
  const focused = document.activeElement?.id;
  const parts = [group("Results", ...runChoices())];
  if (current()) {
    parts.push(group("Figure", ...figureChoices()));
    const only = onlyChoices();
    if (only.length) parts.push(group("Of these", ...only));
  }
  $("choices").replaceChildren(...parts);
  if (focused?.startsWith("choose-")) $(focused)?.focus();
}

function runChoices() {
  const runs = index.runs.map((run, number) => ({ ...run, number }));
  const here = runs[view.run];
  const go = async (number) => {
    await openRun(number);
    settle();
    await show();
  };
  const best = (found) => found.find((run) => run.completed) ?? found[0];
  const experiments = [...new Set(runs.map((run) => run.experiment))];
  const ofExperiment = runs.filter((run) => run.experiment === here.experiment);
  const models = [...new Set(ofExperiment.map((run) => run.model))];
  const ofModel = ofExperiment.filter((run) => run.model === here.model);
  const choices = [
    choice(
      "experiment",
      "Experiment",
      experiments.map((name) => [name, name]),
      here.experiment,
      (name) => {
        const found = runs.filter((run) => run.experiment === name);
        return go(best([...found.filter((run) => run.model === here.model), ...found]).number);
      },
    ),
    choice(
      "model",
      "Model",
      models.map((name) => [name, name]),
      here.model,
      (name) => go(best(ofExperiment.filter((run) => run.model === name)).number),
    ),
  ];
  if (ofModel.length > 1) {
    const named = ofModel.map((run) => [run.number, runTitle(run)]);
    choices.push(choice("run", "Run", named, view.run, go));
  }
  if (body.numbers.length) {
    const listed = body.numbers.map((of) => [
      of.name,
      `${of.name}${of.measured ? "" : " (empty)"}`,
    ]);
    choices.push(
      choice("variable", "Variable", listed, view.v, (name) => {
        chooseVariable(name);
        return change({});
      }),
    );
  }
  return choices;
}

function runTitle(run) {
  const begun = run.created.slice(0, 16).replace("T", " ");
  return `${run.called ? `${run.called}: ` : ""}${run.grid}, ${begun}, ${run.completed}/${run.of}`;
}

function figureChoices() {
  const dims = dimsOf(current()).map((dim) => [dim, words(dim)]);
  const none = [["", "none"]];
  const put = (role) => (dim) => {
    const changes = { [role]: dim };
    // Two roles that would have the same dimension change places.
    for (const other of ["x", "y", "f"]) {
      if (dim && other !== role && view[other] === dim) changes[other] = view[role];
    }
    return change({ ...changes, kind: view.kind });
  };
  return [
    choice(
      "kind",
      "Draw",
      [
        ["auto", `as fits (${fittingKind()})`],
        ["heatmap", "heatmap"],
        ["curves", "curves"],
      ],
      view.kind,
      (kind) => change({ kind }),
    ),
    choice("x", "Along x", dims, view.x, put("x")),
    choice("y", "Rows or lines", [...none, ...dims], view.y, put("y")),
    choice("f", "Panels", [...none, ...dims], view.f, put("f")),
  ];
}

function onlyChoices() {
  const over = current().kind === "bool" ? "share of all" : "median over all";
  return dimsOf(current())
    .filter((dim) => ![view.x, view.y, view.f].includes(dim) && dim !== "cell")
    .map((dim) => {
      const labels = labelsOf(body, dim);
      const every = labels.length > 1 ? [[null, `${over} ${labels.length}`]] : [];
      const options = [...every, ...labels.map((label) => [label, String(label)])];
      return choice(`at-${dim}`, words(dim), options, view.at[dim] ?? null, (label) => {
        const at = { ...view.at };
        delete at[dim];
        if (label !== null) at[dim] = label;
        const text = { ...view.text };
        if (label !== null) text[dim] = label;
        return change({ at, text });
      });
    });
}
