"""What a patch takes from where, token by token and head by head, and how far it gets.

The passes that patch stand in `experiments/persona_patching.py`. A chunk of questions is run as
rows: every question as the clean persona is asked it, then as the corrupt one is, then, where the
two are one, with the control word.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from nnsight import TransformersModel, save
from torch import Tensor

from persona_nns.prompts.identities import Pair, align, shared_prefix
from persona_nns.tracing.attention import Look, attention_to, look_at, tell
from persona_nns.tracing.batches import similar_rows
from persona_nns.tracing.kv.cache import KVCache
from persona_nns.tracing.prefixes import prefill
from persona_nns.tracing.residuals import stack_layers, take
from persona_nns.tracing.sandbox import entry
from persona_nns.tracing.window import Window, open_ragged_window

PATCHED_POSITIONS = ("all", "identity")
# Tokens of a pass: a processor is fastest while they stay in its cache, an accelerator when busy.
_PASS_TOKENS = {"cpu": 3072}
_PASS_TOKENS_ELSEWHERE = 16384
# Bytes of the unpatched runs' activations that are held at a time.
_HELD_BYTES = 2**30
_RESAMPLES = 9999


@dataclass(frozen=True)
class PairRows:
    """The prompts of a pair, and which of their tokens take which place.

    Attributes:
        window: the columns from the first identity on.
        last: [row, 1], the column of the last prompt token.
        identity: [row, column], whether the token belongs to the identity.
        letters: [row, letter], token ids.
        source: [question, column], the column of the clean prompt that a token of the corrupt
            one takes its value from.
        patched: [position set, question, column], whether the token takes it.
    """

    window: Window
    last: Tensor
    identity: Tensor
    letters: Tensor
    source: Tensor
    patched: Tensor

    def common_columns(self) -> int:
        """First columns of the window in which a patch does the same in every question.

        What follows the identity is the same instruction before another question.
        """
        if self.window.clean is None or self.window.prefix is None:
            return 0
        n, source, patched = len(self.source), self.source, self.patched
        clean, corrupt = self.window.input_ids[: 2 * n].split(n)
        as_clean = (clean == clean[:1]).all(0).long().cumprod(0)
        same = (corrupt == corrupt[:1]).all(0) & (source == source[:1]).all(0)
        same &= (patched == patched[:, :1]).all(0).all(0) & as_clean[source[0]].bool()
        return int(same.long().cumprod(0)[: int(self.last[n : 2 * n].min())].sum())


@dataclass(frozen=True)
class Unpatched:
    """The runs of every row, and what patches take from them.

    Attributes:
        rows: what was run.
        mlp: of each block, [row, column, d_model], the MLP's output.
        attn: of each block, [row, column, d_model], the output projection's output.
        heads: of each block, [row, column, head × d_head], the output projection's input.
        logits: [row, letter], at the last prompt token.
        attention: [row, layer, head], from the last prompt token to the identity.
        attention_value: [row, layer, head], norm of what is written of it.
    """

    rows: PairRows
    mlp: list[Tensor]
    attn: list[Tensor]
    heads: list[Tensor]
    logits: Tensor
    attention: Tensor
    attention_value: Tensor

    def heads_at(self, layer: int, row: Tensor, columns: slice) -> Tensor:
        """What the output projection of a block is given, [row, column, head × d_head]."""
        heads = self.heads[layer]
        return heads[row.to(heads.device), columns]

    def results(self, layers: list[int]) -> dict[str, Tensor]:
        """What is stored of the runs in some layers, and the corrupt ones' logits."""
        n = len(self.rows.source)
        attention, control = self.attention[:n, layers], self.attention[2 * n :, layers]
        return {
            "logits": self.logits[:n],
            "logits_corrupt": self.logits[n : 2 * n],
            "attention": attention,
            "attention_value": self.attention_value[:n, layers],
            # Only a pair on the diagonal writes this one.
            "attention_control": control if len(control) else torch.full_like(attention, torch.nan),
        }


@dataclass(frozen=True)
class Patches:
    """Corrupt prompts, or some of them several times, that are run with a patch each.

    Attributes:
        window: what is run of them.
        columns: the same, among the columns of `PairRows`.
        last, identity, letters: as of `PairRows`, in this window.
        where: [row, column, 1 or feature], what is patched.
        value: [row, column, feature], with what.
    """

    window: Window
    columns: slice
    last: Tensor
    identity: Tensor
    letters: Tensor
    where: Tensor
    value: Tensor


