// The figure of what is selected, and a sentence that says what it shows.

const MANY_BANDS = 4;
const LINES = [
  "#3b6fd4",
  "#d1741c",
  "#2c8f5c",
  "#b8428f",
  "#7a5ad6",
  "#a07d10",
  "#2a93a8",
  "#c4453a",
  "#6b7a8c",
  "#86603c",
];

// Plotly reads a few tags and entities in texts: none of a store's are meant as such.
const plain = (text) =>
  String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
const short = (text, most = 26) => (text.length > most ? `${text.slice(0, most - 1)}…` : text);
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

let drawing = 0; // the number of the last figure that was begun

async function showFigure() {
  const mine = ++drawing;
  const variable = current();
  $("figure-part").hidden = !variable;
  if (!variable) return;
  $("figure-title").textContent = said(variable);
  $("figure-about").textContent = [
    variable.description,
    variable.wide ? "Drawn is the length of each vector." : "",
  ]
    .join(" ")
    .trim();
  $("status").textContent = "Reading …";
  const roles = [view.f, view.y, view.x];
  const found = await summarise(body, variable, roles, view.at);
  if (mine !== drawing) return;
  if (!found) {
    Plotly.purge($("figure"));
    $("figure").replaceChildren(
      element(
        "p",
        { class: "note" },
        "The single units of this variable were too many for this page. Choose all of them, or write a report of this experiment alone.",
      ),
    );
    $("status").textContent = "Not in this page.";
    showTable(null);
    return;
  }
  const data = {
    ...found,
    variable,
    facets: view.f ? labelsOf(body, view.f) : [""],
    rows: view.y ? labelsOf(body, view.y) : [""],
    columns: view.x ? labelsOf(body, view.x) : [""],
  };
  data.at = (f, y, x) => found.groups[(f * data.rows.length + y) * data.columns.length + x];
  data.many = (f, y, x) => found.asked[(f * data.rows.length + y) * data.columns.length + x];
  draw(data);
  const sentence = inWords(data);
  $("status").textContent = sentence;
  $("figure").setAttribute("aria-label", `Figure: ${sentence}`);
  showTable(data);
}

const middleName = (variable) => (variable.kind === "bool" ? "share" : "median");

function inWords({ variable, groups, asked }) {
  const measured = groups.reduce((sum, group) => sum + group.n, 0);
  const all = asked.reduce((sum, n) => sum + n, 0);
  const summed = groups.some((group) => group.n > 1);
  const drawn = [view.x, view.y, view.f].filter(Boolean).map(words).join(" and ");
  const fixed = Object.entries(view.at).map(([dim, label]) => `${words(dim)} ${label}`);
  const over = dimsOf(variable).filter(
    (dim) =>
      ![view.x, view.y, view.f].includes(dim) &&
      !(dim in view.at) &&
      dim !== "cell" &&
      manyOf(dim) > 1,
  );
  const middles = groups.map((group) => group.middle).filter(Number.isFinite);
  const unit = variable.units === "1" ? "" : ` ${variable.units}`;
  const range = middles.length
    ? `from ${brief(Math.min(...middles))} to ${brief(Math.max(...middles))}${unit}`
    : "nothing was measured";
  const parts = [
    `${variable.name} by ${drawn}${fixed.length ? `, at ${fixed.join(", ")}` : ""}: ${range}.`,
    summed
      ? `Each is the ${middleName(variable)}${over.length ? ` over ${over.map(words).join(", ")}` : ""}, with ${variable.kind === "bool" ? "the 95 % Wilson interval" : "quartiles"}.`
      : "",
    `${measured.toLocaleString("en")} of ${all.toLocaleString("en")} values measured.`,
  ];
  return parts.filter(Boolean).join(" ");
}

function hover(data, f, y, x) {
  const group = data.at(f, y, x);
  const unit = data.variable.units === "1" ? "" : ` ${data.variable.units}`;
  const where = [
    [view.x, data.columns[x]],
    [view.y, data.rows[y]],
    [view.f, data.facets[f]],
  ];
  const lines = where
    .filter(([dim]) => dim)
    .map(([dim, label]) => `${plain(words(dim))} ${plain(short(String(label), 60))}`);
  if (!group.n) return [...lines, "not measured"].join("<br>");
  const value = `<b>${brief(group.middle)}</b>${plain(unit)}`;
  const spread =
    group.n > 1
      ? [
          `${data.variable.kind === "bool" ? "95 %" : "quartiles"} ${brief(group.low)} to ${brief(group.high)}`,
        ]
      : [];
  return [...lines, value, ...spread, `${group.n} of ${data.many(f, y, x)} measured`].join("<br>");
}

