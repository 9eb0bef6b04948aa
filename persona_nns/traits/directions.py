"""Directions, wherever they are: in a file, or by name in a store.

A direction is [n_layers + 1, d_model]: a row for the residual stream entering each block, and one
for the stream after the final norm. A source is

- a file: ``.npy``, ``.pt``, ``.safetensors``, or a control vector in ``.gguf``;
- ``STORE#axis``: the Assistant axis of `persona_space`; ``STORE#component:K``: its component K,
  counted from 0;
- ``STORE#NAME``: the vector of the trait NAME that `trait_vectors` made;
- ``STORE``: the vector of the trait that is asked for; where none is, the only direction there is.

Behind an ``@`` stands the run, where the store has several: ``STORE#axis@RUN``.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xarray as xr
from torch import Tensor

from persona_nns.errors import UsageError
from persona_nns.results.reading import LATEST, RunInfo, list_runs, open_results
from persona_nns.tracing.averages import AVERAGES
from persona_nns.traits.trait import Trait, extraction_questions
from persona_nns.traits.vectors import SUFFIXES, read_described, write_vector

_AXIS = "axis"
_COMPONENT = re.compile(r"component:(\d+)")
_OF_TRAITS, _OF_ROLES = "trait_vectors", "persona_space"


@dataclass(frozen=True, eq=False)
class Direction:
    """A direction, and what is known of it.

    Attributes:
        name: of a trait, ``axis`` or ``component:K``; of a file, what it says, or its stem.
        source: where it was found, as it was asked for.
        vectors: [n_layers + 1, d_model] in float32.
        gap: [n_layers + 1], the distance of the means of the two classes that it tells apart
            (answers with a trait and without; the assistant and the roles); None where its source
            has no such means.
        questions: from which it was made, as far as its source tells.
        about: what is known of it in words: ``model``, ``model_version`` (the digest or commit),
            ``architecture``, ``average``, ``experiment``, ``run``.
    """

    name: str
    source: str
    vectors: Tensor
    gap: Tensor | None = None
    questions: frozenset[str] = frozenset()
    about: Mapping[str, str] = field(default_factory=dict[str, str])


def load_direction(
    source: str,
    model: str | None = None,
    *,
    trait: str | None = None,
    average: str = "response_avg",
    run: str | None = None,
) -> Direction:
    """Find a direction.

    Args:
        source: a file, or a store and what is meant of it.
        model: label of the model it was made on, where it is in a store; None where the store has
            one model's alone.
        trait: which trait's, where the source is a store without a name.
        average: over which tokens the vector of a trait is.
        run: which run, where the store has several.

    Raises:
        UsageError: there is no such direction, or several.
    """
    store, name, run_in_name = _parts(source)
    if store is None:
        vectors, about = read_described(source)
        return Direction(about.get("name", Path(source).stem), source, vectors, about=about)
    run = run_in_name or run
    if name is None and trait is None:
        name = _only_name(store, model, run)
    if name is not None and (name == _AXIS or _COMPONENT.fullmatch(name)):
        return _of_roles(store, name, source, model, run)
    # A run says which trait it is of.
    return _of_trait(store, name or (None if run else trait), source, model, average, run)


def save_direction(direction: Direction, file: str | Path) -> None:
    """Write a direction to a file; its ending chooses the format.

    What is known of it in words goes along in ``.safetensors`` and ``.gguf``.

    Raises:
        UsageError: no such format or folder.
    """
    write_vector(direction.vectors, file, {**direction.about, "name": direction.name})


def load_vector(
    source: str, trait: str, average: str, model: str, run: str | None = None
) -> Tensor:
    """A direction, [n_layers + 1, d_model]; by default the vector of a trait.

    Args:
        source: as in `load_direction`.
        trait: which one, where it is a store without a name.
        average: over which tokens, where it is of a trait in a store.
        model: label of the model it was made on, where it is a store.
        run: which run, where the store has several.

    Raises:
        UsageError: there is no such direction.
    """
    return load_direction(source, model, trait=trait, average=average, run=run).vectors


def check_unseen(
    asked: Trait,
    artifacts: str | Path | None,
    direction: Direction,
    split_seed: int | None = None,
) -> None:
    """See that no question on which a direction is evaluated is one that it was made from.

    Args:
        asked: the questions.
        artifacts: folder of the trait, whose extraction questions vectors are made from.
        direction: what is evaluated.
        split_seed: what divides its one list of questions into halves, where it has one.

    Raises:
        UsageError: a question is not held out.
    """
    seen = direction.questions | set(extraction_questions(asked.name, artifacts, split_seed))
    if shared := sorted(seen & set(asked.questions)):
        raise UsageError(
            f"The trait {asked.name!r} asks {shared[0]!r}, from which its vector is made; "
            "evaluation questions have to be held out."
        )


def runs_of(store: str | Path, experiment: str, trait: str, model: str) -> str:
    """The one run of an experiment for a trait and a model.

    Raises:
        UsageError: there is none, or there are several.
    """
    return _one_run(store, experiment, trait, model, None).run


def _parts(source: str) -> tuple[str | None, str | None, str | None]:
    """Store, name and run that a source tells; no store where it is a file.

    Raises:
        UsageError: there is nothing there.
    """
    path = Path(source).expanduser()
    if path.is_file() or path.suffix.lower() in SUFFIXES:
        return None, None, None
    if path.exists():
        return source, None, None
    store, mark, said = source.rpartition("#")
    if not mark:
        store, said = source, ""
    if "://" not in store and not Path(store).expanduser().exists():
        raise UsageError(
            f"There is nothing at {store!r}: a vector is a {', '.join(SUFFIXES[:-1])} or "
            f"{SUFFIXES[-1]} file, or in a store with trait_vectors; there is no Zarr store either."
        )
    name, _, run = said.partition("@")
    if mark and not name:
        raise UsageError(
            f"{source!r} names no direction; write STORE#axis, STORE#component:0, STORE#TRAIT, or "
            "one of these and @RUN."
        )
    return store, name or None, run or None


def _only_name(store: str, model: str | None, run: str | None) -> str:
    """The name of the only direction in a store.

    Raises:
        UsageError: there is none, or there are several.
    """
    of_roles, of_traits = (
        [each for each in list_runs(store, experiment) if _is_meant(each, model, run)]
        for experiment in (_OF_ROLES, _OF_TRAITS)
    )
    names = [_AXIS] if of_roles else []
    names += sorted({info.attrs["grid"] for info in of_traits})
    if len(names) == 1:
        return names[0]
    of_model = f" for the model {model!r}" if model else ""
    if not names:
        raise UsageError(
            f"The store {store!r} holds no direction{of_model}; run {_OF_TRAITS} or {_OF_ROLES} "
            "first."
        )
    choices = ", ".join(f"{store}#{name}" for name in names)
    raise UsageError(f"The store {store!r} holds several directions{of_model}: {choices}.")


def _is_meant(info: RunInfo, model: str | None, run: str | None) -> bool:
    """Whether a run is the one that is called so; where none is, whether it is the model's."""
    if run not in (None, LATEST):
        return info.is_called(run)
    return model in (None, info.attrs["model"])


