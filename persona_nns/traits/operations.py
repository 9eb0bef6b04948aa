"""What steering does to the residual stream, and where it is cut off: options of `trait_steering`.

``add`` adds α v, ``ablate`` takes the direction away, ``cap`` cuts off what lies above a threshold
τ along it; one at a time, never combined. A threshold is a number, in the units of the stream, or a
percentile: ``p75`` is, at each layer, the linear percentile of the projections on v̂ of all tokens
of the given answers, without intervention (`trait_projections`).
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from persona_nns.declarations.options import FileName
from persona_nns.declarations.sites import label_layer_set
from persona_nns.errors import UsageError
from persona_nns.results.reading import open_results

OPERATIONS = ("add", "ablate", "cap")
_BEFORE = "add,ablate"  # what runs did before there was a choice
_PERCENTILE = re.compile(r"p(\d+(?:\.\d+)?)")


@dataclass(frozen=True)
class Operations:
    """What is done to the stream.

    Attributes:
        operations: add, ablate, cap (cut what lies above a threshold along the vector); each is
            done by itself. Under answers that are generated, add alone.
        taus: thresholds of cap: numbers, or pNN (a percentile of the answers' own projections);
            at every layer of each of --layer-sets.
        norm_preserving: after adding, give the stream the norm that it had.
        receipts: measure what steering costs too: KL on neutral prompts, a random direction of
            the same norm, and which answers move against the direction.
        projections: store with the projections that percentiles are of; measured by default.
        projections_run: which run of trait_projections, where the store has several.
    """

    operations: str = _BEFORE
    taus: str = ""
    norm_preserving: bool = False
    receipts: bool = False
    projections: FileName | None = None
    projections_run: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The operations, in their own order."""
        asked = _parts(self.operations)
        return tuple(name for name in OPERATIONS if name in asked)

    @property
    def labels(self) -> tuple[str, ...]:
        """The thresholds, as they were typed."""
        return tuple(_parts(self.taus))

    @property
    def content(self) -> dict[str, Any]:
        """What of it determines numbers, beside what runs did before there was a choice."""
        said = {
            "operations": list(self.names),
            "taus": list(self.labels),
            "norm_preserving": self.norm_preserving,
        }
        before = {"operations": _parts(_BEFORE), "taus": [], "norm_preserving": False}
        return {key: value for key, value in said.items() if value != before[key]}

    def check(self, *, given: bool) -> None:
        """See that they go together, and with answers that are given or generated.

        Raises:
            UsageError: they do not.
        """
        asked = _parts(self.operations)
        for name in asked:
            if name not in OPERATIONS:
                raise UsageError(f"Unknown operation {name!r}; use {', '.join(OPERATIONS)}.")
            if asked.count(name) > 1:
                raise UsageError(f"The operation {name!r} is given twice; name each one once.")
        if not asked:
            raise UsageError(f"No operation was asked for; use {', '.join(OPERATIONS)}.")
        for tau in self.labels:
            _quantile_or_number(tau)
            if self.labels.count(tau) > 1:
                raise UsageError(f"The threshold {tau!r} is given twice; name each one once.")
        if "cap" in asked and not self.labels:
            raise UsageError("Capping needs thresholds: --taus p75,p90, or numbers.")
        if self.labels and "cap" not in asked:
            raise UsageError("Thresholds (--taus) are of capping: --operations add,ablate,cap.")
        if not given and ("cap" in asked or self.receipts):
            what = "Capping is" if "cap" in asked else "Receipts are"
            raise UsageError(f"{what} measured on given answers; name them: --responses F.jsonl.")
        if not given and "add" not in asked:
            raise UsageError("A model that answers is steered by adding: --operations add.")

    def thresholds(self, n_layers: int) -> Tensor:
        """τ at each layer, [tau, n_layers + 1]; NaN for percentiles of what is yet to be measured.

        Raises:
            UsageError: there are no such projections.
        """
        read = [_quantile_or_number(tau) for tau in self.labels]
        tokens = None
        if self.projections is not None and any(is_quantile for _, is_quantile in read):
            tokens = _projected(self.projections, self.projections_run)
        found = torch.empty(len(read), n_layers + 1)
        for row, (value, is_quantile) in zip(found, read, strict=True):
            if not is_quantile:
                row[:] = value
            elif tokens is None:
                row[:] = math.nan
            else:
                row[:] = torch.from_numpy(np.percentile(tokens, value, axis=1))
        return found


def needs_projections(options: Mapping[str, Any]) -> bool:
    """Whether some thresholds are percentiles of what is not measured yet."""
    taus = _parts(str(options.get("taus", "")))
    given = options.get("responses") is not None and options.get("projections") is None
    return given and any(map(_PERCENTILE.fullmatch, taus))


def _parts(spec: str) -> list[str]:
    return [part.strip() for part in spec.split(",") if part.strip()]


def _quantile_or_number(tau: str) -> tuple[float, bool]:
    """A threshold, and whether it is a percentile.

    Raises:
        UsageError: it is neither.
    """
    match = _PERCENTILE.fullmatch(tau)
    try:
        value = float(match[1] if match else tau)
    except ValueError:
        value = math.nan
    if math.isnan(value) or value == -math.inf or (match and value > 100):
        raise UsageError(
            f"{tau!r} is no threshold; use numbers such as 2.5 (inf caps nothing), or percentiles "
            "from p0 to p100."
        )
    # No threshold is stored as infinite, which would look like a number that overflowed.
    return min(value, torch.finfo(torch.float32).max), match is not None


def _projected(store: str, run: str | None) -> np.ndarray[Any, Any]:
    """The projections of all tokens of all answers, [layer, token]."""
    results = open_results(store, "trait_projections", run=run).isel(model=0, trait=0)
    whole = results["projection"].transpose("layer", "row", "token").values
    said = results["n_tokens"].values[:, None] > np.arange(whole.shape[-1])
    tokens = whole[:, said]
    if not tokens.size or not np.isfinite(tokens).all():
        raise UsageError(
            f"The projections in {store!r} are not complete; finish their run of trait_projections."
        )
    return tokens


def label_sets(sets: Sequence[Sequence[int]]) -> list[str]:
    """Labels of sets of layers that are capped.

    Raises:
        UsageError: there are none.
    """
    if not sets:
        raise UsageError('Capping needs sets of layers: --layer-sets "8;8,9,10".')
    return [label_layer_set(layers) for layers in sets]
