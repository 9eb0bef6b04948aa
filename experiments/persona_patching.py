"""Where does a persona reach the answer? De-noising patching of MLPs, attention and heads.

Multiple-choice questions are asked as personas that differ in the identity alone ("a bad
student", "a red student"). In the run of one persona, the corrupt one, the output of a component
is replaced by what it is in the run of another, the clean one, on the same question; all that
follows is computed anew. How much of the way from the corrupt to the clean answer does that go?
And which heads look at the identity, before and after?
"""

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from nnsight import TransformersModel, save
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from persona_nns.declarations import Plan, Variable, content_digest
from persona_nns.figures import (
    accuracy_by_persona,
    attention_before_and_after,
    head_ranking,
    recovery_by_head,
    recovery_by_pair,
)
from persona_nns.prompts import (
    BUNDLED,
    LETTERS,
    PERSONA,
    Asked,
    Pair,
    ask,
    check_persona,
    load_identities,
    load_questions,
    name_questions,
    shared_prefix,
)
from persona_nns.tracing import (
    POSITION_SETS,
    KVCache,
    Unpatched,
    Window,
    attention_to,
    chunk_questions,
    common_columns,
    cut_passes,
    head_passes,
    head_patch,
    heads_apart,
    logit_difference,
    open_ragged_window,
    partners,
    prefill,
    take,
)

protocol_version = 3

COMPONENTS = ("mlp", "attn")
_RESAMPLES = 9999

_PAIR = "clean_persona corrupt_persona question"
_LETTER = {"letter": LETTERS}
_SET = {"position_set": POSITION_SETS}
_PATCH = {"component": COMPONENTS, **_SET}
_HEAD = {"head": lambda record, _: range(record.n_heads)}
_ATTENTION = {
    "attention_layer": lambda record, _: range(record.n_layers),
    "attention_head": lambda record, _: range(record.n_heads),
}

variables = {
    "recovery": Variable(
        f"{_PAIR} component layer position_set",
        "recovery",
        description="(LD_patched − LD_corrupt) / (LD_clean − LD_corrupt) with the clean output of "
        "one component of a block in the corrupt run; NaN on the diagonal and where the two runs "
        "differ by less than the threshold.",
        coords=_PATCH,
    ),
    "head_recovery": Variable(
        f"{_PAIR} layer head position_set",
        "recovery",
        description="As recovery, with the clean output of one attention head: its slice of the "
        "input of the output projection.",
        coords={**_HEAD, **_SET},
    ),
    "accuracy": Variable(
        "persona",
        "accuracy",
        description="Share of the questions whose right letter has the highest logit of the four.",
    ),
    "accuracy_interval": Variable(
        "persona bound",
        "accuracy, 95 % interval",
        description="Percentile bootstrap over questions.",
        coords={"bound": ("low", "high")},
    ),
    "ld": Variable(
        "persona question",
        "logit difference",
        units="logit",
        description="Logit of the right letter minus the mean of the three others.",
    ),
    "logits": Variable(
        "persona question letter",
        "logit",
        units="logit",
        description="Logit of each letter at the last prompt token, unpatched.",
        coords=_LETTER,
    ),
    "logits_patched": Variable(
        f"{_PAIR} component layer position_set letter",
        "logit, patched",
        units="logit",
        description="Logit of each letter with one component of a block patched; of a persona "
        "with itself, as unpatched.",
        coords={**_PATCH, **_LETTER},
    ),
    "head_logits_patched": Variable(
        f"{_PAIR} layer head position_set letter",
        "logit, patched",
        units="logit",
        description="Logit of each letter with one head patched.",
        coords={**_HEAD, **_SET, **_LETTER},
    ),
    "attention": Variable(
        "persona question layer head",
        "attention to the identity",
        description="Attention of the last prompt token, summed over the identity's tokens.",
        coords=_HEAD,
    ),
    "attention_value": Variable(
        "persona question layer head",
        "value-weighted attention to the identity",
        description="Norm of what the head writes of the identity's tokens at the last prompt "
        "token: Σ attention × value through the head's share of the output projection.",
        coords=_HEAD,
    ),
    "attention_control": Variable(
        "persona question layer head",
        "attention to the control word",
        description="As attention, with the control word in the identity's slot; the same for "
        "every persona.",
        coords=_HEAD,
    ),
    "attention_patched": Variable(
        f"{_PAIR} component layer position_set attention_layer attention_head",
        "attention to the identity, patched",
        description="As attention, over the corrupt prompt's identity tokens, with one component "
        "of a block patched.",
        coords={**_PATCH, **_ATTENTION},
    ),
    "attention_value_patched": Variable(
        f"{_PAIR} component layer position_set attention_layer attention_head",
        "value-weighted attention to the identity, patched",
        description="As attention_value, over the corrupt prompt's identity tokens, with one "
        "component of a block patched.",
        coords={**_PATCH, **_ATTENTION},
    ),
    "identity_tokens": Variable(
        "persona",
        "tokens of the identity",
        units="token",
        description="Tokens whose first non-space character lies in the identity (of the first "
        "question's prompt).",
        kind="int",
    ),
}

