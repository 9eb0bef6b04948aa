"""Where does a persona reach the answer? De-noising patching of MLPs, attention and heads.

Multiple-choice questions are asked as personas that differ in the identity alone ("a bad
student", "a red student"). In the run of one persona, the corrupt one, the output of a component
is replaced by what it is in the run of another, the clean one, on the same question; all that
follows is computed anew. How much of the way from the corrupt to the clean answer does that go?
And which heads look at the identity, before and after?
"""

from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
from nnsight import TransformersModel, save
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from persona_nns.declarations import LATER, FileName, NamesFile, Plan, Variable, content_digest
from persona_nns.figures import (
    accuracy_by_persona,
    attention_before_and_after,
    attribution_of_patches,
    head_ranking,
    recovery_by_head,
    recovery_by_pair,
)
from persona_nns.prompts import (
    BUNDLED,
    LETTERS,
    MMLU_DEV,
    PERSONA,
    Pair,
    ask,
    check_persona,
    choose_questions,
    load_identities,
    name_questions,
)
from persona_nns.runs import run
from persona_nns.tracing import (
    PATCHED_POSITIONS,
    Unpatched,
    attribute_pair,
    check_attributable,
    chunk_questions,
    compare_answers,
    cut_passes,
    finish_last_token,
    join_chunks,
    look_at,
    open_patches,
    patch_common,
    read_looks,
    run_unpatched,
    stack_layers,
    take,
    tell,
)

protocol_version = 3
COMPONENTS = ("mlp", "attn")

_PAIR = "clean_persona corrupt_persona question"
_PATCH = f"{_PAIR} component layer position_set"
_HEAD = f"{_PAIR} layer head position_set"
_LABELS: dict[str, Any] = {
    "component": COMPONENTS,
    "position_set": PATCHED_POSITIONS,
    "letter": LETTERS,
    "bound": ("low", "high"),
    "head": lambda record, _: range(record.n_heads),
    "attention_layer": lambda record, _: range(record.n_layers),
    "attention_head": lambda record, _: range(record.n_heads),
}
# What is read of a head, unpatched and with one component of a block patched.
_LOOKS = {
    "attention": (
        "attention to the identity",
        "Attention of the last prompt token, summed over the identity's tokens; NaN where the "
        "model returns none and it cannot be computed from queries and keys.",
    ),
    "attention_value": (
        "value-weighted attention to the identity",
        "Norm of what the head writes of the identity's tokens at the last prompt token: Σ "
        "attention × value through the head's share of the output projection; NaN as attention.",
    ),
}


def _array(dims: str, long_name: str, description: str, units: str = "1") -> Variable:
    """A variable with the labels of its own dimensions."""
    labels = {axis: _LABELS[axis] for axis in dims.split() if axis in _LABELS}
    return Variable(dims, long_name, units, description, coords=labels)


variables = {
    "recovery": _array(
        _PATCH,
        "recovery",
        "(LD_patched − LD_corrupt) / (LD_clean − LD_corrupt) with the clean output of one "
        "component of a block in the corrupt run; NaN on the diagonal and where the two runs "
        "differ by less than the threshold.",
    ),
    "head_recovery": _array(
        _HEAD,
        "recovery",
        "As recovery, with the clean output of one attention head: its slice of the input of the "
        "output projection.",
    ),
    "attribution": _array(
        _PATCH,
        "attribution",
        "Estimate of LD_patched − LD_corrupt of a patch, to first order: Σ (clean − corrupt) · "
        "∂LD/∂ the component's output, from one backward pass of the corrupt run.",
        "logit",
    ),
    "head_attribution": _array(
        _HEAD, "attribution", "As attribution, of the output of one attention head.", "logit"
    ),
    "accuracy": _array(
        "persona",
        "accuracy",
        "Share of the questions whose right letter has the highest logit of the four.",
    ),
    "accuracy_interval": _array(
        "persona bound", "accuracy, 95 % interval", "Percentile bootstrap over questions."
    ),
    "ld": _array(
        "persona question",
        "logit difference",
        "Logit of the right letter minus the mean of the three others.",
        "logit",
    ),
    "logits": _array(
        "persona question letter",
        "logit",
        "Logit of each letter at the last prompt token, unpatched.",
        "logit",
    ),
    "logits_patched": _array(
        f"{_PATCH} letter",
        "logit, patched",
        "Logit of each letter with one component of a block patched; of a persona with itself, as "
        "unpatched.",
        "logit",
    ),
    "head_logits_patched": _array(
        f"{_HEAD} letter",
        "logit, patched",
        "Logit of each letter with one head patched.",
        "logit",
    ),
    **{name: _array("persona question layer head", *said) for name, said in _LOOKS.items()},
    "attention_control": _array(
        "persona question layer head",
        "attention to the control word",
        "As attention, with the control word in the identity's slot; the same for every persona.",
    ),
    **{
        f"{name}_patched": _array(
            f"{_PATCH} attention_layer attention_head",
            f"{long_name}, patched",
            f"As {name}, over the corrupt prompt's identity tokens, with one component of a block "
            "patched.",
        )
        for name, (long_name, _) in _LOOKS.items()
    },
    "identity_tokens": Variable(
        "persona",
        "tokens of the identity",
        units="token",
        description="Tokens whose first non-space character lies in the identity (of the first "
        "question's prompt).",
        kind="int",
    ),
}

