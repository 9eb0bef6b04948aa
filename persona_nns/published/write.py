"""Write the published result files as a store: ``python -m persona_nns.published.write [STORE]``.

Names, coordinates and attributes are those of our own results, so that one reader serves both.
What differs: a whole array is one chunk, because nothing is ever added; the numbers keep the
double precision of the files; and what the files only summarise over cells has a dimension
``statistic`` instead of ``cell``. What they do not hold is NaN.
"""

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr
from numpy.typing import NDArray

from persona_nns.declarations.plans import content_digest
from persona_nns.prompts.grids import Grid, load_grid
from persona_nns.published.store import published_store
from persona_nns.results.reading import PUBLISHED_VERSION

DATA = Path(__file__).parent
PAPER = "As X, Do Y: How Persona and Task Combine in Instruction-Tuned LLMs, arXiv 2605.23147v1"
CREATED = "2026-05-25T00:00:00.000+00:00"  # of the version of the paper that names the files
#: Whoever takes median and quartiles over these five gets the published ones back.
STATISTICS = ("median", "q25", "q75", "min", "max")
CONDITIONS = ("clean", "additive", "remove_persona", "bare")
SOURCES = ("none", "cached", "oracle")

_POSITIONS = ("p_user_last", "p_last", "g1", "g2")
_GEOMETRY = {
    "cos_additive": ("cos_xy_sum", "cos(ΔXY, ΔX+ΔY)"),
    "cos_persona_task": ("cos_x_y", "cos(ΔX, ΔY)"),
    "interaction_ratio": ("inter_over_xy", "‖Inter‖ / ‖ΔXY‖"),
}
_KL = (
    "KL(clean ‖ substituted) summed over ten reference tokens, with h_BB + ΔX + ΔY in place of "
    "the XY residual at (layer, position)."
)
_PUBLISHED_CONDITION = {"remove_persona": "remove_X"}
_LONG_NAMES = {
    "cell": "persona/task",
    "n_layers": "number of decoder blocks",
    "precision": "precision of the model",
    "depth": "depth (layer / n_layers)",
}


@dataclass(frozen=True)
class _Model:
    """A model of the paper, as its §3.1 and the result files describe it."""

    name: str
    n_layers: int
    d_model: int
    precision: str
    architecture: str


_GEMMA = _Model("google/gemma-2-2b-it", 26, 2304, "float32", "Gemma2ForCausalLM")
_QWEN_SMALL = _Model("Qwen/Qwen2.5-1.5B-Instruct", 28, 1536, "bfloat16", "Qwen2ForCausalLM")
_QWEN_LARGE = _Model("Qwen/Qwen2.5-3B-Instruct", 36, 2048, "bfloat16", "Qwen2ForCausalLM")


def write_published(store: Path) -> None:
    """Write every published number, in place of the store that may be there.

    Args:
        store: the folder of the store; replaced as a whole.
    """
    short, long, review = (load_grid(name) for name in ("short", "long", "review"))
    runs = [
        _localized_positions("v15_gemma2b_localized_positions.json", _GEMMA, short),
        _localized_positions("v15_qwen15_localized_positions.json", _QWEN_SMALL, short),
        _localized_positions("v15_qwen3b_localized_positions.json", _QWEN_LARGE, short),
        _localized_positions("v16_gemma2b_diverse_grid.json", _GEMMA, long),
        _localized_positions("v16_qwen15_diverse_grid.json", _QWEN_SMALL, long),
        _behavioral_markers("v17_behavioral_markers.json", review),
        _host_injection("v14b_v2.json", "v14e_multilayer.json", review),
    ]
    if store.exists():
        shutil.rmtree(store)
    root = zarr.open_group(str(store), mode="w", zarr_format=3)
    root.attrs.update({"source": PAPER})
    for dataset in runs:
        root.require_group(dataset.attrs["experiment"])
        dataset.to_zarr(
            str(store),
            group=f"{dataset.attrs['experiment']}/{dataset.attrs['run']}",
            mode="w-",
            consolidated=False,
            zarr_format=3,
            encoding={name: {"chunks": array.shape} for name, array in dataset.variables.items()},
        )


