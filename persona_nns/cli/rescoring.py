"""Have stored answers judged: a run beside the one that they were made in, with their scores."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import xarray as xr
from nnsight import TransformersModel
from transformers import PreTrainedTokenizerBase

from persona_nns.declarations.catalog import Experiment, load_experiment
from persona_nns.declarations.plans import Unit
from persona_nns.errors import PersonaError, UsageError
from persona_nns.models.load import HOSTED, load_model
from persona_nns.results.reading import RunInfo, list_runs, open_results
from persona_nns.runs.request import Request, told_of
from persona_nns.runs.run import plan_run
from persona_nns.traits.judge_options import JudgeOptions
from persona_nns.traits.judging import judge_texts
from persona_nns.traits.trait import load_traits

_HERE = torch.device("cpu")
_JUDGED = {"score", "coherence", "response"}


@dataclass(frozen=True, eq=False)
class _Reader:
    """Stands for a model where nothing is computed."""

    tokenizer: PreTrainedTokenizerBase
    device: torch.device = _HERE
    devices: frozenset[torch.device] = frozenset({_HERE})


def rescore(store: str, name: str, judging: JudgeOptions, run: str | None = None) -> str:
    """Judge the answers of a run; returns the name of the run that holds them with their scores.

    It is the run that the experiment would have made with this judge from the start, and goes on
    where it was interrupted.

    Args:
        store: path or URL of the store.
        name: the experiment's name, or its file.
        judging: the judge.
        run: whose answers; by default the one run that nobody has judged.

    Raises:
        UsageError: there is no such run, or its judge is this one.
        PersonaError: its inputs are not what they were, or the judge cannot be asked.
    """
    if judging.judge == "none":
        raise UsageError(
            "Answers are scored by a judge: lexicon, the URL of an endpoint, or a model."
        )
    experiment = load_experiment(name)
    info = _run_to_score(store, experiment.name, run)
    model = _load(info)
    asked = {**info.attrs["parameters"], **info.attrs["plan_options"]}
    made = plan_run(experiment, model, store=store, **asked).request.block.attrs
    if made["identity"] != info.attrs["identity"]:
        raise PersonaError(
            f"The answers of {info.run!r} cannot be scored: their questions, the trait, the model "
            "or the experiment are not what they were."
        )
    planned = plan_run(experiment, model, store=store, **{**asked, **vars(judging)})
    request = planned.request.as_hosted(*told_of(info.attrs))
    if request.block.run == info.run:
        raise UsageError(f"The answers of {info.run!r} are scored by this judge already.")
    attrs = {**request.block.attrs, "answers_of": info.run}
    request = replace(
        request,
        experiment=_reading(request, open_results(store, experiment.name, run=info.run), judging),
        units=tuple(u for u in request.units if u.label in info.group.completed(request.units)),
        block=replace(request.block, attrs=attrs),
    )
    reader: Any = _Reader(model.tokenizer)
    replace(planned, request=request, model=reader).carry_out(progress=True)
    return request.block.run


def _run_to_score(store: str, experiment: str, run: str | None) -> RunInfo:
    known = [i for i in list_runs(store, experiment) if set(i.attrs["variables"]) >= _JUDGED]
    if not known:
        raise UsageError(f"The store {store!r} holds no answers of {experiment!r} to be scored.")
    found = [
        info
        for info in known
        if (info.attrs["plan_options"].get("judge") == "none" if run is None else info.run == run)
    ]
    if len(found) == 1:
        return found[0]
    which = "Several runs were not judged" if found else "No such run was found"
    listed = "; ".join(info.describe() for info in found or known)
    raise UsageError(f"{which}; choose one with --run: {listed}.")


def _load(info: RunInfo) -> TransformersModel:
    """The model of a run: its tokenizer and what determined its numbers."""
    attrs = info.attrs
    on_server = attrs["model_version"].startswith(HOSTED)
    how: dict[str, Any] = {"backend": "ndif"}
    if not on_server:
        how = {"dtype": attrs["precision"], "allow_float16": True}
        how |= {"attention": attrs.get("attn_implementation")}
        how |= {"quantise": attrs.get("quantisation", {}).get("kind")}
    if "adapter" in attrs:
        how |= {"adapter": attrs["adapter"]["source"]}
    model = load_model(attrs["model_source"], label=attrs["model"], **how)
    model.tokenizer.chat_template = attrs["template"] or None
    return model


def _reading(request: Request, kept: xr.Dataset, choice: JudgeOptions) -> Experiment:
    """An experiment that reads what is stored in place of measuring, and has it judged."""
    placed = request.plan.placed_axes

    def measure(_model: Any, units: Sequence[Unit]) -> dict[str, Any]:
        arrays: dict[str, Any] = {}
        for name, variable in request.block.variables.items():
            array, own = kept[name].isel(model=0), [a for a in variable.axes if a not in placed]
            places = [{a: label for a, label in u.place.items() if a in array.dims} for u in units]
            arrays[name] = np.stack([array.sel(at).transpose(*own).values for at in places])
        return arrays

    def finish(
        _tokenizer: Any,
        units: Sequence[Unit],
        measured: dict[str, Any],
        *,
        artifacts: str | None = None,
        split_seed: int | None = None,
        split: Any = "evaluation",
    ) -> dict[str, Any]:
        texts = measured["response"]
        trait = load_traits(str(units[0].place["trait"]), split, artifacts, split_seed)[0]
        own = [axis for axis in request.block.variables["response"].axes if axis not in placed]
        numbers = np.empty(texts.shape, dtype=int)  # of each text's question
        if "question" in own:
            shape = [-1 if axis == "question" else 1 for axis in own]
            numbers[:] = np.arange(len(trait.questions)).reshape(shape)
        else:
            for row, unit in enumerate(units):
                numbers[row] = unit.place["question"]
        questions = [trait.questions[number] for number in numbers.ravel()]
        scores = judge_texts(trait, questions, texts.ravel().tolist(), choice)
        judged = {name: array.reshape(texts.shape) for name, array in scores.items()}
        return {**measured, **judged}

    return replace(request.experiment, measure=measure, finish=finish)
