// The prompt of a cell, token by token, its spans told apart by colour.

async function promptOf(cell) {
  const prompts = body.prompts;
  const place = prompts.labels?.indexOf(cell) ?? -1;
  if (place < 0) return null;
  const block = await jsonPiece(prompts.blobs[Math.floor(place / prompts.each)]);
  const [text, ends, stops, userLast] = block[place % prompts.each];
  return { text, ends, stops, userLast };
}

async function promptPart(persona, task) {
  if (!body.prompts) return null;
  const title = element("h3", {}, "Prompt");
  const prompt = await promptOf(`${persona}/${task}`);
  if (prompt) {
    const anew =
      body.prompts.source === "rendered"
        ? element(
            "p",
            { class: "note" },
            "The run kept no prompts: this is what the model's tokenizer made of its texts when the page was written.",
          )
        : null;
    return element("section", { class: "prompt" }, title, ...tokensOf(prompt), anew);
  }
  const list = element("dl", { class: "given" });
  for (const [name, texts, key] of [
    ["persona", body.prompts.personas, persona],
    ["task", body.prompts.tasks, task],
  ]) {
    list.append(
      element("dt", {}, name),
      element("dd", { class: `span-${name}` }, String(texts[key] ?? key)),
    );
  }
  const why =
    "The store keeps no tokens of this run's prompts; these are the texts of its persona and task.";
  return element("section", { class: "prompt" }, title, list, element("p", { class: "note" }, why));
}

function tokensOf({ text, ends, stops, userLast }) {
  const spans = body.prompts.spans;
  // Offsets count characters, of which JavaScript takes some for two.
  const characters = [...text];
  const shown = element("p", { class: "tokens" });
  let token = 0;
  spans.forEach((span, k) => {
    const region = element("span", { class: `region span-${span}` });
    if (token < stops[k]) region.append(element("span", { class: "unseen" }, `[${span}: `));
    for (; token < stops[k]; token++) {
      const piece = characters.slice(token ? ends[token - 1] : 0, ends[token]).join("");
      const isLast = token === ends.length - 1;
      const named = [
        `token ${token}`,
        span,
        ...(isLast ? ["p_last"] : []),
        ...(token === userLast ? ["p_user_last"] : []),
      ];
      const kind = `token${isLast ? " last" : ""}${token === userLast ? " user-last" : ""}`;
      region.append(
        element(
          "span",
          { class: kind, title: named.join(" · ") },
          piece.replaceAll("\n", "↵\n") || "·",
        ),
      );
    }
    if (region.childNodes.length) region.append(element("span", { class: "unseen" }, "] "));
    shown.append(region);
  });
  const key = element("p", { class: "key" });
  spans.forEach((span, k) => {
    const many = stops[k] - (k ? stops[k - 1] : 0);
    key.append(element("span", { class: `swatch span-${span}` }, `${span} (${many})`));
  });
  key.append(element("span", { class: "token last" }, "p_last"), ` ${ends.length} tokens`);
  return [shown, key];
}