def _localized_positions(file: str, model: _Model, grid: Grid) -> xr.Dataset:
    """§4 and §5: per-cell KL at the layers tested, summaries of the geometry."""
    published = _load(file)
    layers = list(range(model.n_layers + 1))
    positions = [position for position in _POSITIONS if position in published["causal"]]
    cells = _labels(grid)
    kl = _numbers(
        (cells, layers, positions),
        lambda cell, layer, position: published["causal"][position][str(layer)]["per_cell"][
            cell.replace("/", "__")
        ],
    )
    variables: dict[str, Any] = {
        "kl": _variable("cell layer position", kl, "causal KL", _KL, units="nat")
    }
    for name, (key, long_name) in _GEOMETRY.items():
        values = _numbers(
            (STATISTICS, layers, positions),
            lambda statistic, layer, position, key=key: _statistic(
                published["decomposition"][position][str(layer)][key], statistic
            ),
        )
        description = "Summary over the cells of the grid; the files hold no value of a cell."
        variables[name] = _variable("statistic layer position", values, long_name, description)
    coords = {"layer": layers, "position": positions, "statistic": STATISTICS}
    parameters = {"layers": published["layers_to_test"], "positions": positions, "n_eval": 10}
    return _run("localized_positions", model, grid, variables, coords, parameters, (file,), done=kl)


def _behavioral_markers(file: str, grid: Grid) -> xr.Dataset:
    """§6: markers found in 80 tokens under each condition."""
    published = _load(file)
    layers = [published["inject_layer"]]

    def found(cell: str, condition: str) -> Mapping[str, Any]:
        of_cell = published["results"][cell.replace("/", "__")]
        return of_cell[_PUBLISHED_CONDITION.get(condition, condition)]

    axes = (_labels(grid), layers, CONDITIONS)
    count = _numbers(axes, lambda cell, _, condition: found(cell, condition)["count"]).astype(int)
    present = _numbers(axes, lambda cell, _, condition: found(cell, condition)["any"]).astype(bool)
    dims = "cell layer condition"
    variables = {
        "any_marker": _variable(
            dims, present, "any marker", "At least one of the persona's markers is in the text."
        ),
        "distinct_markers": _variable(
            dims, count, "distinct markers", "Different markers of the persona in the text."
        ),
    }
    coords = {"layer": layers, "condition": CONDITIONS}
    parameters = {"layers": layers, "n_tokens": published["n_gen_tokens"]}
    name = "behavioral_markers"
    return _run(name, _GEMMA, grid, variables, coords, parameters, (file,), done=count)


def _host_injection(single: str, sets: str, grid: Grid) -> xr.Dataset:
    """§7: KL of the host prompt under each source, at one layer and at sets of layers."""
    at_one, at_sets = _load(single)["results"], _load(sets)["results"]
    labels = {name.replace("_", ","): name for name in at_sets}

    def value(cell: str, layer_set: str, source: str) -> float:
        key = cell.replace("/", "__")
        if source == "cached":
            return at_sets[labels[layer_set]]["kls"][key]
        if source == "oracle" and layer_set != "14":
            raise KeyError(layer_set)  # the oracle was injected at one layer only
        return at_one[key]["kl_host_clean" if source == "none" else "kl_oracle"]

    kl = _numbers((_labels(grid), list(labels), SOURCES), value)
    closure = 1 - kl / kl[..., [SOURCES.index("none")]]
    dims = "cell layer_set source"
    description = "KL(clean ‖ host) summed over ten tokens of the clean long-persona continuation."
    variables = {
        "kl": _variable(dims, kl, "causal KL", description, units="nat"),
        "closure": _variable(
            dims, closure, "closure", "1 − KL / KL(none), per cell; from the published KL."
        ),
    }
    coords = {"layer_set": list(labels), "source": SOURCES}
    parameters = {"layer_sets": list(labels), "n_eval": 10}
    files = (single, sets)
    return _run("host_injection", _GEMMA, grid, variables, coords, parameters, files, done=kl)


