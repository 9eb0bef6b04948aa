"""Where do given answers lie along a direction? The projection of each of their tokens on v̂.

Answers are read back teacher-forced, under their question alone (no system prompt, as
`trait_steering` scores them). Percentiles of these projections are what capping takes its
thresholds from.
"""

from dataclasses import dataclass
from typing import Any

import torch
from nnsight import TransformersModel, save
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from persona_nns.declarations import FileName, Plan, Variable, content_digest
from persona_nns.figures import projection_percentiles
from persona_nns.prompts import render_chat, response_ids, stem_of
from persona_nns.tracing import Average, left_pad, normalised, stack_layers
from persona_nns.traits import TraitUnit, load_direction, read_responses

protocol_version = 1

variables = {
    "projection": Variable(
        "trait row layer token",
        "projection on v̂",
        description="Residual of each token of an answer times v̂ (0 where ‖v‖ = 0); NaN after its "
        "last.",
        every_layer=True,
    ),
    "n_tokens": Variable(
        "trait row", "tokens of the answer", units="token", description="How many.", kind="int"
    ),
}
figures = {"percentiles": projection_percentiles}


@dataclass(frozen=True, eq=False)
class Read(TraitUnit):
    """An answer that is read back.

    Attributes:
        number: of the row.
        prompt: token ids, no system prompt.
        response: token ids of the answer.
        vector: [n_layers + 1, d_model].
        most: tokens of the longest answer.
    """

    number: int
    prompt: tuple[int, ...]
    response: tuple[int, ...]
    vector: Tensor
    most: int

    @property
    def place(self) -> dict[str, Any]:
        """Where it stands in the result."""
        return {"trait": self.trait, "row": self.number}


def plan(
    tokenizer: PreTrainedTokenizerBase,
    *,
    model: str,
    vector: FileName,
    responses: FileName,
    vector_run: str | None = None,
    average: Average = "response_avg",
    trait: str | None = None,
) -> Plan:
    """Render the answers.

    Args:
        tokenizer: the model's.
        model: label of the model.
        vector: a file (.npy, .pt, .safetensors, .gguf), or a store with trait_vectors; a store's
            other directions by name: STORE#axis, STORE#component:0, STORE#TRAIT.
        responses: given answers (.jsonl, .jsonl.gz).
        vector_run: which run, where the store has several.
        average: which average of a store's vectors.
        trait: what the result is called; by default the stem of `responses`.
    """
    name = trait or stem_of(responses)
    direction = load_direction(vector, model, trait=name, average=average, run=vector_run).vectors
    rows = read_responses(responses)
    said = [response_ids(tokenizer, row.response) for row in rows]
    most = max(map(len, said))
    units = [
        Read(name, number, render_chat(tokenizer, row.question).ids, ids, direction, most)
        for number, (row, ids) in enumerate(zip(rows, said, strict=True))
    ]
    content = {"trait": name, "texts": [[row.question, row.response] for row in rows]}
    return Plan(
        name=name,
        units=units,
        axes={"trait": [name], "row": list(range(len(units))), "token": list(range(most))},
        unit_axes=("trait", "row"),
        content={**content, "vector": content_digest(direction.tolist())},
        token_ids={
            unit.label: {"prompt": unit.prompt, "response": unit.response} for unit in units
        },
        digest=content_digest(content),
        coords={
            "row_label": ("row", [row.label for row in rows]),
            "question_text": ("row", [row.question for row in rows]),
        },
        attrs={"vector_source": vector, "average": average},
        width=(direction.shape[0] - 1, direction.shape[1]),
        batch_size=10,
    )


def measure(model: TransformersModel, units: list[Read]) -> dict[str, Tensor]:
    """Read the answers back.

    Args:
        model: from `load_model`.
        units: answers.
    """
    direction = normalised(units[0].vector).to(model.device)
    padded = left_pad([(*unit.prompt, *unit.response) for unit in units], device=model.device)
    n_tokens = torch.tensor([len(unit.response) for unit in units])
    width = int(n_tokens.max())
    inputs = {**padded.tokens, "position_ids": padded.position_ids, "use_cache": False}
    with model.trace(inputs, logits_to_keep=1):
        streams = [block.input[:, -width:] for block in model.layers]
        streams.append(model.final_norm.output[:, -width:])
        read = save(
            [
                stream.float() @ unit.to(stream.device)
                for stream, unit in zip(streams, direction, strict=True)
            ]
        )
    at_end = stack_layers(read, dim=1).cpu()  # [row, layer, column], answers at the right
    projection = torch.full((len(units), len(direction), units[0].most), torch.nan)
    for row, count in enumerate(n_tokens.tolist()):
        projection[row, :, :count] = at_end[row, :, width - count :]
    return {"projection": projection, "n_tokens": n_tokens}