function draw(data) {
  const figure = $("figure");
  if (!figure.data) figure.replaceChildren();
  const width = figure.clientWidth;
  const kind = view.kind === "auto" ? fittingKind() : view.kind;
  const isNarrow = width < 560;
  const across = Math.min(data.facets.length, isNarrow ? 1 : width < 900 ? 2 : 3);
  const down = Math.ceil(data.facets.length / across);
  const each =
    kind === "heatmap"
      ? Math.min(Math.max(data.rows.length * 17 + 40, 190), 560)
      : isNarrow
        ? 260
        : 330;
  const layout = {
    height: down * (each + (data.facets.length > 1 ? 60 : 10)) + 90,
    margin: { l: 10, r: 12, t: data.facets.length > 1 ? 34 : 14, b: 40 },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: kind === "heatmap" ? css("--absent") : "rgba(0,0,0,0)",
    font: { family: "system-ui, sans-serif", size: 13, color: css("--ink") },
    hoverlabel: {
      bgcolor: css("--paper"),
      bordercolor: css("--line"),
      font: { color: css("--ink"), size: 13 },
      align: "left",
    },
    legend: {
      orientation: "h",
      y: 1.02,
      yanchor: "bottom",
      x: 0,
      xanchor: "left",
      title: { text: view.y ? plain(words(view.y)) : "" },
    },
    showlegend: kind !== "heatmap" && data.rows.length > 1,
    hovermode: "closest",
    annotations: [],
    dragmode: false,
  };
  if (data.facets.length > 1) {
    layout.grid = {
      rows: down,
      columns: across,
      pattern: "independent",
      xgap: 0.12,
      ygap: down > 1 ? 0.28 : 0.1,
    };
    if (layout.showlegend) {
      layout.margin.t = 74;
      layout.legend.y = 1 + 50 / layout.height;
    }
  }
  const traces = data.facets.flatMap((_, f) => panel(data, layout, f, kind));
  data.facets.forEach((_, f) => {
    if (f % across) delete layout[`yaxis${f ? f + 1 : ""}`].title; // said at the left
  });
  const options = {
    responsive: true,
    displaylogo: false,
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
    displayModeBar: isNarrow ? false : "hover",
  };
  Plotly.react(figure, traces, layout, options);
  figure.removeAllListeners?.("plotly_click");
  figure.on("plotly_click", (event) => pointClicked(data, event.points[0]));
}

function panel(data, layout, f, kind) {
  const suffix = f ? String(f + 1) : "";
  const isNamed = view.x ? !isNumbered(view.x) : true;
  const ticks = tickLabels(data.columns, isNamed || kind === "heatmap");
  layout[`xaxis${suffix}`] = {
    ...axisLook(),
    ...ticks,
    automargin: true,
    title: { text: view.x ? plain(words(view.x)) : "", standoff: 8 },
  };
  const shared = f ? { matches: "y" } : {};
  layout[`yaxis${suffix}`] = { ...axisLook(), ...shared, automargin: true };
  if (data.facets.length > 1) {
    layout.annotations.push({
      text: plain(`${words(view.f)} ${short(String(data.facets[f]), 40)}`),
      xref: `x${suffix} domain`,
      yref: `y${suffix} domain`,
      x: 0,
      y: 1,
      xanchor: "left",
      yanchor: "bottom",
      showarrow: false,
      font: { size: 13, color: css("--quiet") },
    });
  }
  const place = { xaxis: `x${suffix}`, yaxis: `y${suffix}` };
  const xs = ticks.tickvals ? data.columns.map((_, k) => k) : data.columns;
  return kind === "heatmap"
    ? heatmap(data, layout, f, suffix, place, xs)
    : curves(data, layout, f, suffix, place, xs);
}

// The texts go to what was clicked.
function pointClicked(data, point) {
  const [f, y, x] = point.customdata ?? [];
  if (x === undefined) return;
  const text = { ...view.text };
  for (const [dim, label] of [
    [view.x, data.columns[x]],
    [view.y, data.rows[y]],
    [view.f, data.facets[f]],
  ]) {
    if (dim) text[dim] = label;
  }
  change({ text });
}
