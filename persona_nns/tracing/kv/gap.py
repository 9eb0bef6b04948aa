"""What a cache that stands for a persona is measured on: hosts, and what the persona says."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from persona_nns.prompts.grids import Cell, PromptName
from persona_nns.tracing.kv.grafts import GraftSources
from persona_nns.tracing.prefixes import Prefilled


@dataclass(frozen=True)
class HostGap:
    """Hosts of some cells, and what the model says, greedily, to their clean prompts.

    Attributes:
        cells: the rows.
        sources: the prompts BY and XY, without p_last.
        forced: tokens that follow p_last in every pass, [row, token].
        clean: log-probabilities of what is said to XY, [row, token, vocabulary].
        scored: which tokens count, [row, token].
        attention: in XY, of p_last and what is said to each of the persona's tokens, mean over
            layers and heads, [row, token].
    """

    cells: Sequence[Cell]
    sources: GraftSources
    forced: Tensor
    clean: Tensor
    scored: Tensor
    attention: Tensor

    @property
    def start(self) -> int:
        """Position at which the persona of the hosts begins."""
        return self.sources.spans[0]["BY"]["persona"].start

    def prefilled(self, name: PromptName) -> Prefilled:
        """One of the prompts."""
        rows = [prompt[name].ids for prompt in self.sources.prompts]
        return Prefilled(rows, self.sources.caches[name])

    def first(self, n_rows: int) -> "HostGap":
        """Only the first rows."""
        rows = (self.forced, self.clean, self.scored, self.attention)
        sources = self.sources.some(range(n_rows))
        return HostGap(self.cells[:n_rows], sources, *(each[:n_rows] for each in rows))
