"""The table of a GGUF file: what it says of its model, and where its tensors are.

The format is at https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The readers of `gguf`
(seconds for a large vocabulary) and of transformers (fewer quantisations than it dequantises) do
not serve here.
"""

import math
import struct
from dataclasses import dataclass
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from persona_nns.errors import UsageError, one_line

_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
# Letters of `struct` by the number of a value's type.
_LETTERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?"}
_LETTERS |= {10: "Q", 11: "q", 12: "d"}
_PLAIN = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file.

    Attributes:
        name: as llama.cpp calls it.
        shape: rows first, as in torch.
        kind: how its values are stored.
        start: the place of its first byte in the file.
        size: bytes that it takes there.
    """

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    start: int
    size: int


@dataclass(frozen=True)
class GGUFFile:
    """The table of a file.

    Attributes:
        path: the file.
        metadata: its keys and values; of an array of texts only their number.
        tensors: in the file's order, by name.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]

    @property
    def architecture(self) -> str:
        """As the file calls it."""
        return str(self.metadata["general.architecture"])

    def values(self, name: str) -> np.ndarray:
        """A tensor in float32."""
        tensor = self.tensors[name]
        stored = np.memmap(self.path, np.uint8, "r", tensor.start, (tensor.size,))
        rows = np.array(stored).reshape(*tensor.shape[:-1], -1)
        numbers = rows.view(_PLAIN.get(tensor.kind, np.uint8))
        return dequantize(numbers, tensor.kind).astype(np.float32, copy=False)


def read_gguf(path: Path) -> GGUFFile:
    """Read the table of a file.

    Raises:
        UsageError: it is no GGUF file, or damaged.
    """
    try:
        with path.open("rb") as stream, mmap(stream.fileno(), 0, access=ACCESS_READ) as data:
            file = _read(_Cursor(data), path)
    except (OSError, ValueError, struct.error, ArithmeticError, MemoryError) as error:
        raise UsageError(
            f"The file {path.name!r} cannot be read as GGUF: {one_line(error)}"
        ) from error
    end = max((tensor.start + tensor.size for tensor in file.tensors.values()), default=0)
    if path.stat().st_size < end:
        raise UsageError(
            f"The GGUF file {path.name!r} ends before its weights do ({path.stat().st_size:,} of "
            f"{end:,} bytes); copy or download it again."
        )
    if file.metadata.get("split.count", 1) > 1:
        raise UsageError(
            f"The GGUF file {path.name!r} is one of {file.metadata['split.count']} parts; join "
            "them with `llama-gguf-split --merge`."
        )
    return file


class _Cursor:
    """A place in a file's bytes that moves on with what is read."""

    def __init__(self, data: mmap) -> None:
        self.data = data
        self.place = 0

    def numbers(self, letters: str) -> tuple[Any, ...]:
        layout = f"<{letters}"
        read = struct.unpack_from(layout, self.data, self.place)
        self.place += struct.calcsize(layout)
        return read

    def text(self) -> str:
        (length,) = self.numbers("Q")
        start, self.place = self.place, self.place + length
        return self.data[start : self.place].decode()

    def value(self, kind: int) -> Any:
        if kind in _LETTERS:
            return self.numbers(_LETTERS[kind])[0]
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise ValueError(f"it holds a value of the unknown type {kind}")
        of, count = self.numbers("IQ")
        if of in _LETTERS:
            return list(self.numbers(f"{count}{_LETTERS[of]}"))
        for _ in range(count):
            self.value(of)
        return count


def _read(cursor: _Cursor, path: Path) -> GGUFFile:
    """The table, from a file's bytes.

    Raises:
        ValueError: it is no GGUF file, or of an unknown version or quantisation.
        struct.error: it ends before its table does.
    """
    magic, version, n_tensors, n_values = cursor.numbers("4sIQQ")
    if magic != b"GGUF":
        raise ValueError("it does not begin with the letters GGUF")
    if version not in _VERSIONS:
        raise ValueError(f"it is of version {version}, and versions 2 and 3 are known")
    metadata: dict[str, Any] = {}
    for _ in range(n_values):
        key = cursor.text()
        metadata[key] = cursor.value(cursor.numbers("I")[0])
    if "general.architecture" not in metadata:
        raise ValueError("it does not say its architecture")
    table = [_entry(cursor) for _ in range(n_tensors)]
    alignment = metadata.get("general.alignment", 32)
    start = math.ceil(cursor.place / alignment) * alignment
    tensors: dict[str, StoredTensor] = {}
    for name, shape, kind, offset in table:
        in_block, of_block = GGML_QUANT_SIZES[kind]
        size = math.prod(shape) // in_block * of_block
        tensors[name] = StoredTensor(name, shape, kind, start + offset, size)
    return GGUFFile(path, metadata, tensors)


def _entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
    """Name, shape, kind and offset of a tensor; ValueError where its kind is unknown."""
    name = cursor.text()
    (dimensions,) = cursor.numbers("I")
    shape = tuple(reversed(cursor.numbers(f"{dimensions}Q")))
    kind, offset = cursor.numbers("IQ")
    return name, shape, GGMLQuantizationType(kind), offset
