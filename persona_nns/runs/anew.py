"""A sample of a run's units (say, cells) computed anew, where that can be done at all.

It cannot where the experiment or the model is not here any more, or is another than it was. That
is no fault of what is stored: `NotCheckedError` says why.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import xarray as xr

from persona_nns.declarations.catalog import Experiment, bundled_experiments, load_experiment
from persona_nns.declarations.plans import Unit
from persona_nns.errors import PersonaError, first_line
from persona_nns.prompts.frames import ROLE, Frame, Message
from persona_nns.prompts.grids import Grid
from persona_nns.results.measured import is_count
from persona_nns.results.reading import RunInfo, open_results
from persona_nns.results.rounding import same_but_for_rounding

if TYPE_CHECKING:
    from nnsight import TransformersModel

    from persona_nns.runs.run import PlannedRun

_AT = " at "  # before the revision that a server was asked for, at the end of it
_HOSTED = "hosted "  # begins the version of a model that was never loaded where the run was asked
_DETERMINING = (
    *("protocol_version", "model_version", "precision", "architecture", "attn_implementation"),
    *("grid_digest", "template"),
)


class NotCheckedError(PersonaError):
    """What a run holds cannot be computed anew here; the message says why, and what would help."""


@dataclass
class Models:
    """Models as runs name them, one at a time: the last one stays until another is asked for.

    Attributes:
        backend: the server for runs that were made on one; None leaves them alone.
        folders: bundled names or folders where models are now, known by their version.
        trust_remote_code: run code that comes with a model.
    """

    backend: str | None = None
    folders: Sequence[str] = ()
    trust_remote_code: bool = False
    _key: Any = None
    _model: "TransformersModel | None" = None
    _reason: str = ""

    @staticmethod
    def key(attrs: Mapping[str, Any]) -> tuple[str, ...]:
        """What two runs of one model have in common."""
        names = ("model_source", "model_version", "precision", "attn_implementation", "model")
        return tuple(str(attrs.get(name)) for name in (*names, "adapter", "quantisation"))

    def of(self, attrs: Mapping[str, Any]) -> "TransformersModel":
        """The model of a run, from its attributes.

        Raises:
            NotCheckedError: it cannot be had.
        """
        if self._key != self.key(attrs):
            self._key, self._model, self._reason = self.key(attrs), None, ""
            try:
                self._model = self._load(attrs)
            except Exception as error:
                self._reason = _reason(error)
        if self._model is None:
            raise NotCheckedError(self._reason)
        return self._model

    def _load(self, attrs: Mapping[str, Any]) -> "TransformersModel":
        from persona_nns.models.load import load_model

        source, version = str(attrs["model_source"]), str(attrs["model_version"])
        trust: dict[str, Any] = {"trust_remote_code": self.trust_remote_code}
        if adapter := attrs.get("adapter"):
            version = adapter["base_version"]
            trust["adapter"] = self._adapter_of(adapter["digest"]) or adapter["source"]
        if quantised := attrs.get("quantisation"):
            version = quantised["base_version"]
            trust["quantise"] = quantised["kind"]
        if not version.startswith(_HOSTED.strip()):
            name = self._folder_of(version) or source
            how = {"dtype": attrs["precision"], "allow_float16": True}
            how |= {"attention": attrs.get("attn_implementation")}
            return load_model(name, label=attrs["model"], **how, **trust)
        if self.backend is None:
            raise NotCheckedError(
                f"It was made on a server, with the hosted model {source!r}, which is not loaded "
                "here; --backend ndif (or the server's URL) computes its sample there."
            )
        name, label = source, attrs["model"]
        version, _, revision = version.removeprefix(_HOSTED).partition(_AT)
        trust |= {"revision": revision or None}
        if len(version) == 64:  # of a folder's config.json
            name = self._folder_of(version)
            if name is None:
                raise NotCheckedError(
                    f"A folder stood for the hosted model {source!r} when it was made; name it "
                    "with --model FOLDER."
                )
            label = source  # under which it is hosted
        return load_model(name, label=label, backend=self.backend, **trust)

    def _adapter_of(self, digest: str) -> str | None:
        """The folder that holds the adapter of this digest."""
        from persona_nns.models.adapters import CONFIG
        from persona_nns.models.checkpoints import adapter_digest

        held = (name for name in self.folders if (Path(name).expanduser() / CONFIG).is_file())
        return next((name for name in held if adapter_digest(name) == digest), None)

    def _folder_of(self, version: str) -> str | None:
        """The folder whose weights, or whose config.json, have this digest."""
        from persona_nns.models.checkpoints import (
            bundled_models,
            digest_of,
            find_checkpoint,
            read_config,
            version_of,
        )

        for name in (*self.folders, *bundled_models()):
            source, shown = find_checkpoint(name)
            config = Path(source) / "config.json"
            if config.is_file() and digest_of([config]) == version:
                return name
            if name in self.folders:
                read = read_config(source, shown, trust_remote_code=self.trust_remote_code)
                if version_of(source, read) == version:
                    return name
        return None


@dataclass
class Experiments:
    """The experiments that runs may name: the bundled ones, and files of one's own.

    Attributes:
        own: loaded from files, by name.
    """

    own: Mapping[str, Experiment] = field(default_factory=dict[str, Experiment])
    _bundled: dict[str, Experiment] = field(default_factory=dict[str, Experiment])

    def of(self, attrs: Mapping[str, Any]) -> Experiment:
        """The experiment of a run, from its attributes.

        Raises:
            NotCheckedError: it is not known here, or is another version.
        """
        name, version = attrs["experiment"], str(attrs["protocol_version"])
        if "code" in attrs:
            raise NotCheckedError(
                f"It was made with a function {name}(), not with a file; its code is in the run's "
                "attributes."
            )
        experiment = self.own.get(name) or self._load(name)
        if experiment.version != version:
            raise NotCheckedError(
                f"It was made by version {version} of {name!r}, and the one here is version "
                f"{experiment.version}."
            )
        return experiment

    def _load(self, name: str) -> Experiment:
        if name not in bundled_experiments():
            raise NotCheckedError(
                f"Its experiment {name!r} is a file of somebody's own; name it with "
                f"--experiment {name}.py."
            )
        if name not in self._bundled:
            self._bundled[name] = load_experiment(name)
        return self._bundled[name]


def compute_anew(
    info: RunInfo,
    results: xr.Dataset,
    sample: int,
    seed: int,
    *,
    experiments: Experiments,
    models: Models,
) -> tuple[int, tuple[str, ...]]:
    """Compute a sample of a run's complete units, and see that they are what is stored.

    Returns:
        How many units were computed, and what is wrong with them: a sentence each.

    Raises:
        NotCheckedError: it cannot be done here.
    """
    _check_harmless(info.attrs.get("unverifiable", ""))
    experiment = experiments.of(info.attrs)
    model = models.of(info.attrs)
    with TemporaryDirectory() as folder:
        try:
            planned = _plan_anew(info, experiment, model, Path(folder) / "anew.zarr")
            _check_harmless(planned.request.plan.unverifiable)
            done = info.group.completed(planned.request.units)
            units = [unit for unit in planned.request.units if unit.label in done]
            chosen = random.Random(seed).sample(units, min(sample, len(units)))  # noqa: S311
            problems = tuple(_compare(results, planned, chosen))
        except NotCheckedError:
            raise
        except Exception as error:  # one's own code, a server, a model too large for this machine
            raise NotCheckedError(f"It could not be computed anew: {_reason(error)}") from error
    if not problems and planned.request.block.attrs["identity"] != info.attrs["identity"]:
        raise NotCheckedError(
            "What is computed anew is what is stored, but gets another identity: something that "
            "determines its numbers is not what it was."
        )
    return len(chosen), problems


def _check_harmless(reason: str) -> None:
    """See that an experiment lets itself be computed anew.

    Raises:
        NotCheckedError: it says why not.
    """
    if reason:
        raise NotCheckedError(f"It is not computed anew: {reason}.")


def _reason(error: Exception) -> str:
    """What went wrong as a sentence; an error that is not ours with its type."""
    if isinstance(error, PersonaError):
        return str(error)
    return f"{type(error).__name__}: {first_line(error)}."


def _plan_anew(
    info: RunInfo, experiment: Experiment, model: "TransformersModel", store: Path
) -> "PlannedRun":
    """Plan a run once more, into another store, from what its provenance says.

    Raises:
        NotCheckedError: the model or the inputs are not those of the run.
        PersonaError: it cannot be planned.
    """
    from persona_nns.runs.run import plan_run

    attrs = info.attrs
    model.tokenizer.chat_template = attrs["template"] or None
    settings = {**attrs["parameters"], **attrs["plan_options"]}
    grid = settings.pop("grid", None) or grid_of(info)
    planned = plan_run(experiment, model, grid, store=store, **settings)
    now = planned.request.block.attrs
    if now["identity"] != attrs["identity"]:
        changed = [name for name in _DETERMINING if name in attrs and now[name] != attrs[name]]
        if changed:
            what = " and ".join(changed)
            raise NotCheckedError(f"It cannot be computed anew: {what} is not what it was.")
    return planned


def grid_of(info: RunInfo) -> Grid | None:
    """The grid of a run as its provenance tells it; None where its units are no cells."""
    if info.noun != "cell":
        return None
    attrs = info.attrs
    markers = {name: tuple(words) for name, words in attrs["markers"].items()}
    # Runs of before there were frames do not say theirs.
    messages = tuple(Message(**message) for message in attrs.get("frame", ()))
    frame = Frame(messages) if messages else ROLE
    return Grid(attrs["grid"], attrs["personas"], attrs["tasks"], markers, frame)


def _compare(results: xr.Dataset, planned: "PlannedRun", units: Sequence[Unit]) -> Iterator[str]:
    """Compute units anew; yield where more than rounding differs."""
    wrong: dict[str, list[str]] = {}
    request = replace(planned.request, units=tuple(units))
    replace(planned, request=request).carry_out(progress=False)
    anew = open_results(planned.store, request.experiment.name)
    axes = {name: variable.axes for name, variable in request.block.variables.items()}
    for unit in units:
        for name in request.plan.names_written(unit, axes):
            here = {axis: label for axis, label in unit.place.items() if axis in axes[name]}
            kept, values = results[name].sel(here).values, anew[name].sel(here).values
            exact = kept.dtype.kind != "f" or is_count(results[name])
            if not same_but_for_rounding(kept, values, exact=exact):
                wrong.setdefault(name, []).append(unit.label)
    for name, labels in wrong.items():
        yield f"{name!r} of {', '.join(labels)} is not what is computed anew."
