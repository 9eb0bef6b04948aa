// What plotly is given to draw: heatmaps, and curves with their quartiles.

const axisLook = () => ({
  gridcolor: css("--grid"),
  zerolinecolor: css("--line"),
  linecolor: css("--line"),
  tickcolor: css("--line"),
  ticks: "outside",
});

// Named labels stand at whole numbers; of very many, some are written.
function tickLabels(labels, isNamed) {
  if (!isNamed) return {};
  const step = Math.ceil(labels.length / 40);
  const shown = labels.map((_, k) => k).filter((k) => k % step === 0);
  return {
    tickmode: "array",
    tickvals: shown,
    ticktext: shown.map((k) => plain(short(String(labels[k])))),
    range: [-0.5, labels.length - 0.5],
    zeroline: false,
  };
}

function colours(data) {
  const middles = data.groups.map((group) => group.middle).filter(Number.isFinite);
  const [low, high] = middles.length ? [Math.min(...middles), Math.max(...middles)] : [0, 1];
  if (low < -0.02 * high && high > 0) {
    const most = Math.max(-low, high);
    const dark = isDark();
    const middle = dark ? "#23282f" : "#f6f6f4";
    return {
      zmin: -most,
      zmax: most,
      colorscale: [
        [0, "#2f6fd0"],
        [0.25, dark ? "#2b4f86" : "#a5c3ee"],
        [0.5, middle],
        [0.75, dark ? "#8a4a22" : "#f0bd94"],
        [1, "#d4661a"],
      ],
    };
  }
  const share = data.variable.kind === "bool";
  return {
    zmin: share ? 0 : low,
    zmax: share ? 1 : high === low ? low + 1 : high,
    colorscale: "Viridis",
  };
}

function heatmap(data, layout, f, suffix, place, xs) {
  const rows = data.rows.map((_, y) => data.columns.map((_, x) => data.at(f, y, x).middle));
  const unit = data.variable.units === "1" ? "" : data.variable.units;
  Object.assign(layout[`yaxis${suffix}`], tickLabels(data.rows, true), {
    title: { text: view.y ? plain(words(view.y)) : "", standoff: 6 },
    showgrid: false,
  });
  if (view.y && view.y !== "layer" && !isNumbered(view.y)) layout[`yaxis${suffix}`].range.reverse();
  layout[`xaxis${suffix}`].showgrid = false;
  return [
    {
      type: "heatmap",
      ...place,
      ...colours(data),
      x: xs,
      y: data.rows.map((_, k) => k),
      z: rows.map((row) => row.map((value) => (Number.isFinite(value) ? value : null))),
      customdata: data.rows.map((_, y) => data.columns.map((_, x) => [f, y, x])),
      text: data.rows.map((_, y) => data.columns.map((_, x) => hover(data, f, y, x))),
      hovertemplate: "%{text}<extra></extra>",
      hoverongaps: false,
      xgap: data.columns.length > 60 ? 0 : 1,
      ygap: data.rows.length > 60 ? 0 : 1,
      showscale: f === 0,
      colorbar: {
        title: { text: plain(unit), side: "right" },
        thickness: 12,
        outlinewidth: 0,
        len: Math.min(1, 260 / layout.height),
        y: 1,
        yanchor: "top",
      },
    },
  ];
}

function curves(data, layout, f, suffix, place, xs) {
  const unit = data.variable.units === "1" ? "" : ` (${data.variable.units})`;
  layout[`yaxis${suffix}`].title = {
    text: plain(`${middleName(data.variable)} of ${data.variable.name}${unit}`),
    standoff: 6,
  };
  if (data.variable.kind === "bool") layout[`yaxis${suffix}`].range = [-0.03, 1.03];
  const isNamed = Boolean(layout[`xaxis${suffix}`].tickvals) || !view.x;
  const many = data.rows.length;
  return data.rows.flatMap((label, y) => {
    const found = data.columns.map((_, x) => data.at(f, y, x));
    const colour =
      many > LINES.length
        ? `hsl(${Math.round((300 * y) / many)} 60% ${isDark() ? 65 : 42}%)`
        : LINES[y % LINES.length];
    const hasSpread = found.some((group) => group.n > 1);
    // Named places have bars side by side, numbered ones a band.
    const shift = isNamed && hasSpread && many > 1 ? (0.5 * (y - (many - 1) / 2)) / many : 0;
    const line = {
      type: "scatter",
      ...place,
      name: plain(short(String(label))),
      legendgroup: String(y),
      showlegend: f === 0,
      x: xs.map((x) => (typeof x === "number" ? x + shift : x)),
      y: found.map((group) => (group.n ? group.middle : null)),
      mode: isNamed && !["position", "budget"].includes(view.x) ? "markers" : "lines+markers",
      connectgaps: view.x === "turn", // others speak in between
      line: { color: colour, width: 2 },
      marker: { color: colour, size: data.columns.length > 60 ? 3 : 6 },
      customdata: data.columns.map((_, x) => [f, y, x]),
      text: data.columns.map((_, x) => hover(data, f, y, x)),
      hovertemplate: "%{text}<extra></extra>",
    };
    if (hasSpread && isNamed) {
      line.error_y = {
        type: "data",
        symmetric: false,
        thickness: 1.2,
        width: 0,
        color: colour,
        array: found.map((g) => (g.n ? g.high - g.middle : 0)),
        arrayminus: found.map((g) => (g.n ? g.middle - g.low : 0)),
      };
    }
    if (!hasSpread || isNamed || many > MANY_BANDS) return [line];
    return [...bands(found, line, colour), line];
  });
}

// The quartiles as a surface behind a line, one for each stretch without a gap.
function bands(found, line, colour) {
  const stretches = [];
  found.forEach((group, k) => {
    if (!group.n) return;
    if (k && found[k - 1].n && stretches.length) stretches[stretches.length - 1].push(k);
    else stretches.push([k]);
  });
  return stretches
    .filter((of) => of.length > 1)
    .map((of) => ({
      type: "scatter",
      xaxis: line.xaxis,
      yaxis: line.yaxis,
      legendgroup: line.legendgroup,
      showlegend: false,
      hoverinfo: "skip",
      meta: "quartiles",
      x: [...of, ...of.toReversed()].map((k) => line.x[k]),
      y: [...of.map((k) => found[k].high), ...of.toReversed().map((k) => found[k].low)],
      mode: "lines",
      fill: "toself",
      fillcolor: colour,
      opacity: 0.16,
      line: { width: 0 },
    }));
}