def chunk_questions(model: TransformersModel, pair: Pair) -> Iterator[list[int]]:
    """Questions of similar length, as many as the activations of their runs may take."""
    both = zip(pair.asked_clean, pair.asked_corrupt, strict=True)
    config = model.config.get_text_config()
    per_token = 4 * config.num_hidden_layers * config.hidden_size * model.dtype.itemsize
    lengths = [max(len(clean.ids), len(corrupt.ids)) for clean, corrupt in both]
    return similar_rows(lengths, most_tokens=_HELD_BYTES // (3 * per_token))


def open_pair(model: TransformersModel, pair: Pair, *, reuse: bool) -> PairRows:
    """The prompts of a pair as rows behind the prefix that they share.

    Args:
        model: from `load_model`; it runs the prefix.
        pair: with the questions that are asked at a time.
        reuse: False runs nothing: the rows are whole.
    """
    rows, device = pair.rows, model.device
    n_shared = shared_prefix(rows)
    prefix = prefill(model, [row.ids[:n_shared] for row in rows], reuse=reuse)
    window = open_ragged_window([row.ids for row in rows], prefix, device=device)
    start, width = window.start, window.input_ids.shape[1]
    column = torch.arange(width, device=device) + start
    spans = torch.tensor([[row.identity.start, row.identity.stop] for row in rows], device=device)
    identity = (column >= spans[:, :1]) & (column < spans[:, 1:])

    both = zip(pair.asked_clean, pair.asked_corrupt, strict=True)
    aligned = [align(clean, corrupt)[start:] for clean, corrupt in both]
    partner = torch.tensor([[*row, *[-1] * (width - len(row))] for row in aligned]).to(device)
    has_one = partner >= start
    n = len(aligned)
    return PairRows(
        window=window,
        last=torch.tensor([[len(row.ids) - 1 - start] for row in rows], device=device),
        identity=identity,
        letters=torch.tensor([row.letters for row in rows], device=device),
        source=(partner - start).clamp(min=0),
        patched=torch.stack([has_one, has_one & identity[n : 2 * n]]),
    )


def run_unpatched(model: TransformersModel, pair: Pair, *, reuse: bool) -> Unpatched:
    """Run every prompt as it is, and keep what its components put out."""
    rows = open_pair(model, pair, reuse=reuse)
    told = tell(model, rows.window)
    entering, heads, attn, looks, mlp = [], [], [], [], []
    with model.trace(rows.window.inputs(cached=True)):
        for layer, block in enumerate(model.layers):
            entering.append(entry(model, layer).output)
            look, mixed, put_out = look_at(block.attn, rows.last, told[layer])
            looks.append(look)
            heads.append(mixed)
            attn.append(put_out)
            mlp.append(block.mlp.output)
        model.lm_head.input = take(model.lm_head.input, rows.last)
        logits = save(model.output.logits[:, -1].gather(1, rows.letters).float())
        looked, written = read_looks(model.layers, looks, model.output, rows.identity)
        save((entering, heads, attn, mlp))
        attention = save(stack_layers(looked, dim=1))
        attention_value = save(stack_layers(written, dim=1))
    clean = stack_layers(entering) if reuse else None
    rows = replace(rows, window=replace(rows.window, clean=clean))
    return Unpatched(rows, mlp, attn, heads, logits, attention, attention_value)


def open_patches(
    run: Unpatched,
    outputs: Tensor,
    layer: int,
    position_set: Tensor | int,
    question: Tensor,
    head: Tensor | None = None,
    *,
    width: int | None = None,
    behind: KVCache | None = None,
) -> Patches:
    """Corrupt prompts that are run from a layer on, each with a patch of its own.

    Args:
        run: the unpatched runs.
        outputs: [row, column, feature], what the patched component puts out in them.
        layer: where the pass resumes.
        position_set: [row], which tokens are patched.
        question: [row], whose prompt it is.
        head: [row], whose share of the features is patched; all of them by default.
        width: columns that are run; by default up to the last prompt token.
        behind: of each row, the prefix and first columns, where they have been run.
    """
    rows, corrupt = run.rows, len(run.rows.source) + question
    last = rows.last[corrupt]
    width = width or int(last.max()) + 1
    window = rows.window.rows(corrupt, layer, width)
    if behind is not None:
        window = window.behind(behind)
    columns = slice(window.start - rows.window.start, width)
    where = rows.patched[position_set, question][:, columns, None].to(outputs.device)
    if head is not None:
        feature = torch.arange(outputs.shape[-1], device=outputs.device)
        head_of = feature // (outputs.shape[-1] // run.attention.shape[-1])
        where = where & (head_of == head[:, None].to(head_of.device))[:, None]
    return Patches(
        window=window,
        columns=columns,
        last=last - columns.start,
        identity=rows.identity[corrupt, columns],
        letters=rows.letters[corrupt],
        where=where,
        value=take(outputs[question.to(outputs.device)], rows.source[question, columns]),
    )


def cut_passes(run: Unpatched, n_first: int, n_second: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Every pair of two indices, cut into passes of a bounded number of tokens."""
    device, width = run.rows.last.device, run.rows.window.input_ids.shape[1]
    size = max(1, _PASS_TOKENS.get(device.type, _PASS_TOKENS_ELSEWHERE) // width)
    pairs = torch.cartesian_prod(torch.arange(n_first), torch.arange(n_second)).to(device)
    size = math.ceil(len(pairs) / math.ceil(len(pairs) / size))
    for some in pairs.split(size):
        yield some[:, 0], some[:, 1]


def read_looks(
    blocks: Sequence[Any], looks: Sequence[Look], output: Any, identity: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Inside a trace: what the last prompt token takes from the identity, [row, head] by block.

    Args:
        blocks: the last ones of the model.
        looks: at their attention.
        output: of the model; its cache is read.
        identity: [row, column of the window].

    Returns:
        The sum of its weights, and the norm of what its head writes of the values.
    """
    cached: Any = output.past_key_values.layers
    cached = cached[len(cached) - len(blocks) :]
    each = zip(blocks, looks, cached, strict=True)
    weights = [attention_to(block.attn, look, held, identity) for block, look, held in each]
    return [of.float().sum(-1) for of in weights], written_by_heads(blocks, weights, cached)


def written_by_heads(
    blocks: Sequence[Any], weights: Sequence[Tensor], cached: Sequence[Any]
) -> list[Tensor]:
    """Inside a trace: norm of what each head writes of weighted values, of each block [row, head].

    Args:
        blocks: of the model.
        weights: of each block, [row, head, column of the window], attention of one token.
        cached: of each block, its layer of the cache; a group of heads shares one's values.
    """
    norms: list[Tensor] = []
    for block, weight, held in zip(blocks, weights, cached, strict=True):
        n_heads, n_window = weight.shape[1:]
        values = held.values[:, :, -n_window:]
        values = values.repeat_interleave(n_heads // values.shape[1], dim=1)
        mixed = (weight[..., None] * values).sum(2)
        own = torch.eye(n_heads, device=mixed.device, dtype=mixed.dtype)
        # Of each head, an input of the projection that is zero elsewhere: [row, head, feature].
        apart = (own[:, :, None] * mixed[:, :, None]).flatten(2)
        nothing = block.attn.o_proj(torch.zeros_like(apart[:1, :1]))
        norms.append((block.attn.o_proj(apart) - nothing).float().norm(dim=-1))
    return norms


def join_chunks(
    chunks: Sequence[Sequence[int]], measured: Sequence[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """What was measured of some questions at a time, for all questions in order; on the CPU."""
    in_order = torch.tensor([question for chunk in chunks for question in chunk]).argsort()
    return {
        name: torch.cat([part[name] for part in measured]).cpu()[in_order] for name in measured[0]
    }


def compare_answers(
    results: Mapping[str, Tensor], pair: Pair, threshold: float
) -> dict[str, Tensor]:
    """What follows from the letters' logits: recovery, and how the clean persona answers.

    Recovery is how much of the way from the corrupt to the clean answer a patch goes. It is NaN
    on the diagonal, and where the two differ by less than the threshold.

    Args:
        results: of every question, clean, corrupt and patched (heads too, where they were).
        pair: whose they are.
        threshold: in logits.
    """
    answer = torch.tensor([asked.answer for asked in pair.asked_clean])
    clean, corrupt = (logit_difference(results[k], answer) for k in ("logits", "logits_corrupt"))
    gap, of_heads = clean - corrupt, "head_logits_patched"
    defined = (gap.abs() >= threshold) & (not pair.is_diagonal)

    def recovery(patched: str) -> Tensor:  # [question, …]
        difference = logit_difference(results[patched], answer)
        share = (difference.movedim(0, -1) - corrupt) / gap
        return torch.where(defined, share, torch.nan).movedim(-1, 0)

    correct = (results["logits"].argmax(-1) == answer).float()
    return {
        "recovery": recovery("logits_patched"),
        **({"head_recovery": recovery(of_heads)} if of_heads in results else {}),
        "ld": clean,
        "accuracy": correct.mean(),
        # Of a persona, not of a pair: the others' is not stored.
        "accuracy_interval": _bootstrap(correct) if pair.is_diagonal else torch.zeros(2),
        "identity_tokens": torch.tensor(len(pair.asked_clean[0].identity)),
    }


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


def _bootstrap(correct: Tensor) -> Tensor:
    """95 % percentile-bootstrap interval of a mean over questions, [low, high].

    Answers are right or wrong, so that a resample's number of right ones is binomial.
    """
    generator = torch.Generator().manual_seed(0)
    count = torch.full((_RESAMPLES,), float(len(correct)))
    drawn = torch.binomial(count, correct.mean().expand(_RESAMPLES), generator=generator)
    return (drawn / len(correct)).quantile(torch.tensor([0.025, 0.975]))
