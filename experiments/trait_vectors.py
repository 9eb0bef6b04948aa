"""Which direction is a trait? Mean residuals of answers with the trait minus those without it.

Answers under contrastive system prompts (given, or made by `trait_responses`) are read back
teacher-forced. Of each answer and layer: the mean over response tokens, the mean over prompt
tokens, and the last prompt token. The vector of a layer is the mean over the answers with the
trait minus the mean over those without ("Persona Vectors", arXiv 2507.21509).
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from nnsight import TransformersModel, save
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from persona_nns.declarations import Count, FileName, NotNegative, Plan, Variable, content_digest
from persona_nns.errors import UsageError
from persona_nns.figures import projection_figure, vector_norms
from persona_nns.prompts import render_chat, response_ids, stem_of, takes_system_role
from persona_nns.runs import run
from persona_nns.tracing import (
    AVERAGES,
    averages,
    left_pad,
    normalised,
    similar_rows,
    stack_layers,
    token_weights,
)
from persona_nns.traits import (
    LABELS,
    JudgedResponse,
    JudgeOptions,
    Label,
    TraitUnit,
    is_rows_file,
    load_traits,
    row_coordinates,
    rows_of_file,
    rows_of_store,
)

protocol_version = 2

variables = {
    "vector": Variable(
        "trait average layer d_model",
        "trait vector",
        description="mean(pos) − mean(neg) of the kept answers, in float32.",
        every_layer=True,
    ),
    "mean": Variable(
        "trait label average layer d_model",
        "mean residual",
        description="Unweighted mean over the kept answers of a label, in float32.",
        every_layer=True,
    ),
    "projection": Variable(
        "trait average row layer",
        "projection on v̂",
        description="An answer's average residual times v̂ of response_avg (0 where ‖v‖ = 0).",
        every_layer=True,
    ),
}
_NOBODY_JUDGES = "Without a judge, rows have to be given: --responses F.jsonl."
figures = {"norms": vector_norms, "projections": projection_figure}


@dataclass(frozen=True, eq=False)
class Answers(TraitUnit):
    """All answers that a vector is made from.

    Attributes:
        prompts: token ids of each row's prompt.
        responses: token ids of each row's answer, without an end token.
        labels: index into `LABELS` of each row.
        kept: whether a row counts for the vector.
    """

    prompts: tuple[tuple[int, ...], ...]
    responses: tuple[tuple[int, ...], ...]
    labels: tuple[int, ...]
    kept: tuple[bool, ...]


def prepare(
    model: TransformersModel, store: str | Path, options: dict[str, Any], *, progress: bool
) -> dict[str, Any]:
    """Have the answers made where none are given; they are stored, and made once."""
    if options.get("responses") is not None:
        return options
    if options.get("judge") == "none":
        raise UsageError(_NOBODY_JUDGES)
    names = ("trait", "artifacts", "split_seed", "n_samples", "max_new_tokens", "temperature")
    names = (*names, *(judge.name for judge in fields(JudgeOptions)))
    made = {name: options[name] for name in names if name in options}
    results = run("trait_responses", model, store=store, progress=progress, **made)
    return {**options, "responses": str(store), "responses_run": results.attrs["run"]}


def plan(
    tokenizer: PreTrainedTokenizerBase,
    *,
    model: str,
    trait: str | None = None,
    artifacts: FileName | None = None,
    split_seed: int | None = None,
    responses: FileName | None = None,
    responses_run: str | None = None,
    n_samples: Count = 1,
    max_new_tokens: Count = 256,
    temperature: NotNegative = 1.0,
    judging: JudgeOptions,
) -> Plan:
    """Render the answers that the vector is made from.

    Args:
        tokenizer: the model's.
        model: label of the model.
        trait: a bundled trait, or one of the folder `artifacts`; for rows from a file, its stem.
        artifacts: folder with extraction/{trait}.json and evaluation/{trait}.json, or {trait}.json.
        split_seed: seed that divides the one list of questions of a {trait}.json into halves.
        responses: rows (.jsonl, .jsonl.gz), or a store with trait_responses; made by default.
        responses_run: which run of trait_responses, where the store has several.
        n_samples: answers to each prompt, where they are made.
        max_new_tokens: the longest answer, where they are made.
        temperature: 1 samples from the model; 0 is greedy.
        judging: the judge.
        judge: lexicon; classifier:lexicon (words of your own); none (every given row counts); a URL
            (http://…) of an OpenAI-compatible endpoint; or a model that judges here: a bundled or
            fetched name, a folder, a .gguf file, or a hub id (org/name).
    """
    del n_samples, max_new_tokens, temperature  # the business of trait_responses
    from_file = responses is not None and is_rows_file(responses)
    name = stem_of(responses) if from_file and responses else trait or "cheerful"
    if from_file and trait not in (None, name):
        raise UsageError(f"The trait of {responses!r} is its stem {name!r}, not {trait!r}.")
    if judging.judge == "none" and not from_file:
        raise UsageError(_NOBODY_JUDGES)
    asked = None
    if judging.judge != "none":
        judging.check(name)
        asked = load_traits(name, "extraction", artifacts, split_seed)[0]
        judging.check(name, asked.questions, tokenizer)
    if responses is None:  # `prepare` has them made; until then there is nothing to render
        return _plan_of(name, [], [], tokenizer)
    rows = (
        rows_of_file(responses, asked, judging)
        if from_file
        else rows_of_store(responses, name, model, responses_run)
    )
    made = _plan_of(name, rows, judging.identity, tokenizer)
    return replace(made, unverifiable=judging.unverifiable) if from_file else made


def _plan_of(
    trait: str,
    rows: Sequence[JudgedResponse],
    judge: list[str],
    tokenizer: PreTrainedTokenizerBase,
) -> Plan:
    shown = [row.response for row in rows]
    answers = Answers(
        trait,
        tuple(render_chat(tokenizer, row.question, row.system).ids for row in shown),
        tuple(response_ids(tokenizer, row.response) for row in shown),
        tuple(LABELS.index(row.label) for row in shown),
        tuple(row.kept for row in rows),
    )
    content = {
        "trait": trait,
        "judge": judge,
        "rows": [[vars(row.response), row.kept] for row in rows],
    }
    return Plan(
        name=trait,
        units=[answers],
        axes={
            "trait": [trait],
            "average": list(AVERAGES),
            "label": list(LABELS),
            "row": list(range(len(rows))),
        },
        unit_axes=("trait",),
        content=content,
        token_ids={
            str(row): {"prompt": prompt, "response": response}
            for row, (prompt, response) in enumerate(
                zip(answers.prompts, answers.responses, strict=True)
            )
        },
        digest=content_digest(content),
        coords=row_coordinates(rows),
        attrs={"judge": judge, "system_role": takes_system_role(tokenizer)},
        batch_size=1,
    )


def measure(model: TransformersModel, units: list[Answers]) -> dict[str, Tensor]:
    """Read the answers back.

    Args:
        model: from `load_model`.
        units: the answers of a trait.
    """
    means, vectors, projected = [], [], []
    for answers in units:
        read = read_averages(model, answers)
        # In float64: where both labels read the same, their difference is zero and no direction.
        mean = torch.stack([mean_of(answers, label, read) for label in LABELS])
        vector = (mean[LABELS.index("pos")] - mean[LABELS.index("neg")]).float()
        direction = normalised(vector[:, AVERAGES.index("response_avg")])
        means.append(mean.float())
        vectors.append(vector)
        projected.append(torch.einsum("lrad,ld->lra", read, direction))
    return {
        "vector": torch.stack(vectors).transpose(1, 2),  # [trait, average, layer, d_model]
        "mean": torch.stack(means).transpose(2, 3),  # [trait, label, average, layer, d_model]
        "projection": torch.stack(projected).permute(0, 3, 2, 1),
    }


def mean_of(answers: Answers, label: Label, read: Tensor) -> Tensor:
    """Mean over the kept answers of a label, [layer, average, d_model], in float64.

    Args:
        answers: which of them are kept, and of which label they are.
        label: which are meant.
        read: from `read_averages`.
    """
    of_label = zip(answers.labels, answers.kept, strict=True)
    counted = [row for row, of in enumerate(of_label) if of == (LABELS.index(label), True)]
    return read[:, counted].sum(1, dtype=torch.float64) / len(counted)


def read_averages(model: TransformersModel, answers: Answers) -> Tensor:
    """The three averages of each answer, [layer, row, average, d_model], float32 on the CPU."""
    rows = [
        (*prompt, *said) for prompt, said in zip(answers.prompts, answers.responses, strict=True)
    ]
    whole = torch.empty(0)
    for batch in similar_rows([len(row) for row in rows]):
        padded = left_pad([rows[row] for row in batch], device=model.device)
        n_response = torch.tensor([len(answers.responses[row]) for row in batch])
        weights = token_weights(padded.attention_mask, n_response.to(model.device))
        with model.trace(
            padded.tokens, position_ids=padded.position_ids, use_cache=False, logits_to_keep=1
        ):
            read = save(
                [averages(block.input, weights) for block in model.layers]
                + [averages(model.final_norm.output, weights)]
            )
        of_batch = stack_layers(read).cpu()
        if not whole.numel():
            whole = of_batch.new_empty(len(of_batch), len(rows), *of_batch.shape[2:])
        whole[:, batch] = of_batch
    return whole