figures = {
    "recovery_all": lambda ds: recovery_by_pair(ds, "all"),
    "recovery_identity": lambda ds: recovery_by_pair(ds, "identity"),
    "heads_all": lambda ds: recovery_by_head(ds, "all"),
    "heads_identity": lambda ds: recovery_by_head(ds, "identity"),
    "accuracy": accuracy_by_persona,
    "head_ranking": head_ranking,
    "attention": attention_before_and_after,
    "attention_value": lambda ds: attention_before_and_after(ds, "attention_value"),
}


def plan(
    tokenizer: PreTrainedTokenizerBase,
    *,
    questions: str = BUNDLED,
    n_questions: Annotated[int, Field(ge=1)] | None = None,
    identities: str | None = None,
    persona: str = PERSONA,
    control: str = "average",
) -> Plan:
    """Ask every question as every persona, and pair the personas.

    Args:
        tokenizer: the model's.
        questions: bundled, mmlu, mmlu:subject, or a .jsonl, .csv or .parquet file.
        n_questions: only the first so many questions.
        identities: a file with one identity a line; by default competence words and colours.
        persona: the persona, with {identity} where the identity goes.
        control: the word that heads' attention to an identity is compared with.
    """
    check_persona(persona)
    names = load_identities(identities)
    chosen = load_questions(questions)[:n_questions]
    asked = {
        name: tuple(ask(tokenizer, persona, name, question) for question in chosen)
        for name in dict.fromkeys((*names, control))
    }
    content = {
        "persona": persona,
        "identities": list(names),
        "control": control,
        "questions": [[q.question, list(q.choices), q.answer] for q in chosen],
    }
    return Plan(
        name=name_questions(questions),
        units=[
            Pair(clean, corrupt, asked[clean], asked[corrupt], asked[control])
            for clean in names
            for corrupt in names
        ],
        axes={
            "clean_persona": names,
            "corrupt_persona": names,
            "persona": names,
            "question": range(len(chosen)),
        },
        unit_axes=("clean_persona", "corrupt_persona"),
        content=content,
        token_ids={
            name: {str(k): list(row.ids) for k, row in enumerate(rows)}
            for name, rows in asked.items()
        },
        digest=content_digest(content),
        coords={
            "subject": ("question", [q.subject for q in chosen]),
            "answer": ("question", [q.answer for q in chosen]),
        },
        attrs={"inputs": {"questions": questions, "identities": identities, **content}},
        batch_size=1,
    )


def measure(
    model: TransformersModel,
    pairs: list[Pair],
    *,
    layers: list[int],
    threshold: Annotated[float, Field(ge=0)] = 0.05,
    reuse: bool = True,
) -> dict[str, Tensor]:
    """Measure pairs of personas.

    Args:
        model: from `load_model`.
        pairs: the pairs; the leading axis of every result.
        layers: the blocks whose components are patched and whose attention is read.
        threshold: recovery is NaN where the two runs' logit differences are closer than this.
        reuse: run the shared prefix once and resume at the block of the patch.
    """
    measured = [_measure_pair(model, pair, layers, threshold, reuse=reuse) for pair in pairs]
    return {name: torch.stack([result[name] for result in measured]) for name in variables}


