"""Does the persona drift? Projections of every turn of a conversation on directions.

A conversation is read back in the model's chat template, in one pass. Of each turn, system and
user too: the mean over its tokens of the residual's projection on a direction, at every layer. The
direction is an Assistant axis, a trait's vector, or any other ("The Assistant Axis", arXiv
2601.10387). With a script, the model answers what the user says turn after turn, greedily and under
an operation in the window of each answer; what was said is then read back without it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from nnsight import TransformersModel, save
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from persona_nns.declarations import Count, FileName, Plan, Variable, content_digest
from persona_nns.errors import UsageError
from persona_nns.figures import drift_curves
from persona_nns.prompts import (
    RenderedChat,
    Talk,
    domains_of,
    read_said,
    render_each,
    render_turns,
    stem_of,
    takes_system_role,
)
from persona_nns.tracing import (
    Acts,
    Continuation,
    Held,
    Opened,
    Operation,
    OperationName,
    converse,
    entry,
    left_pad,
    normalised,
    similar_rows,
    stack_layers,
    turn_projections,
    turn_weights,
    until_end_of_text,
)
from persona_nns.traits import load_direction

protocol_version = 1
defaults = {"layers": "0.55"}

_TURN = "conversation turn"
variables = {
    "projection": Variable(
        f"{_TURN} layer direction",
        "projection on the direction",
        description="Mean over the turn's tokens of the residual times d̂ (0 where ‖d‖ = 0), not "
        "centred, in a pass without any operation; NaN where the turn has no tokens.",
        every_layer=True,
    ),
    "n_tokens": Variable(
        _TURN,
        "tokens of the turn",
        units="token",
        description="Content tokens, without the template's; NaN behind the last turn.",
        kind="int",
        unmeasured=-1,
    ),
    "speaker": Variable(
        _TURN,
        "speaker",
        description="system, user or assistant; empty behind the last turn.",
        kind="text",
    ),
    "text": Variable(_TURN, "text", description="What was said.", kind="text"),
}
figures = {"drift": drift_curves}


@dataclass(frozen=True, eq=False)
class Drifting(Talk):
    """A conversation, or the script of one that the model takes part in.

    Attributes:
        directions: d̂ [direction, n_layers + 1, d_model], each row of norm one, or zero.
        operation: what is done while the model answers.
    """

    directions: Tensor
    operation: Operation


def plan(
    tokenizer: PreTrainedTokenizerBase,
    *,
    model: str,
    direction: list[FileName],
    conversations: FileName | None = None,
    script: FileName | None = None,
    operation: OperationName = "none",
    vector: FileName | None = None,
    alpha: float = 1.0,
    tau: float | None = None,
) -> Plan:
    """Render the conversations, or the scripts.

    Args:
        tokenizer: the model's.
        model: label of the model.
        direction: a file (.npy, .pt, .safetensors, .gguf), or a store's (STORE#axis,
            STORE#component:1, STORE#TRAIT); repeatable.
        conversations: a .jsonl file, or a folder of .json files; messages with role and content.
        script: a .jsonl file of user's turns that the model answers instead.
        operation: none, add or cap, in the window of each answer of a script, at the layers asked
            for, at all of them at once.
        vector: what is added or capped; by default the first direction.
        alpha: how much of the vector is added.
        tau: the projection above which it is capped.
    """
    said = read_said(conversations, script)
    _check_operation(operation, script, tau)
    found = {each.name: each.vectors for each in (load_direction(of, model) for of in direction)}
    whole = next(iter(found.values())) if vector is None else load_direction(vector, model).vectors
    _check_directions(direction, [*found.values(), whole])
    amount = tau if operation == "cap" and tau is not None else alpha
    content = {
        "said": [[each.id, each.messages] for each in said],
        "directions": {name: content_digest(of.tolist()) for name, of in found.items()},
        "operation": [operation, amount, content_digest(whole.tolist())]
        if operation != "none"
        else ["none"],
    }
    directions = normalised(torch.stack(list(found.values())))
    chats = render_each(tokenizer, said)
    n_turns = max(len(chat.turns) for chat in chats)
    units = [
        Drifting(
            each.id,
            each.turns,
            chat,
            n_turns,
            directions,
            Operation(operation, whole, amount),
        )
        for each, chat in zip(said, chats, strict=True)
    ]
    return Plan(
        name=stem_of(str(conversations or script)),
        units=units,
        axes={
            "conversation": [each.id for each in said],
            "turn": list(range(n_turns)),
            "direction": list(found),
        },
        unit_axes=("conversation",),
        content=content,
        token_ids={each.id: {"chat": chat.ids} for each, chat in zip(said, chats, strict=True)},
        digest=content_digest(content),
        coords=domains_of(said),
        attrs={
            "directions": list(direction),
            "operation": operation,
            "system_role": takes_system_role(tokenizer),
        },
        batch_size=8,
        variables=[name for name in variables if name != "text" or script is not None],
        width=(whole.shape[0] - 1, whole.shape[1]),
    )


def _check_operation(operation: str, script: str | None, tau: float | None) -> None:
    """See that the options of an operation go together.

    Raises:
        UsageError: they do not.
    """
    if operation != "none" and script is None:
        raise UsageError(
            f"The operation {operation!r} acts while the model answers; give it a --script, or "
            "leave out --operation."
        )
    if (operation == "cap") != (tau is not None):
        raise UsageError("The operation 'cap' needs a threshold, and no other has one (--tau).")


def _check_directions(sources: Sequence[str], vectors: Sequence[Tensor]) -> None:
    """See that all directions have a name of their own, and one shape.

    Raises:
        UsageError: they have not.
    """
    if len(vectors) <= len(sources):
        raise UsageError(
            f"Two of the directions {', '.join(sources)} have the same name; rename one."
        )
    shapes = [list(each.shape) for each in vectors]
    if any(shape != shapes[0] for shape in shapes):
        raise UsageError(
            f"The directions are of the shapes {', '.join(map(str, shapes))}; they have to be of "
            "one shape, [n_layers + 1, d_model]."
        )


def measure(
    model: TransformersModel,
    units: list[Drifting],
    *,
    layers: list[int],
    max_new_tokens: Count = 256,
    reuse: bool = True,
) -> dict[str, Any]:
    """Let the model answer, where there is a script, and read the conversations back.

    Args:
        model: from `load_model`.
        units: conversations or scripts.
        layers: where the operation acts while the model answers.
        max_new_tokens: the longest answer.
        reuse: keep keys and values from token to token and from turn to turn.
    """
    first, chats, texts = units[0], [unit.chat for unit in units], None
    if first.asked:
        operation = replace(first.operation, layers=tuple(layers))
        say = partial(answer, model, operation, max_new_tokens)
        acts = Acts(earlier=True, now=True)
        talks = converse(model, [unit.asked for unit in units], say, acts, reuse=reuse)
        chats = [render_turns(model.tokenizer, talk) for talk in talks]
        texts = [[text for _, text in talk] for talk in talks]
    ends = [first.n_turns - len(chat.turns) for chat in chats]
    measured: dict[str, Any] = {
        "projection": project_turns(model, chats, first.directions, first.n_turns),
        "n_tokens": [
            [*map(len, chat.turns), *[-1] * end] for chat, end in zip(chats, ends, strict=True)
        ],
        "speaker": [[*chat.speakers, *[""] * end] for chat, end in zip(chats, ends, strict=True)],
    }
    if texts is None:
        return measured
    said = [[*of_talk, *[""] * end] for of_talk, end in zip(texts, ends, strict=True)]
    return {**measured, "text": said}


def answer(
    model: TransformersModel,
    operation: Operation,
    max_new_tokens: int,
    opened: Opened,
) -> tuple[Continuation, Held | None]:
    """What the model says to conversations, greedily, while an operation acts."""
    with until_end_of_text(), model.generate(**opened.settings(max_new_tokens)) as tracer:
        with tracer.invoke(opened.batch.tokens):
            for step in tracer.iter[:]:
                marks = opened.acting(step)
                for layer in operation.layers:
                    site = entry(model, layer)
                    site.output = operation(site.output, layer, marks)
        with tracer.invoke():
            result = save(tracer.result)
    return opened.read(model, result.sequences, result.past_key_values, max_new_tokens)


def project_turns(
    model: TransformersModel, chats: Sequence[RenderedChat], directions: Tensor, n_turns: int
) -> Tensor:
    """Mean projections over the tokens of each turn, [conversation, turn, layer, direction].

    Args:
        model: from `load_model`.
        chats: rendered conversations.
        directions: d̂ [direction, layer, d_model].
        n_turns: turns that the result has places for.
    """
    directions = directions.to(model.device)
    shape = (len(chats), n_turns, directions.shape[1], directions.shape[0])
    projections = torch.empty(shape)
    for rows in similar_rows([len(chat.ids) for chat in chats]):
        batch = left_pad([chats[row].ids for row in rows], device=model.device)
        weights = turn_weights(batch, [chats[row].turns for row in rows], n_turns)
        inputs = {**batch.tokens, "position_ids": batch.position_ids, "use_cache": False}
        with model.trace(inputs, logits_to_keep=1):
            read = save(
                [
                    turn_projections(block.input, directions[:, layer], weights)
                    for layer, block in enumerate(model.layers)
                ]
                + [turn_projections(model.final_norm.output, directions[:, -1], weights)]
            )
        projections[rows] = stack_layers(read, dim=2).cpu()
    return projections