_OF_HEADS = ("head_recovery", "head_logits_patched")  # of patching one head at a time
_OF_ATTRIBUTION = ("attribution", "head_attribution")
figures = {
    "recovery_all": lambda ds: recovery_by_pair(ds, "all"),
    "recovery_identity": lambda ds: recovery_by_pair(ds, "identity"),
    "heads_all": lambda ds: recovery_by_head(ds, "all") if _OF_HEADS[0] in ds else None,
    "heads_identity": lambda ds: recovery_by_head(ds, "identity") if _OF_HEADS[0] in ds else None,
    "attribution": attribution_of_patches,
    "accuracy": accuracy_by_persona,
    "head_ranking": lambda ds: head_ranking(ds) if _OF_HEADS[0] in ds else None,
    "attention": attention_before_and_after,
    "attention_value": lambda ds: attention_before_and_after(ds, "attention_value"),
}


def prepares(options: Mapping[str, Any]) -> bool:
    """Whether the questions have to be asked before it is known which are patched."""
    return bool(options.get("solved_by_baseline")) and options.get("solved") is None


def prepare(
    model: TransformersModel, store: str | Path, options: dict[str, Any], *, progress: bool
) -> dict[str, Any]:
    """Ask the control persona, where only what it solves is wanted; stored, and asked once."""
    if options.get("attribution"):
        check_attributable(model, "head")
    if not prepares(options):
        return options
    names = ("questions", "n_questions", "persona", "control")
    asked = {name: options[name] for name in names if name in options}
    asked |= {"identities": "none", "store": store, "progress": progress}
    said = run("persona_accuracy", model, **asked)
    right = said.correct.isel(model=0, persona=-1)  # the control, the last one asked
    return {**options, "solved": ",".join(map(str, said.question.values[right.values]))}


