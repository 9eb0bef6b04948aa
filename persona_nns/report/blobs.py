"""What a page holds beside its index: pieces, deflated, which it inflates to show them."""

import base64
import json
import math
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

# What all pieces may take in a page, in bytes of its file; past that, large arrays stay out.
MOST = 150 * 2**20


def as_json(value: Any) -> str:
    """A value as JSON that a browser reads: it knows neither NaN nor infinity."""
    how: dict[str, Any] = {"ensure_ascii": False, "separators": (",", ":"), "default": str}
    try:
        return json.dumps(value, allow_nan=False, **how)
    except ValueError:
        return json.dumps(_finite(value), allow_nan=False, **how)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {name: _finite(of) for name, of in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list | tuple) else value


class Blobs:
    """Pieces of data, each known by its number."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self.size = 0

    def add(self, raw: bytes) -> int:
        """Keep a piece; returns its number."""
        text = base64.b64encode(zlib.compress(raw, 6)).decode()
        self._texts.append(text)
        self.size += len(text)
        return len(self._texts) - 1

    def add_json(self, value: Any) -> int:
        """Keep a JSON-able value."""
        return self.add(as_json(value).encode())

    def add_numbers(self, values: NDArray[Any]) -> int:
        """Keep numbers, little-endian: the first bytes of all, then the second ones of all.

        Bytes that mean the same compress better together.
        """
        flat = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<")).ravel()
        return self.add(flat.view(np.uint8).reshape(flat.size, -1).T.tobytes())

    @property
    def is_full(self) -> bool:
        """Whether what is large has to stay out."""
        return self.size > MOST

    def elements(self) -> Iterator[str]:
        """The pieces as elements of a page."""
        for number, text in enumerate(self._texts):
            yield f'<script type="application/octet-stream" id="blob-{number}">{text}</script>\n'