def _measure_pair(
    model: TransformersModel, pair: Pair, layers: list[int], threshold: float, *, reuse: bool
) -> dict[str, Tensor]:
    """What one pair gives; the leading axis is the question where there is one."""
    parts: dict[str, list[Tensor]] = {}
    order: list[int] = []
    for chunk in chunk_questions(model, pair):
        order += chunk
        for name, values in _patch_pair(model, pair, chunk, layers, reuse=reuse).items():
            parts.setdefault(name, []).append(values)
    in_order = torch.tensor(order).argsort()
    results = {name: torch.cat(values).cpu()[in_order] for name, values in parts.items()}

    answer = torch.tensor([asked.answer for asked in pair.asked_clean])
    ld = logit_difference(results["logits"], answer)
    corrupt = logit_difference(results.pop("logits_corrupt"), answer)
    gap = ld - corrupt
    defined = (gap.abs() >= threshold) & (not pair.is_diagonal)
    for name, logits in (("recovery", "logits_patched"), ("head_recovery", "head_logits_patched")):
        moved = (logit_difference(results[logits], answer) - _beside(corrupt, results[logits])) / (
            _beside(gap, results[logits])
        )
        results[name] = torch.where(_beside(defined, results[logits]), moved, torch.nan)
    correct = (results["logits"].argmax(-1) == answer).float()
    results["ld"] = ld
    results["accuracy"] = correct.mean()
    # Of a persona, not of a pair: the others' is not stored.
    results["accuracy_interval"] = _bootstrap(correct) if pair.is_diagonal else torch.zeros(2)
    results["identity_tokens"] = torch.tensor(len(pair.asked_clean[0].identity))
    return results


def _beside(values: Tensor, logits: Tensor) -> Tensor:
    """One number a question, to be combined with an array of [question, …, letter]."""
    return values.view(-1, *[1] * (logits.dim() - 2))


def _bootstrap(correct: Tensor) -> Tensor:
    """95 % percentile-bootstrap interval of a mean over questions, [low, high].

    Answers are right or wrong, so that a resample's number of right ones is binomial.
    """
    generator = torch.Generator().manual_seed(0)
    count = torch.full((_RESAMPLES,), float(len(correct)))
    drawn = torch.binomial(count, correct.mean().expand(_RESAMPLES), generator=generator)
    return (drawn / len(correct)).quantile(torch.tensor([0.025, 0.975]))


def _patch_pair(
    model: TransformersModel, pair: Pair, chunk: list[int], layers: list[int], *, reuse: bool
) -> dict[str, Tensor]:
    """Everything that is run for some questions of a pair."""
    clean = [pair.asked_clean[k] for k in chunk]
    corrupt = [pair.asked_corrupt[k] for k in chunk]
    control = [pair.asked_control[k] for k in chunk] if pair.is_diagonal else []
    run = _run_unpatched(model, [*clean, *corrupt, *control], reuse=reuse)
    n = len(chunk)
    source, patched = partners(run, clean, corrupt)
    logits, attention, sizes = _patch_components(model, run, source, patched, layers)
    return {
        "logits": run.logits[:n],
        "logits_corrupt": run.logits[n : 2 * n],
        "logits_patched": logits,
        "head_logits_patched": _patch_heads(model, run, source, patched, layers),
        "attention": run.attention[:n, layers],
        "attention_value": run.attention_value[:n, layers],
        # Only a pair on the diagonal writes this one.
        "attention_control": run.attention[2 * n :, layers]
        if control
        else torch.full_like(run.attention[:n, layers], torch.nan),
        "attention_patched": attention,
        "attention_value_patched": sizes,
    }


