// The runs of the store: what they are of, whether they are complete, and how they were made.

function showRuns() {
  showWarnings();
  const rows = index.runs.map((run, number) => {
    const open = element(
      "button",
      { type: "button", class: "link", id: `open-run-${number}` },
      run.called || run.run,
    );
    open.addEventListener("click", async () => {
      await openRun(number);
      settle();
      await show();
      $("top").scrollIntoView();
    });
    const share = run.of ? run.completed / run.of : 0;
    const state = element(
      "span",
      { class: share === 1 ? "whole" : "partly" },
      `${run.completed} of ${run.of}`,
    );
    const marks = run.warnings.length
      ? element("span", { class: "partly" }, `${run.warnings.length}`)
      : "–";
    const isHere = number === view.run;
    return element(
      "tr",
      { class: isHere ? "here" : null, "aria-current": isHere ? "true" : null },
      element("td", {}, run.experiment),
      element("td", {}, run.model),
      element("th", { scope: "row" }, open),
      element("td", {}, state),
      element("td", {}, marks),
      element("td", {}, run.created.slice(0, 16).replace("T", " ")),
    );
  });
  $("runs").replaceChildren(...rows);
  $("runs-table").scrollTop = Math.max(0, rows[view.run].offsetTop - 60);
  const run = index.runs[view.run];
  $("run-title").textContent = run.run;
  $("provenance").replaceChildren(
    ...body.provenance.flatMap(([name, value]) => [
      element("dt", {}, words(name)),
      element("dd", {}, told(value)),
    ]),
  );
  showSessions();
}

function told(value) {
  if (value === null || typeof value !== "object") return String(value);
  const text = Array.isArray(value)
    ? value
        .map((each) => (typeof each === "object" ? JSON.stringify(each) : String(each)))
        .join(", ")
    : Object.entries(value)
        .map(([name, of]) => `${name} ${typeof of === "object" ? JSON.stringify(of) : of}`)
        .join(", ");
  return text || "–";
}

function showWarnings() {
  const run = index.runs[view.run];
  $("warnings").replaceChildren(...run.warnings.map((text) => element("li", {}, text)));
  $("warnings-part").hidden = !run.warnings.length;
  $("complete").textContent =
    `${run.completed} of ${run.of} ${run.noun}s complete · ${run.computing} · ${run.grid}`;
}

function showSessions() {
  const { many, last } = body.sessions;
  const shown = last.map((of) =>
    element(
      "li",
      {},
      Object.entries(of)
        .filter(([name]) => name !== "name")
        .map(([name, value]) => `${words(name)} ${told(value)}`)
        .join(" · ") || of.name,
    ),
  );
  $("sessions").replaceChildren(...shown);
  $("sessions-title").textContent =
    many > last.length ? `Sessions (the last ${last.length} of ${many})` : `Sessions (${many})`;
  $("sessions-part").hidden = !many;
}
