"""Hosts that a persona is put into, and what they are scored against: what is said to XY."""

from collections.abc import Sequence
from dataclasses import dataclass

from nnsight import TransformersModel
from torch import Tensor

from persona_nns.prompts.grids import Cell
from persona_nns.tracing.clean_run import force
from persona_nns.tracing.continuations import say
from persona_nns.tracing.kv.grafts import GraftSources, fill_sources, graft_spans, host_with
from persona_nns.tracing.metrics import log_probabilities, summed_kl
from persona_nns.tracing.prefixes import Prefilled


@dataclass(frozen=True)
class Reference:
    """What the model says, greedily, to the clean XY prompt."""

    forced: Tensor  # the tokens that follow p_last in every pass, [cell, token]
    clean: Tensor  # log-probabilities, [cell, token, vocabulary]
    scored: Tensor  # [cell, token]


@dataclass(frozen=True)
class Hosts:
    """The hosts BY of a batch.

    Attributes:
        sources: what is grafted into them.
        reference: what they are scored against.
        kl: KL(clean ‖ host) in nats, [cell]: the gap.
    """

    sources: GraftSources
    reference: Reference
    kl: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Layers and key-value heads."""
        cache = self.sources.caches["BY"]
        return cache.n_layers, cache.keys[0].shape[1]


def read_reference(
    model: TransformersModel, cells: Sequence[Cell], sources: GraftSources, n_eval: int
) -> Reference:
    """What is said to XY, and the distributions it is said from."""
    xy = Prefilled([prompt["XY"].ids for prompt in sources.prompts], sources.caches["XY"])
    said = say(model, xy, n_eval)
    said.warn_if_short([cell.label for cell in cells], n_eval)
    run = force(model, xy, said.ids[:, :-1])
    scored = said.scored("p_last", n_eval)
    return Reference(said.ids[:, :-1], log_probabilities(run.logits), scored)


def open_hosts(model: TransformersModel, cells: Sequence[Cell], n_eval: int) -> Hosts:
    """What is grafted, what is said to XY, and how far the host is from saying it."""
    sources = fill_sources(model, cells, ("XY", "BY"))
    reference = read_reference(model, cells, sources, n_eval)
    host = force(model, Prefilled(*graft_spans(sources, host_with())), reference.forced)
    predicted = log_probabilities(host.logits)
    return Hosts(sources, reference, summed_kl(reference.clean, predicted, reference.scored))