def _run(
    experiment: str,
    model: _Model,
    grid: Grid,
    variables: Mapping[str, Any],
    coords: Mapping[str, Sequence[Any]],
    parameters: Mapping[str, Any],
    files: Sequence[str],
    *,
    done: NDArray[Any],
) -> xr.Dataset:
    """One group of the store.

    Args:
        experiment: whose numbers these are.
        model: on which model.
        grid: on which grid.
        variables: arrays with ``model`` as leading dimension of size 1.
        coords: labels of the experiment's dimensions.
        parameters: what the experiment was asked for.
        files: where the numbers come from.
        done: [cell, …]; a cell is complete if any of its numbers is there.
    """
    complete = np.isfinite(done).reshape(len(done), -1).max(1)
    text = {name: hashlib.sha256((DATA / name).read_bytes()).hexdigest() for name in files}
    digest = content_digest([experiment, model.name, text])
    cells = grid.cells
    own = {
        "seconds": _variable(
            "cell", np.full(len(cells), np.nan), "time", "Not published.", units="s"
        ),
        "completed": _variable(
            "cell", complete, "cell is complete", "The files hold numbers of the cell."
        ),
    }
    shared: dict[str, tuple[str | tuple[str, ...], Sequence[Any]]] = {
        "model": ("model", [model.name]),
        "cell": ("cell", [cell.label for cell in cells]),
        "persona": ("cell", [cell.persona for cell in cells]),
        "task": ("cell", [cell.task for cell in cells]),
        "n_layers": ("model", [model.n_layers]),
        "precision": ("model", [model.precision]),
        **{name: (name, labels) for name, labels in coords.items()},
    }
    if layers := coords.get("layer"):
        shared["depth"] = (("model", "layer"), [[layer / model.n_layers for layer in layers]])
    attrs = {
        "experiment": experiment,
        "summary": "Published numbers, not measured here.",
        "source": f"{PAPER}, appendix C: {', '.join(f'results/{name}' for name in files)}",
        "source_digest": text,
        "run": f"{model.name.replace('/', '--')}.{grid.name}.{digest[:10]}",
        "protocol_version": PUBLISHED_VERSION,
        "identity": digest,
        "model": model.name,
        "model_source": model.name,
        "model_version": "",
        "architecture": model.architecture,
        "precision": model.precision,
        "attn_implementation": "eager",
        "n_layers": model.n_layers,
        "d_model": model.d_model,
        "grid": grid.name,
        "grid_digest": grid.digest,
        "personas": dict(grid.personas),
        "tasks": dict(grid.tasks),
        "parameters": dict(parameters),
        "created": CREATED,
        "variables": list(variables),
    }
    described = {name: _coordinate(name, dims, values) for name, (dims, values) in shared.items()}
    return xr.Dataset({**variables, **own}, described, attrs)


def _coordinate(name: str, dims: str | tuple[str, ...], values: Sequence[Any]) -> xr.Variable:
    """Labels as every store of ours has them: text of variable length, and described."""
    is_text = isinstance(values[0], str)
    attrs = {"long_name": _LONG_NAMES.get(name, name), "units": "1"}
    return xr.Variable(dims, np.asarray(values, dtype=object if is_text else None), attrs)


def _variable(
    dims: str, values: NDArray[Any], long_name: str, description: str, *, units: str = "1"
) -> tuple[tuple[str, ...], NDArray[Any], dict[str, str]]:
    attrs = {"long_name": long_name, "units": units, "description": description}
    return ("model", *dims.split()), values[None], attrs


def _numbers(axes: Sequence[Iterable[Any]], value: Callable[..., float]) -> NDArray[np.float64]:
    """An array over labels; NaN where the files hold nothing (`value` raises KeyError)."""
    labels = [list(axis) for axis in axes]
    numbers = np.full([len(axis) for axis in labels], np.nan)
    for place in np.ndindex(*numbers.shape):
        try:
            numbers[place] = value(*(axis[k] for axis, k in zip(labels, place, strict=True)))
        except KeyError:
            continue
    return numbers


def _statistic(summary: Mapping[str, Any], name: str) -> float:
    """One statistic of a published summary, whose quartiles are called ``iqr``."""
    return summary["iqr"][("q25", "q75").index(name)] if name in ("q25", "q75") else summary[name]


def _labels(grid: Grid) -> list[str]:
    return [cell.label for cell in grid.cells]


def _load(file: str) -> dict[str, Any]:
    return json.loads((DATA / file).read_text(encoding="utf-8"))


if __name__ == "__main__":
    write_published(Path(sys.argv[1]) if len(sys.argv) > 1 else published_store())
