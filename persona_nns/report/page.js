// Where it begins: plotly is unpacked, the index read, and what the address says is shown.

const index = JSON.parse($("index").textContent);

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

function switchTheme() {
  document.documentElement.dataset.theme = isDark() ? "light" : "dark";
  sayTheme();
  showFigure();
}

function sayTheme() {
  $("theme").textContent = isDark() ? "Light colours" : "Dark colours";
}

async function show() {
  showChoices();
  showRuns();
  await Promise.all([showFigure(), showTexts()]);
  document.documentElement.dataset.ready = String(
    Number(document.documentElement.dataset.ready ?? 0) + 1,
  );
}

async function unpackPlotly() {
  const code = new TextDecoder().decode(await inflate($("plotly").textContent));
  document.head.append(element("script", {}, code));
  $("plotly").remove();
}

async function begin() {
  $("store").textContent = index.store;
  const many = index.runs.length === 1 ? "1 run" : `${index.runs.length} runs`;
  $("about").textContent =
    `${many} · written ${index.written.slice(0, 16).replace("T", " ")} UTC by persona-nns ${index.version}`;
  $("theme").addEventListener("click", switchTheme);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    sayTheme();
    showFigure();
  });
  sayTheme();
  await Promise.all([unpackPlotly(), readAddress()]);
  await show();
  window.addEventListener("hashchange", async () => {
    await readAddress();
    await show();
  });
}

begin().catch((error) => {
  $("status").textContent =
    `This page could not be shown: ${error.message}. It needs a browser of 2023 or later.`;
  throw error;
});
