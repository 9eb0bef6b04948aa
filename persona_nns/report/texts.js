// What was said: the texts of a cell or another unit beside each other, with their numbers.

// Dimensions whose labels follow each other, and stand below each other.
const LISTED = ["turn", "sample", "token", "place"];
const FEW_CHARACTERS = 15;
const MOST_NUMBERS = 6;
const MOST_LISTED = 200;

let telling = 0; // the number of the last text pane that was begun

async function showTexts() {
  const mine = ++telling;
  const main = mainTexts();
  const isOnGrid = body.prompts !== null;
  $("texts-part").hidden = !main && !isOnGrid;
  if ($("texts-part").hidden) return;
  const pane = { main, dims: main ? main.dims.slice() : ["cell"], at: {} };
  if (!main && !body.dims.cell) pane.dims = ["persona", "task"].filter((dim) => body.dims[dim]);
  const choices = textChoices(pane);
  const parts = await Promise.all([promptOfPane(pane), main ? sayings(pane) : null]);
  if (mine !== telling) return;
  const focused = document.activeElement?.id;
  $("text-choices").replaceChildren(...choices);
  $("texts").replaceChildren(...parts.filter((part) => part));
  if (focused) $(focused)?.focus();
}

// The variable whose texts are longest; others of the same dimensions stand beside them.
function mainTexts() {
  const some = body.texts.filter((of) => of.measured);
  const named = some.find((of) => of.name === view.say);
  const order = (of) =>
    (of.length >= FEW_CHARACTERS ? 1000 * of.dims.length : 0) + Math.min(of.length, 900);
  return named ?? some.toSorted((a, b) => order(b) - order(a))[0] ?? null;
}

// Numbers and short texts that belong to the texts of a variable.
function besideTexts(variable, furthest = 2) {
  const near = [...body.numbers, ...body.texts.filter((of) => of.length < FEW_CHARACTERS)];
  const most = variable.dims.length + furthest;
  const found = near.filter(
    (of) =>
      of.measured &&
      of.blobs !== null &&
      of.dims.length <= most &&
      variable.dims.every((dim) => of.dims.includes(dim)),
  );
  return found.sort((a, b) => a.dims.length - b.dims.length).slice(0, MOST_NUMBERS);
}

// The dimensions that such numbers have beside those of the texts.
function furtherDims(variable) {
  const dims = besideTexts(variable).flatMap((of) => of.dims);
  return [...new Set(dims)].filter(
    (dim) => !variable.dims.includes(dim) && body.dims[dim].length > 1,
  );
}

const labelAt = (pane, dim) => (dim in pane.at ? body.dims[dim][pane.at[dim]] : undefined);

async function promptOfPane(pane) {
  if (body.prompts === null) return null;
  if ("cell" in pane.at)
    return promptPart(body.along.persona[pane.at.cell], body.along.task[pane.at.cell]);
  const [persona, task] = [labelAt(pane, "persona"), labelAt(pane, "task")];
  return persona !== undefined && task !== undefined ? promptPart(persona, task) : null;
}

async function sayings(pane) {
  const { main } = pane;
  const listed = main.dims.filter(isListed);
  const combine = (dims) =>
    dims.length === 0
      ? [{}]
      : body.dims[dims[0]].flatMap((_, k) =>
          combine(dims.slice(1)).map((rest) => ({ [dims[0]]: k, ...rest })),
        );
  const every = combine(listed);
  const rows = every.slice(0, MOST_LISTED);
  const part = element(
    "section",
    { class: "said" },
    element("h3", {}, main.length < FEW_CHARACTERS ? words(main.long_name) : "What was said"),
  );
  if (every.length > rows.length) {
    const text = `The first ${rows.length} of ${every.length}.`;
    part.append(element("p", { class: "note" }, text));
  }
  if (main.length < FEW_CHARACTERS) {
    part.append(await shortTexts(pane, rows));
    return part;
  }
  let isEmpty = true;
  for (const row of rows) {
    const cards = await cardsOf(pane, row, listed.length ? "h5" : "h4");
    if (!cards.length) continue;
    isEmpty = false;
    const title = listed.map((dim) => `${words(dim)} ${body.dims[dim][row[dim]]}`).join(" · ");
    if (title) part.append(element("h4", {}, title));
    part.append(element("div", { class: `cards${cards.length === 1 ? " alone" : ""}` }, ...cards));
  }
  if (isEmpty)
    part.append(
      element(
        "p",
        { class: "note" },
        `Nothing was said here, or this ${index.runs[view.run].noun} is not complete.`,
      ),
    );
  return part;
}

const whole = (pane, variable, at) => variable.dims.map((dim) => at[dim] ?? pane.at[dim] ?? 0);

