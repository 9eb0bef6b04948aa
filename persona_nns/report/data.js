// Pieces of data: inflated when they are asked for, and kept for the run that is shown.

const inflated = new Map();

function bytesOf(base64) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(base64);
  const binary = atob(base64);
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
  return bytes;
}

async function inflate(base64) {
  const stream = new Blob([bytesOf(base64)]).stream();
  return new Response(stream.pipeThrough(new DecompressionStream("deflate"))).arrayBuffer();
}

// A piece by its number, as `read` makes it of bytes.
async function piece(number, read) {
  if (!inflated.has(number)) {
    const text = document.getElementById(`blob-${number}`).textContent;
    inflated.set(number, inflate(text).then(read));
  }
  return inflated.get(number);
}

function forgetPieces() {
  inflated.clear();
}

const readJson = (buffer) => JSON.parse(new TextDecoder().decode(buffer));

// Numbers whose bytes stand apart: all first ones, then all second ones, …
function readNumbers(type) {
  return (buffer) => {
    const width = type === "float64" ? 8 : 4;
    const from = new Uint8Array(buffer);
    const n = from.length / width;
    const to = new Uint8Array(from.length);
    for (let b = 0; b < width; b++) {
      const plane = b * n;
      for (let i = 0; i < n; i++) to[i * width + b] = from[plane + i];
    }
    return type === "float64" ? new Float64Array(to.buffer) : new Float32Array(to.buffer);
  };
}

const jsonPiece = (number) => piece(number, readJson);
const numberPiece = (number, type) => piece(number, readNumbers(type));

// The sizes of a variable's dimensions in a run.
const shapeOf = (body, variable) => variable.dims.map((dim) => body.dims[dim].length);

// The parts of a variable that hold some labels of the dimension that it is cut along:
// [{start, shape, values}], where start counts labels of that dimension.
async function partsOf(body, variable, isWanted) {
  const shape = shapeOf(body, variable);
  const read = async (number) =>
    variable.kind === "text" ? jsonPiece(number) : numberPiece(number, variable.dtype);
  if (variable.blobs === undefined) {
    return [{ axis: -1, start: 0, shape, values: await read(variable.blob) }];
  }
  const axis = variable.dims.indexOf(variable.along);
  const parts = variable.blobs.map(async (number, k) => {
    const start = k * variable.each;
    const size = Math.min(variable.each, shape[axis] - start);
    let any = false;
    for (let i = start; i < start + size && !any; i++) any = isWanted(i);
    if (!any) return null;
    const own = shape.map((n, d) => (d === axis ? size : n));
    return { axis, start, shape: own, values: await read(number) };
  });
  return (await Promise.all(parts)).filter((part) => part !== null);
}

// One value: `at` gives an index for each of the variable's dimensions.
async function valueAt(body, variable, at) {
  const axis = variable.dims.indexOf(variable.along);
  const isWanted = (i) => axis < 0 || i === at[axis];
  if (variable.blobs === null) return undefined;
  for (const part of await partsOf(body, variable, isWanted)) {
    let place = 0;
    part.shape.forEach((n, d) => {
      place = place * n + at[d] - (d === part.axis ? part.start : 0);
    });
    const values = part.values;
    return variable.kind === "text" ? values.texts[values.at[place]] : values[place];
  }
  return undefined;
}
