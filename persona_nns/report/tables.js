// The figure as a table, for whoever would rather read or copy numbers.

const MOST_ROWS = 3000;

function showTable(data) {
  const details = $("table-part");
  details.hidden = !data;
  if (!data) return;
  const fill = () => {
    if (details.open) $("table").replaceChildren(...tableOf(data));
  };
  details.ontoggle = fill;
  $("table").replaceChildren();
  fill();
}

function tableOf(data) {
  const bool = data.variable.kind === "bool";
  const dims = [view.f, view.y, view.x].filter(Boolean);
  const heads = [
    ...dims.map(words),
    middleName(data.variable),
    bool ? "95 % from" : "lower quartile",
    bool ? "to" : "upper quartile",
    "measured",
    "of",
  ];
  const rows = [];
  data.facets.forEach((facet, f) =>
    data.rows.forEach((row, y) =>
      data.columns.forEach((column, x) => {
        if (rows.length >= MOST_ROWS) return;
        const group = data.at(f, y, x);
        const labels = [
          [view.f, facet],
          [view.y, row],
          [view.x, column],
        ].filter(([dim]) => dim);
        const numbers = [
          brief(group.middle),
          brief(group.low),
          brief(group.high),
          group.n,
          data.many(f, y, x),
        ];
        rows.push(
          element(
            "tr",
            {},
            ...labels.map(([, label]) => element("th", { scope: "row" }, String(label))),
            ...numbers.map((number) => element("td", {}, String(number))),
          ),
        );
      }),
    ),
  );
  const all = data.facets.length * data.rows.length * data.columns.length;
  const note =
    all > rows.length
      ? [
          element(
            "p",
            { class: "note" },
            `The first ${rows.length} of ${all} rows; choose single labels to see others.`,
          ),
        ]
      : [];
  const head = element("tr", {}, ...heads.map((text) => element("th", { scope: "col" }, text)));
  const caption = element("caption", {}, said(data.variable));
  return [
    ...note,
    element(
      "table",
      { class: "numbers" },
      caption,
      element("thead", {}, head),
      element("tbody", {}, ...rows),
    ),
  ];
}
