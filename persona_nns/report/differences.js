// Markers in a text, and how it differs from another, word by word.

// A space, a hyphen, or a letter of a script that puts nothing between words.
const ANYWHERE = /[ \-\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff]/u;
const LETTER = "[\\p{L}\\p{N}_]";
const MOST_PAIRS = 4e6;

// Where markers stand, as `persona_nns.prompts.markers` finds them: [start, stop] pairs.
function markerSpans(text, markers) {
  const found = [];
  for (const marker of markers ?? []) {
    const escaped = marker.replace(/[.*+?^${}()|[\]\\/]/g, "\\$&");
    let pattern = escaped.replaceAll("-", "\\x2d");
    if (!ANYWHERE.test(marker)) {
      // Python's \b, which knows all letters: the two sides of an edge differ in being one.
      const isLetter = new RegExp(LETTER, "u");
      const first = isLetter.test([...marker][0]);
      const last = isLetter.test([...marker].at(-1));
      pattern = `(?<${first ? "!" : "="}${LETTER})${pattern}(?${last ? "!" : "="}${LETTER})`;
    }
    for (const match of text.matchAll(new RegExp(pattern, "giu"))) {
      found.push([match.index, match.index + match[0].length]);
    }
  }
  return found;
}

function wordsOf(text) {
  const found = [];
  for (const match of text.matchAll(
    /[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff]|[^\s\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff]+/gu,
  )) {
    found.push([match.index, match.index + match[0].length, match[0]]);
  }
  return found;
}

// The words of a text that a longest common subsequence with another text leaves out.
function newWords(text, other) {
  const [own, theirs] = [wordsOf(text), wordsOf(other)];
  let start = 0;
  while (start < own.length && start < theirs.length && own[start][2] === theirs[start][2]) start++;
  const [a, b] = [own.slice(start), theirs.slice(start)];
  if (a.length * b.length > MOST_PAIRS) return { spans: a, of: own.length };
  const width = b.length + 1;
  const best = new Uint16Array((a.length + 1) * width);
  for (let i = a.length - 1; i >= 0; i--) {
    for (let j = b.length - 1; j >= 0; j--) {
      best[i * width + j] =
        a[i][2] === b[j][2]
          ? best[(i + 1) * width + j + 1] + 1
          : Math.max(best[(i + 1) * width + j], best[i * width + j + 1]);
    }
  }
  const spans = [];
  for (let i = 0, j = 0; i < a.length;) {
    if (j < b.length && a[i][2] === b[j][2]) [i, j] = [i + 1, j + 1];
    else if (j < b.length && best[i * width + j + 1] >= best[(i + 1) * width + j]) j++;
    else spans.push(a[i++]);
  }
  return { spans, of: own.length };
}

// A text as nodes: markers in <mark>, new words in <ins>.
function marked(text, markers, differing) {
  const edges = new Set([0, text.length]);
  for (const [start, stop] of [...markers, ...differing]) edges.add(start).add(stop);
  const sorted = [...edges].sort((a, b) => a - b);
  const within = (spans, at) => spans.some(([start, stop]) => start <= at && at < stop);
  return sorted.slice(0, -1).map((start, k) => {
    const part = text.slice(start, sorted[k + 1]);
    const node = within(markers, start) ? element("mark", {}, part) : document.createTextNode(part);
    return within(differing, start) ? element("ins", {}, node) : node;
  });
}