def plan(
    tokenizer: PreTrainedTokenizerBase,
    *,
    questions: Annotated[str, NamesFile((BUNDLED, MMLU_DEV, "mmlu"))] = BUNDLED,
    n_questions: Annotated[int, Field(ge=1)] | None = None,
    solved_by_baseline: bool = False,
    solved: str | None = None,
    identities: FileName | None = None,
    persona: str = PERSONA,
    control: str = "average",
    heads: Annotated[bool, LATER] = True,
    attribution: Annotated[bool, LATER] = False,
) -> Plan:
    """Ask every question as every persona, and pair the personas.

    Args:
        tokenizer: the model's.
        questions: bundled, mmlu-dev, mmlu, mmlu:subject, or a .jsonl, .csv or .parquet file.
        n_questions: only the first so many; by default all.
        solved_by_baseline: of these, only what the control persona answers right.
        solved: with it, which those are, as 0,4,17; by default they are found by asking.
        identities: a file with one identity a line; by default competence words and colours.
        persona: the persona, with {identity} where the identity goes.
        control: the word that heads' attention to an identity is compared with.
        heads: patch single heads too, which takes most of the time.
        attribution: estimate every patch too, from a backward pass.
    """
    check_persona(persona)
    names = load_identities(identities)
    of_number = choose_questions(questions, n_questions, solved, solved_by_baseline)
    chosen = list(of_number.values())
    asked = {
        name: tuple(ask(tokenizer, persona, name, question) for question in chosen)
        for name in dict.fromkeys((*names, control))
    }
    content = {
        "persona": persona,
        "identities": list(names),
        "control": control,
        "questions": [[q.question, list(q.choices), q.answer] for q in chosen],
        **({"solved_by_baseline": list(of_number)} if solved_by_baseline else {}),
    }
    return Plan(
        name=name_questions(questions),
        units=[
            Pair(clean, corrupt, asked[clean], asked[corrupt], asked[control])
            for clean, corrupt in product(names, names)
        ],
        axes={
            "clean_persona": names,
            "corrupt_persona": names,
            "persona": names,
            "question": list(of_number),
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
        variables=[
            name
            for name in variables
            if (heads or name not in _OF_HEADS) and (attribution or name not in _OF_ATTRIBUTION)
        ],
    )


def measure(
    model: TransformersModel,
    pairs: list[Pair],
    *,
    layers: list[int],
    threshold: Annotated[float, Field(ge=0)] = 0.05,
    heads: Annotated[bool, LATER] = True,
    attribution: Annotated[bool, LATER] = False,
    reuse: bool = True,
) -> dict[str, Tensor]:
    """Measure pairs of personas.

    Args:
        model: from `load_model`.
        pairs: the pairs; the leading axis of every result.
        layers: the blocks whose components are patched and whose attention is read.
        threshold: recovery is NaN where the two runs' logit differences are closer than this.
        heads: patch single heads too, which takes most of the time.
        attribution: estimate every patch too, from a backward pass.
        reuse: run the shared prefix once and resume at the block of the patch.
    """
    measured: list[dict[str, Tensor]] = []
    for pair in pairs:
        chunks = list(chunk_questions(model, pair))
        parts: list[dict[str, Tensor]] = []
        for chunk in chunks:
            run = run_unpatched(model, pair.only(chunk), reuse=reuse)
            parts.append({**run.results(layers), **_patch_components(model, run, layers)})
            if heads:
                parts[-1]["head_logits_patched"] = _patch_heads(model, run, layers)
            if attribution:
                parts[-1] |= attribute_pair(model, run, pair.only(chunk), layers)
        results = join_chunks(chunks, parts)
        measured.append(results | compare_answers(results, pair, threshold))
    names = [name for name in variables if name in measured[0]]
    return {name: torch.stack([result[name] for result in measured]) for name in names}


def _patch_components(
    model: TransformersModel, run: Unpatched, layers: list[int]
) -> dict[str, Tensor]:
    """One component of one block at a time, in both position sets and all questions at once."""
    n_sets, n = run.rows.patched.shape[:2]
    shape = (n, len(COMPONENTS), len(layers), n_sets)
    logits = run.logits.new_empty(*shape, len(LETTERS))
    # Up to the patched block itself, attention is what it was.
    attention, sizes = (
        unpatched[n : 2 * n, None, None, None].repeat(1, *shape[1:], 1, 1)
        for unpatched in (run.attention, run.attention_value)
    )
    for (k, layer), (c, component) in product(enumerate(layers), enumerate(COMPONENTS)):
        outputs = (run.mlp if component == "mlp" else run.attn)[layer]
        for q, s in cut_passes(run, n, n_sets):
            patch = open_patches(run, outputs, layer, s, q)
            told = tell(model, patch.window)[layer + 1 :]
            with model.trace(patch.window.inputs(cached=True)):
                patch.window.resume(model, layer)
                block, above = model.layers[layer], model.layers[layer + 1 :]
                site = block.mlp if component == "mlp" else block.attn.o_proj
                site.output = torch.where(patch.where, patch.value, site.output)
                each = zip(above, told, strict=True)
                looks = [look_at(block.attn, patch.last, given)[0] for block, given in each]
                model.lm_head.input = take(model.lm_head.input, patch.last)
                said = save(model.output.logits[:, -1].gather(1, patch.letters).float())
                read = save(read_looks(above, looks, model.output, patch.identity))
            logits[q, c, k, s], (looked, written) = said, read
            if looked:
                attention[q, c, k, s, layer + 1 :] = stack_layers(looked, dim=1).to(attention)
                sizes[q, c, k, s, layer + 1 :] = stack_layers(written, dim=1).to(sizes)
    return {
        "logits_patched": logits,
        "attention_patched": attention,
        "attention_value_patched": sizes,
    }


def _patch_heads(model: TransformersModel, run: Unpatched, layers: list[int]) -> Tensor:
    """One head at a time, all heads of a block at once: [question, layer, head, set, letter]."""
    (n_sets, n), n_heads = run.rows.patched.shape[:2], run.attention.shape[-1]
    logits = run.logits.new_empty(n, len(layers), n_heads, n_sets, len(LETTERS))
    common, last_layer = run.rows.common_columns(), len(model.layers) - 1
    for k, layer in enumerate(layers):
        behind = patch_common(model, run, layer, common) if common and layer < last_layer else None
        for s in range(n_sets):
            # Columns that are not patched meet the patch in the block above.
            beyond = bool(run.rows.patched[s, :, common:].any())
            resumed = layer if beyond else layer + 1
            if resumed > last_layer:
                logits[:, k, :, s] = run.logits[n : 2 * n, None]
                continue
            for q, h in cut_passes(run, n, n_heads):
                begun = None if behind is None else behind.rows(s * n_heads + h)
                patch = open_patches(run, run.heads[layer], resumed, s, q, h, behind=begun)
                with model.trace(patch.window.inputs()):
                    patch.window.resume(model, resumed)
                    attention = model.layers[layer].attn
                    projection = attention.o_proj
                    if patch.window.clean is None:
                        projection.input = torch.where(patch.where, patch.value, projection.input)
                    elif beyond:  # Below the projection, everything is as it was.
                        before = run.heads_at(layer, n + q, patch.columns)
                        patched = torch.where(patch.where, patch.value, before)
                        attention.skip((projection(patched), None))
                    if patch.window.clean is not None:
                        finish_last_token(model, patch.last, attention_too=layer < last_layer)
                    model.lm_head.input = take(model.lm_head.input, patch.last)
                    said = save(model.output.logits[:, -1].gather(1, patch.letters).float())
                logits[q, k, h, s] = said
    return logits
