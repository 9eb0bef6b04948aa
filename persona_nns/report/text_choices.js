// Lists that choose which texts are shown, and from which of them differences are marked.

const isNumberedAxis = (dim) => body.dims[dim].every((label) => typeof label === "number");
const isListed = (dim) => LISTED.includes(dim);
const isCompared = (dim) => !body.units.includes(dim) && !isListed(dim) && !isNumberedAxis(dim);

// Lists for the dimensions that are at one label; sets `pane.at` to index numbers.
function textChoices(pane) {
  const choices = [];
  const long = body.texts.filter((of) => of.measured && of.length >= FEW_CHARACTERS);
  if (long.length > 1 && new Set(long.map((of) => String(of.dims))).size > 1) {
    const options = long.map((of) => [of.name, of.name]);
    choices.push(choice("say", "Text", options, pane.main.name, (say) => change({ say })));
  }
  for (const dim of pane.dims) {
    if (dim === "cell" && isAlong(body, "persona")) choices.push(...cellChoices(pane));
    else if (!isListed(dim) && !(pane.main && isCompared(dim)))
      choices.push(labelChoice(pane, dim));
  }
  if (pane.main && pane.main.length >= FEW_CHARACTERS) {
    for (const dim of furtherDims(pane.main)) choices.push(labelChoice(pane, dim, "numbers at "));
    choices.push(...againstChoice(pane));
  }
  return choices;
}

function labelChoice(pane, dim, said = "") {
  const labels = body.dims[dim];
  const wanted =
    view.text[dim] ?? view.at[dim] ?? (body.units.includes(dim) ? labels[0] : usualLabel(dim));
  pane.at[dim] = Math.max(labels.indexOf(wanted), 0);
  const options = labels.map((label) => [label, String(label)]);
  return choice(`text-${dim}`, said + words(dim), options, labels[pane.at[dim]], (label) =>
    change({ text: { ...view.text, [dim]: label } }),
  );
}

function cellChoices(pane) {
  const { persona, task } = body.along;
  const wanted = ["persona", "task"].map((dim) => view.text[dim] ?? view.at[dim]);
  const named = view.text.cell !== undefined ? body.dims.cell.indexOf(view.text.cell) : -1;
  const missing = new Set(body.missing);
  const fits = (i) =>
    (wanted[0] === undefined || persona[i] === wanted[0]) &&
    (wanted[1] === undefined || task[i] === wanted[1]);
  // Of those that fit, one that was measured.
  let found = named >= 0 ? named : persona.findIndex((_, i) => fits(i) && !missing.has(i));
  if (found < 0) found = persona.findIndex((_, i) => fits(i));
  if (found < 0) found = persona.findIndex((label) => label === wanted[0]);
  pane.at.cell = Math.max(found, 0);
  const go = (to) =>
    change({ text: { ...view.text, cell: undefined, persona: persona[to], task: task[to] } });
  const of = (dim, other) =>
    choice(
      `text-${dim}`,
      dim,
      labelsOf(body, dim).map((label) => [label, label]),
      body.along[dim][pane.at.cell],
      (label) => {
        const kept = body.along[other][pane.at.cell];
        const to = body.dims.cell.findIndex(
          (_, i) => body.along[dim][i] === label && body.along[other][i] === kept,
        );
        return go(to >= 0 ? to : body.along[dim].indexOf(label));
      },
    );
  const step = (by, id, text) =>
    element(
      "button",
      {
        type: "button",
        id,
        onclick: () => go((pane.at.cell + by + persona.length) % persona.length),
      },
      text,
    );
  const steps = element(
    "div",
    { class: "choice steps" },
    step(-1, "cell-before", "← previous cell"),
    step(1, "cell-after", "next cell →"),
  );
  return [of("persona", "task"), of("task", "persona"), steps];
}

// The texts that stand beside each other: of each compared label, and of variables like clean_text.
function columnsOf(pane) {
  const { main } = pane;
  const compared = main.dims.filter(isCompared);
  const combine = (dims) =>
    dims.length === 0
      ? [{}]
      : combine(dims.slice(1)).flatMap((rest) =>
          body.dims[dims[0]].map((_, k) => ({ [dims[0]]: k, ...rest })),
        );
  const name = (at) =>
    Object.entries(at)
      .map(([dim, k]) => (compared.length > 1 ? `${words(dim)} ` : "") + body.dims[dim][k])
      .join(" · ");
  const beside = body.texts.filter(
    (of) =>
      of !== main &&
      of.measured &&
      of.length >= FEW_CHARACTERS &&
      of.dims.every((dim) => main.dims.includes(dim)),
  );
  const others = beside.map((of) => ({
    name: of.long_name,
    variable: of,
    at: {},
    isClean: of.name.includes("clean"),
  }));
  const own = combine(compared.toReversed()).map((at) => ({
    name: name(at) || main.long_name,
    variable: main,
    at,
    isClean: name(at) === "clean",
  }));
  return [...others.filter((c) => c.isClean), ...own, ...others.filter((c) => !c.isClean)];
}

function againstChoice(pane) {
  pane.columns = columnsOf(pane);
  if (pane.columns.length < 2) return [];
  const usual =
    pane.columns.find((c) => c.isClean) ??
    pane.columns.find((c) => c.name.endsWith("none")) ??
    null;
  pane.against =
    view.against === "nothing"
      ? null
      : (pane.columns.find((c) => c.name === view.against) ?? usual);
  const options = [["nothing", "nothing"], ...pane.columns.map((c) => [c.name, c.name])];
  return [
    choice(
      "against",
      "Differences are marked from",
      options,
      pane.against?.name ?? "nothing",
      (against) => change({ against }),
    ),
  ];
}
