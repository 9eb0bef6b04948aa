"""What a patch takes from where: the runs that are patched, token by token and head by head.

Everything here is tensors of indices and masks; the passes that use them stand in
`experiments/persona_patching.py`.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from nnsight import TransformersModel
from torch import Tensor

from persona_nns.prompts.identities import Asked, Pair, align
from persona_nns.tracing.residuals import take
from persona_nns.tracing.window import Window

POSITION_SETS = ("all", "identity")
# Tokens of a pass: a processor is fastest while they stay in its cache, an accelerator when busy.
_PASS_TOKENS = {"cpu": 3072}
_PASS_TOKENS_ELSEWHERE = 16384
# Bytes of the unpatched runs' activations that are held at a time.
_HELD_BYTES = 2**30


@dataclass(frozen=True)
class Unpatched:
    """The runs of every row of a chunk, and what patches take from them.

    Attributes:
        window: the columns from the first identity on.
        last: [row, 1], the column of the last prompt token.
        identity: [row, column], whether the token belongs to the identity.
        letters: [row, letter], token ids.
        mlp: of each block, [row, column, d_model], the MLP's output.
        attn: of each block, [row, column, d_model], the output projection's output.
        heads: of each block, [row, column, head × d_head], the output projection's input.
        logits: [row, letter], at the last prompt token.
        attention: [row, layer, head], from the last prompt token to the identity.
        attention_value: [row, layer, head], norm of what is written of it.
    """

    window: Window
    last: Tensor
    identity: Tensor
    letters: Tensor
    mlp: list[Tensor]
    attn: list[Tensor]
    heads: list[Tensor]
    logits: Tensor
    attention: Tensor
    attention_value: Tensor


def logit_difference(logits: Tensor, answer: Tensor) -> Tensor:
    """Logit of the right letter minus the mean of the others.

    Args:
        logits: [question, …, letter].
        answer: [question], the right letter.

    Returns:
        [question, …].
    """
    right = torch.nn.functional.one_hot(answer, logits.shape[-1]).bool()
    right = right.view(len(answer), *[1] * (logits.dim() - 2), -1)
    others = torch.where(right, 0.0, logits).sum(-1) / (logits.shape[-1] - 1)
    return torch.where(right, logits, 0.0).sum(-1) - others


def partners(
    run: Unpatched, clean: Sequence[Asked], corrupt: Sequence[Asked]
) -> tuple[Tensor, Tensor]:
    """Where each token of the corrupt prompts takes its value from, and which tokens do.

    Returns:
        [question, column], columns of the clean row; [position set, question, column], whether
        the token is patched.
    """
    start, width = run.window.start, run.window.input_ids.shape[1]
    aligned = [align(a, b)[start:] for a, b in zip(clean, corrupt, strict=True)]
    token = torch.tensor([[*row, *[-1] * (width - len(row))] for row in aligned])
    column = token.to(run.last.device) - start
    n = len(clean)
    patched = torch.stack([column >= 0, (column >= 0) & run.identity[n : 2 * n]])
    return column.clamp(min=0), patched


def common_columns(run: Unpatched, source: Tensor, patched: Tensor) -> int:
    """First columns of the window in which a patch does the same in every question.

    What follows the identity is the same instruction before another question.
    """
    if run.window.clean is None or run.window.prefix is None:
        return 0
    n = len(source)
    clean, corrupt = run.window.input_ids[: 2 * n].split(n)
    as_clean = (clean == clean[:1]).all(0).long().cumprod(0)
    same = (corrupt == corrupt[:1]).all(0) & (source == source[:1]).all(0)
    same &= (patched == patched[:, :1]).all(0).all(0) & as_clean[source[0]].bool()
    return int(same.long().cumprod(0)[: int(run.last[n : 2 * n].min())].sum())


def head_patch(
    run: Unpatched,
    source: Tensor,
    patched: Tensor,
    layer: int,
    row: tuple[Tensor | int, Tensor, Tensor],
    columns: slice,
) -> tuple[Tensor, Tensor]:
    """Where heads are patched, [row, column, head × d_head], and with what.

    A row is a position set, a question and a head.
    """
    s, q, h = row
    outputs = run.heads[layer]
    features = torch.arange(outputs.shape[-1], device=outputs.device)
    head_of = features // (outputs.shape[-1] // run.attention.shape[-1])
    where = patched[s, q][:, columns, None] & (head_of == h[:, None])[:, None]
    return where, take(outputs[q], source[q, columns])


def attention_to(probabilities: Tensor, last: Tensor, identity: Tensor) -> Tensor:
    """Attention of the last prompt token to the columns of the identity, [row, head, column].

    Args:
        probabilities: [row, head, column of the window, column].
        last: [row, 1], column of the window.
        identity: [row, column of the window].
    """
    n_window = identity.shape[1]
    query = last[:, :, None, None].expand(-1, probabilities.shape[1], 1, n_window)
    return probabilities[..., -n_window:].gather(2, query)[:, :, 0] * identity[:, None]


def heads_apart(weights: Tensor, values: Tensor) -> Tensor:
    """Each head's weighted values as inputs of the output projection that are zero elsewhere.

    Args:
        weights: [row, head, column].
        values: [row, kv_head, column, d_head]; a group of heads shares one.

    Returns:
        [row, head, head × d_head].
    """
    n_heads = weights.shape[1]
    values = values.repeat_interleave(n_heads // values.shape[1], dim=1)
    mixed = (weights[..., None] * values).sum(2)
    own = torch.eye(n_heads, device=mixed.device, dtype=mixed.dtype)
    return (own[:, :, None] * mixed[:, :, None]).flatten(2)


def chunk_questions(model: TransformersModel, pair: Pair) -> Iterator[list[int]]:
    """Questions of similar length, as many as the activations of their runs may take."""
    lengths = [
        max(len(asked[k].ids) for asked in (pair.asked_clean, pair.asked_corrupt))
        for k in range(len(pair.asked_clean))
    ]
    config = model.config.get_text_config()
    per_token = 4 * config.num_hidden_layers * config.hidden_size * model.dtype.itemsize
    chunk: list[int] = []
    for question in sorted(range(len(lengths)), key=lambda k: lengths[k]):
        if chunk and 3 * (len(chunk) + 1) * lengths[question] * per_token > _HELD_BYTES:
            yield chunk
            chunk = []
        chunk.append(question)
    yield chunk


def head_passes(run: Unpatched, n: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Every head in every of ``n`` questions, one position set at a time: set, questions, heads."""
    rows = [(q, h) for q in range(n) for h in range(run.attention.shape[-1])]
    for s in range(len(POSITION_SETS)):
        for q, h in cut_passes(rows, run):
            yield s, q, h


def cut_passes(rows: Sequence[tuple[int, ...]], run: Unpatched) -> Iterator[Tensor]:
    """Cut patches into passes of a bounded number of tokens; each as its columns, [field, row]."""
    tokens = _PASS_TOKENS.get(run.last.device.type, _PASS_TOKENS_ELSEWHERE)
    size = max(1, tokens // run.window.input_ids.shape[1])
    size = math.ceil(len(rows) / math.ceil(len(rows) / size))
    for first in range(0, len(rows), size):
        yield torch.tensor(rows[first : first + size], device=run.last.device).T