def _one_run(
    store: str | Path, experiment: str, trait: str | None, model: str | None, run: str | None
) -> RunInfo:
    """The one run of an experiment for a trait, where one is meant, and a model.

    Raises:
        UsageError: there is none, or there are several.
    """
    found = [
        info
        for info in list_runs(store, experiment)
        if _is_meant(info, model, run) and trait in (None, info.attrs["grid"])
    ]
    of_trait = f" of {trait!r}" if trait else ""
    if not found:
        of = f" in the run {run!r}" if run else f" for the model {model!r}" if model else ""
        raise UsageError(
            f"The store {str(store)!r} holds no {experiment}{of_trait}{of}; run {experiment} first."
        )
    if len(found) > 1 and run != LATEST:
        of_model = f" for {model!r}" if model else ""
        raise UsageError(
            f"The store {str(store)!r} holds several {experiment}{of_trait}{of_model}; "
            "choose a run: " + "; ".join(info.describe() for info in found)
        )
    return found[-1]


def _opened(store: str, info: RunInfo) -> xr.Dataset:
    return open_results(store, info.experiment, run=info.run)


def _of_trait(
    store: str, trait: str | None, source: str, model: str | None, average: str, run: str | None
) -> Direction:
    """The vector of a trait, from `trait_vectors`."""
    if average not in AVERAGES:
        raise UsageError(f"Unknown average {average!r}; use {', '.join(AVERAGES)}.")
    info = _one_run(store, _OF_TRAITS, trait, model, run)
    results = _opened(store, info)
    mean = results["mean"].sel(average=average)
    apart = _rows(mean.sel(label="pos")) - _rows(mean.sel(label="neg"))
    kept = results["row_question"].values[(results["kept"].values == 1).ravel()]
    return Direction(
        str(info.attrs["grid"]),
        source,
        _finite(_rows(results["vector"].sel(average=average)), source),
        gap=apart.norm(dim=-1),
        questions=frozenset(kept.tolist()),
        about=_about(info, average=average),
    )


def _of_roles(store: str, name: str, source: str, model: str | None, run: str | None) -> Direction:
    """The Assistant axis or a component, from `persona_space`."""
    info = _one_run(store, _OF_ROLES, None, model, run)
    results = _opened(store, info)
    if name == _AXIS:
        axis = _finite(_rows(results[_AXIS]), source)
        return Direction(name, source, axis, gap=axis.norm(dim=-1), about=_about(info))
    components = results["component"]
    others = {"model", "layer", "d_model", *info.group.unit_axes}
    (ranks,) = [dim for dim in components.dims if dim not in others]
    known = results[ranks].values.tolist() if ranks in results.xindexes else []
    known = known or list(range(components.sizes[ranks]))
    number = int(name.removeprefix("component:"))
    if number not in known:
        raise UsageError(
            f"The run {info.run!r} has no component {number}; it has {known[0]} to {known[-1]}."
        )
    vectors = _finite(_rows(components.isel({ranks: known.index(number)})), source)
    return Direction(name, source, vectors, about=_about(info))


def _rows(array: xr.DataArray) -> Tensor:
    """An array over layers and width, [layer, d_model]; its other dimensions have one label."""
    others = [dim for dim in array.dims if dim not in ("layer", "d_model")]
    one = array.isel(dict.fromkeys(others, 0)).transpose("layer", "d_model")
    return torch.from_numpy(one.values).float()


def _finite(vectors: Tensor, source: str) -> Tensor:
    """The same.

    Raises:
        UsageError: it holds NaN, as what was not measured does.
    """
    if not bool(torch.isfinite(vectors).all()):
        raise UsageError(
            f"The direction {source!r} holds numbers that are not finite: its run is not complete, "
            "or had nothing to make it from."
        )
    return vectors


def _about(info: RunInfo, **more: str) -> dict[str, Any]:
    """What a run knows in words of the direction that it made."""
    kept = ("model", "model_version", "architecture", "precision", "experiment")
    return {**{key: str(info.attrs[key]) for key in kept}, "run": info.run, **more}