def _patch_components(
    model: TransformersModel, run: Unpatched, source: Tensor, patched: Tensor, layers: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """One component of one block at a time, in both position sets and all questions at once.

    Returns:
        Logits, [question, component, layer, position set, letter], and attention to the
        identity, plain and weighted by values, [question, component, layer, position set,
        attention layer, head].
    """
    n = len(source)
    shape = (n, len(COMPONENTS), len(layers), len(POSITION_SETS))
    logits = run.logits.new_empty(*shape, len(LETTERS))
    # Up to the patched block itself, attention is what it was.
    attention, sizes = (
        unpatched[n : 2 * n, None, None, None].repeat(1, *shape[1:], 1, 1)
        for unpatched in (run.attention, run.attention_value)
    )
    rows = [(q, s) for q in range(n) for s in range(len(POSITION_SETS))]
    for k, layer in enumerate(layers):
        for c, outputs in enumerate((run.mlp[layer], run.attn[layer])):
            for q, s in cut_passes(rows, run):
                last, identity, letters = run.last[n + q], run.identity[n + q], run.letters[n + q]
                width = int(last.max()) + 1
                window = run.window.rows(n + q, layer, width)
                where = patched[s, q, :width, None]
                value = take(outputs[q], source[q, :width])
                with model.trace(window.inputs(cached=True)):
                    window.resume(model, layer)
                    block = model.layers[layer]
                    site = block.mlp if COMPONENTS[c] == "mlp" else block.attn.o_proj
                    site.output = torch.where(where, value, site.output)
                    above = model.layers[layer + 1 :]
                    looks = [
                        attention_to(block.attn.output[1], last, identity[:, :width])
                        for block in above
                    ]
                    model.lm_head.input = take(model.lm_head.input, last)
                    said = save(model.output.logits[:, -1].gather(1, letters).float())
                    held: Any = model.output.past_key_values.layers[layer + 1 :]
                    looked = save([look.float().sum(-1) for look in looks])
                    written = save(
                        [
                            _written(block, look, kept.values[:, :, window.start :])
                            for block, look, kept in zip(above, looks, held, strict=True)
                        ]
                    )
                logits[q, c, k, s] = said
                if looked:
                    attention[q, c, k, s, layer + 1 :] = torch.stack(looked, dim=1)
                    sizes[q, c, k, s, layer + 1 :] = torch.stack(written, dim=1)
    return logits, attention, sizes


def _patch_heads(
    model: TransformersModel, run: Unpatched, source: Tensor, patched: Tensor, layers: list[int]
) -> Tensor:
    """One head of one block at a time, all heads of the block at once.

    Returns:
        Logits, [question, layer, head, position set, letter].
    """
    n, n_heads, n_layers = len(source), run.attention.shape[-1], len(model.layers)
    logits = run.logits.new_empty(n, len(layers), n_heads, len(POSITION_SETS), len(LETTERS))
    common = common_columns(run, source, patched)
    for k, layer in enumerate(layers):
        behind = None
        if common and layer < n_layers - 1:
            behind = _patch_common(model, run, source, patched, layer, common)
        for s, q, h in head_passes(run, n):
            # Columns that are not patched meet the patch in the block above.
            beyond = bool(patched[s, :, common:].any())
            resumed = layer if beyond else layer + 1
            if resumed == n_layers:
                logits[q, k, h, s] = run.logits[n + q]
                continue
            last, letters = run.last[n + q], run.letters[n + q]
            width = int(last.max()) + 1
            window = run.window.rows(n + q, resumed, width)
            if behind is not None:
                window = window.behind(behind.rows(s * n_heads + h))
            first = window.start - run.window.start
            where, value = head_patch(run, source, patched, layer, (s, q, h), slice(first, width))
            with model.trace(window.inputs()):
                window.resume(model, resumed)
                attention = model.layers[layer].attn
                if window.clean is None:
                    attention.o_proj.input = torch.where(where, value, attention.o_proj.input)
                elif beyond:  # Below the projection, everything is as it was.
                    before = run.heads[layer][n + q, first:width]
                    attention.skip((attention.o_proj(torch.where(where, value, before)), None))
                if window.clean is not None:
                    _finish_last_token(model, last - first, attention_too=layer < n_layers - 1)
                model.lm_head.input = take(model.lm_head.input, last - first)
                said = save(model.output.logits[:, -1].gather(1, letters).float())
            logits[q, k, h, s] = said
    return logits


def _patch_common(
    model: TransformersModel, run: Unpatched, source: Tensor, patched: Tensor, layer: int, n: int
) -> KVCache:
    """The first ``n`` columns after one head of a block is patched; [position set × head] rows."""
    n_heads = run.attention.shape[-1]
    row = torch.arange(len(POSITION_SETS) * n_heads, device=run.last.device)
    s, q, h = row // n_heads, torch.zeros_like(row), row % n_heads
    window = run.window.rows(len(source) + q, layer, n)
    where, value = head_patch(run, source, patched, layer, (s, q, h), slice(n))
    with model.trace(window.inputs(cached=True)):
        window.resume(model, layer)
        projection = model.layers[layer].attn.o_proj
        projection.input = torch.where(where, value, projection.input)
        model.lm_head.input = model.lm_head.input[:, -1:]
        kept = save(model.output.past_key_values)
    return window.read_cache(kept)


def _finish_last_token(model: TransformersModel, last: Tensor, *, attention_too: bool) -> None:
    """Inside a trace: let the last block work on the last prompt token alone.

    Nothing reads what it makes of the others beyond their keys and values. Its outputs, one
    column wide, are added to every column of the residual, of which the last token's is right.
    """
    block = model.layers[-1]
    if attention_too:
        block.attn.o_proj.input = take(block.attn.o_proj.input, last)
    block.mlp.input = take(block.mlp.input, last)


def _run_unpatched(model: TransformersModel, rows: Sequence[Asked], *, reuse: bool) -> Unpatched:
    """Run rows as they are, and keep what their components put out."""
    n_shared = shared_prefix(rows)
    prefix = prefill(model, [row.ids[:n_shared] for row in rows], reuse=reuse)
    window = open_ragged_window([row.ids for row in rows], prefix, device=model.device)
    last = torch.tensor([[len(row.ids) - 1 - window.start] for row in rows], device=model.device)
    letters = torch.tensor([row.letters for row in rows], device=model.device)
    column = torch.arange(window.input_ids.shape[1], device=model.device) + window.start
    first, stop = torch.tensor(
        [[row.identity.start, row.identity.stop] for row in rows], device=model.device
    ).T[:, :, None]
    identity = (column >= first) & (column < stop)

    entering, heads, attn, looks, mlp = [], [], [], [], []
    with model.trace(window.inputs(cached=True)):
        for block in model.layers:
            entering.append(block.input)
            heads.append(block.attn.o_proj.input)
            attn.append(block.attn.o_proj.output)
            looks.append(attention_to(block.attn.output[1], last, identity))
            mlp.append(block.mlp.output)
        model.lm_head.input = take(model.lm_head.input, last)
        logits = save(model.output.logits[:, -1].gather(1, letters).float())
        kept: Any = model.output.past_key_values
        written = [
            _written(block, looks[layer], kept.layers[layer].values[:, :, window.start :])
            for layer, block in enumerate(model.layers)
        ]
        save((entering, heads, attn, mlp))
        looked = save(torch.stack([look.float().sum(-1) for look in looks], dim=1))
        sizes = save(torch.stack(written, dim=1))
    return Unpatched(
        window=Window(
            window.input_ids,
            window.attention_mask,
            window.position_ids,
            window.start,
            window.padding,
            prefix,
            torch.stack(entering) if reuse else None,
        ),
        last=last,
        identity=identity,
        letters=letters,
        mlp=mlp,
        attn=attn,
        heads=heads,
        logits=logits,
        attention=looked,
        attention_value=sizes,
    )


def _written(block: Any, weights: Tensor, values: Tensor) -> Tensor:
    """Inside a trace: norm of what each head writes of weighted values, [row, head].

    Args:
        block: of the model.
        weights: [row, head, column], attention of one token.
        values: [row, kv_head, column, d_head].
    """
    separate = heads_apart(weights, values)
    nothing = block.attn.o_proj(torch.zeros_like(separate[:1, :1]))
    return (block.attn.o_proj(separate) - nothing).float().norm(dim=-1)