// Cards of one row; what several say in the same words, with the same numbers, stands once.
async function cardsOf(pane, row, level) {
  const columns = pane.columns ?? columnsOf(pane);
  const texts = await Promise.all(
    columns.map((c) => valueAt(body, c.variable, whole(pane, c.variable, { ...row, ...c.at }))),
  );
  const against = pane.against ? texts[columns.indexOf(pane.against)] : null;
  const markers =
    body.markers[labelAt(pane, "persona") ?? body.along.persona?.[pane.at.cell]] ?? [];
  const facts = await Promise.all(
    columns.map((c, k) => (texts[k] ? numbersOf(pane, { ...row, ...c.at }, c.variable) : [])),
  );
  const same = new Map();
  columns.forEach((column, k) => {
    if (!texts[k]) return;
    const key = JSON.stringify([
      texts[k],
      facts[k],
      column.variable === pane.main ? "" : column.name,
    ]);
    same.set(key, [...(same.get(key) ?? []), k]);
  });
  return [...same.values()].map((numbers) => {
    const text = texts[numbers[0]];
    const isOwn = numbers.some((k) => columns[k] === pane.against);
    const found = markerSpans(text, markers);
    const differs = against && !isOwn ? newWords(text, against) : { spans: [], of: 0 };
    const told = [...facts[numbers[0]]];
    const speaker = told.find((fact) => fact.speaker)?.speaker;
    if (found.length)
      told.push(
        `markers: ${[...new Set(found.map(([a, b]) => text.slice(a, b).toLowerCase()))].join(", ")}`,
      );
    if (differs.of)
      told.push(
        `${differs.spans.length} of ${differs.of} words differ from ${short(pane.against.name)}`,
      );
    const names = numbers.map((k) => columns[k].name);
    const shown = element(
      "p",
      { class: "text", dir: "auto" },
      ...marked(text, found, differs.spans),
    );
    const title = speaker
      ? speaker
      : names.length > 4
        ? `${names.slice(0, 3).join(", ")} and ${names.length - 3} more`
        : names.join(", ");
    const heading = element(level, { title: names.join(", ") }, title);
    return element(
      "article",
      { class: `card${isOwn ? " base" : ""}${speaker === "assistant" ? " answer" : ""}` },
      heading,
      shown,
      element(
        "ul",
        { class: "facts" },
        ...told.filter((fact) => !fact.speaker).map((fact) => element("li", {}, fact)),
      ),
    );
  });
}

// Numbers that belong to a text: of its dimensions, and at chosen labels of further ones.
async function numbersOf(pane, row, variable) {
  const facts = await Promise.all(
    besideTexts(variable, variable === pane.main ? 2 : 0).map(async (of) => {
      const extra = of.dims.filter((dim) => !variable.dims.includes(dim));
      const labels = extra.map((dim) => view.text[dim] ?? view.at[dim] ?? usualLabel(dim));
      const at = { ...row };
      extra.forEach((dim, k) => (at[dim] = Math.max(body.dims[dim].indexOf(labels[k]), 0)));
      const value = await valueAt(body, of, whole(pane, of, at));
      if (value === undefined || value === "" || Number.isNaN(value)) return null;
      if (of.name === "speaker") return { speaker: value };
      const where = extra.length
        ? ` (${extra.map((dim, k) => `${words(dim)} ${labels[k]}`).join(", ")})`
        : "";
      if (of.kind === "text") return `${words(of.name)}: ${value}`;
      const number = of.kind === "bool" ? (value ? "yes" : "no") : brief(value);
      const hasUnits = !["1", "token"].includes(of.units) && of.kind !== "bool";
      return `${words(of.name)}${where}: ${number}${hasUnits ? ` ${of.units}` : ""}`;
    }),
  );
  return facts.filter((fact) => fact !== null);
}

// Texts of a word or two, such as tokens, as a table with their numbers.
async function shortTexts(pane, rows) {
  const { main } = pane;
  const compared = main.dims.filter(isCompared);
  const beside = [...body.texts, ...body.numbers].filter(
    (of) =>
      of !== main && of.blobs !== null && of.measured && String(of.dims) === String(main.dims),
  );
  const columns = [main, ...beside.slice(0, MOST_NUMBERS)];
  const combine = (dims) =>
    dims.length === 0
      ? [{}]
      : body.dims[dims[0]].flatMap((_, k) =>
          combine(dims.slice(1)).map((rest) => ({ [dims[0]]: k, ...rest })),
        );
  const dims = [...compared, ...main.dims.filter(isListed)];
  const lines = [];
  for (const at of combine(compared).flatMap((c) => rows.map((row) => ({ ...c, ...row })))) {
    const values = await Promise.all(columns.map((of) => valueAt(body, of, whole(pane, of, at))));
    if (!values[0]) continue;
    lines.push(
      element(
        "tr",
        {},
        ...dims.map((dim) => element("th", { scope: "row" }, String(body.dims[dim][at[dim]]))),
        ...values.map((value) =>
          element("td", {}, typeof value === "string" ? value : brief(value)),
        ),
      ),
    );
  }
  if (!lines.length) return element("p", { class: "note" }, "Nothing was measured here.");
  const head = element(
    "tr",
    {},
    ...[...dims.map(words), ...columns.map((of) => words(of.name))].map((name) =>
      element("th", { scope: "col" }, name),
    ),
  );
  return element(
    "div",
    { class: "scroll", tabindex: "0", role: "region", "aria-label": "Table of texts" },
    element(
      "table",
      { class: "numbers" },
      element("thead", {}, head),
      element("tbody", {}, ...lines),
    ),
  );
}
