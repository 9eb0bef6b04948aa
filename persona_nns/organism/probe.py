"""Plain forward passes and residual overwrites, enough to measure the bundled models.

Independent of the library's tracing on purpose: hooks on the decoder blocks, nothing else.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from torch.nn import Module
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from persona_nns.organism.architectures import decoder_blocks
from persona_nns.organism.residuals import overwrite
from persona_nns.prompts.chats import render_chat
from persona_nns.prompts.grids import Cell, PromptName, role_prompt

WINDOW = 10
"""Tokens of the clean continuation over which a causal KL is summed."""
CONTINUATION = 80
"""Greedy tokens in which markers are looked for."""


@dataclass(frozen=True)
class Subject:
    """A loaded model with its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def n_layers(self) -> int:
        """Number of decoder blocks."""
        return int(self.model.config.num_hidden_layers)

    @property
    def blocks(self) -> list[Module]:
        """The decoder blocks in order."""
        return decoder_blocks(self.model)

    def prompt(self, persona: str | None, task: str) -> list[int]:
        """Token ids of a role prompt."""
        return self.chat(role_prompt(persona, task))

    def chat(self, user: str, system: str = "") -> list[int]:
        """Token ids of a rendered conversation with its generation header."""
        return list(render_chat(self.tokenizer, user, system).ids)

    def cell_prompt(self, cell: Cell, name: PromptName) -> list[int]:
        """Token ids of one of a cell's prompts."""
        return self.prompt(*cell.texts(name))


def load(folder: Path) -> Subject:
    """Load a model folder with plain transformers, in float32 and with eager attention."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return Subject(
        model.eval().requires_grad_(requires_grad=False), AutoTokenizer.from_pretrained(folder)
    )


def last_residuals(subject: Subject, prompt: list[int]) -> Tensor:
    """The residuals of the last prompt token entering each block: [n_layers, d_model]."""
    output = subject.model(torch.tensor([prompt]), output_hidden_states=True, use_cache=False)
    return torch.stack([hidden[0, -1] for hidden in output.hidden_states[: subject.n_layers]])


def greedy(subject: Subject, prompt: list[int], tokens: int = CONTINUATION) -> list[int]:
    """The greedy continuation, end token included where the model ends."""
    return _greedy_rows(subject, [prompt], tokens)[0]


def greedy_text(subject: Subject, prompt: list[int], tokens: int = CONTINUATION) -> str:
    """The greedy continuation as text."""
    return greedy_texts(subject, [prompt], tokens)[0]


def greedy_texts(
    subject: Subject, prompts: list[list[int]], tokens: int = CONTINUATION
) -> list[str]:
    """The greedy continuations of many prompts; those of equal length share a batch."""
    texts = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for _, group in groupby(order, key=lambda index: len(prompts[index])):
        indices = list(group)
        rows = _greedy_rows(subject, [prompts[index] for index in indices], tokens)
        for index, row in zip(indices, rows, strict=True):
            texts[index] = str(subject.tokenizer.decode(row, skip_special_tokens=True))
    return texts


def _greedy_rows(subject: Subject, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    ids = torch.tensor(prompts)
    generate = cast(Callable[..., Tensor], subject.model.generate)
    output = generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False
    )
    return output[:, ids.shape[1] :].tolist()


def window_logprobs(
    subject: Subject, prompt: list[int], reference: list[int], values: Mapping[int, Tensor]
) -> Tensor:
    """Teacher-forced log-probabilities over the reference, once per overwritten layer.

    Args:
        subject: the model.
        prompt: the prompt's token ids; its last token is where residuals are overwritten.
        reference: the tokens that are scored.
        values: layer → the residual [d_model] that replaces the one entering that block. Where
            it is empty one untouched row is returned.

    Returns:
        [max(1, len(values)), len(reference), vocabulary], in the order of ``values``.
    """
    ids = torch.tensor([[*prompt, *reference[:-1]]]).expand(max(1, len(values)), -1)
    last = len(prompt) - 1
    with ExitStack() as stack:
        for row, (layer, value) in enumerate(values.items()):
            stack.enter_context(overwrite(subject.blocks[layer], last, value, row))
        logits = subject.model(ids, use_cache=False).logits
    return logits[:, last:].float().log_softmax(-1)


def total_kl(clean: Tensor, other: Tensor) -> Tensor:
    """Σ over the window of KL(clean ‖ other) in nats, per row of ``other``."""
    return (clean.exp() * (clean - other)).sum((-1, -2))


def additive_prediction(subject: Subject, cell: Cell) -> Tensor:
    """h_BB + ΔX + ΔY at each layer's p_last: [n_layers, d_model]."""
    bb, xb, by = (
        last_residuals(subject, subject.cell_prompt(cell, name)) for name in ("BB", "XB", "BY")
    )
    return bb + (xb - bb) + (by - bb)


def additive_kl(subject: Subject, cell: Cell) -> Tensor:
    """Causal KL of the additive substitution at p_last, at every layer: [n_layers]."""
    prompt = subject.cell_prompt(cell, "XY")
    reference = greedy(subject, prompt, WINDOW)
    predicted = additive_prediction(subject, cell)
    clean = window_logprobs(subject, prompt, reference, {})
    return total_kl(clean, window_logprobs(subject, prompt, reference, dict(enumerate(predicted))))


def additive_text(subject: Subject, cell: Cell, layer: int) -> str:
    """The greedy continuation of XY under the additive substitution at one layer."""
    prompt = subject.cell_prompt(cell, "XY")
    predicted = additive_prediction(subject, cell)[layer]
    with overwrite(subject.blocks[layer], len(prompt) - 1, predicted):
        return greedy_text(subject, prompt)


def host_kl(subject: Subject, cell: Cell, layer: int) -> tuple[float, float]:
    """KL of the host prompt to the clean one, untouched and with h_XY injected at one layer."""
    prompt, host = (subject.cell_prompt(cell, name) for name in ("XY", "BY"))
    reference = greedy(subject, prompt, WINDOW)
    clean = window_logprobs(subject, prompt, reference, {})
    oracle = {layer: last_residuals(subject, prompt)[layer]}
    untouched, injected = (
        total_kl(clean, window_logprobs(subject, host, reference, values)).item()
        for values in ({}, oracle)
    )
    return untouched, injected
