"""Trait vectors in files of other tools: ``.npy``, ``.pt`` and ``.safetensors``.

A vector is [n_layers + 1, d_model]: a row for the residual stream entering each block, and one for
the stream after the final norm. A ``.pt`` is read with ``weights_only``, so it cannot run code.
"""

import pickle
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from persona_nns.errors import UsageError, one_line
from persona_nns.results.reading import list_runs, open_results
from persona_nns.tracing.averages import AVERAGES
from persona_nns.traits.trait import Trait, extraction_questions

SUFFIXES = (".npy", ".pt", ".safetensors")
# What the readers raise for files that are damaged, or that hold something else.
_UNREADABLE = (
    *(OSError, ValueError, RuntimeError, EOFError, LookupError, AttributeError, TypeError),
    *(pickle.UnpicklingError, struct.error, SafetensorError),
)


def read_vector(file: str | Path) -> Tensor:
    """Read one vector, [layer, d_model] in float32.

    Raises:
        UsageError: the file cannot be read, or holds something else.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise UsageError(f"The vector {str(file)!r} does not exist.")
    readers = {".npy": _read_npy, ".pt": _read_pt, ".safetensors": _read_safetensors}
    suffix = path.suffix.lower()
    if suffix not in readers:
        raise UsageError(f"The vector {str(file)!r} ends in none of {', '.join(SUFFIXES)}.")
    try:
        tensor = readers[suffix](path)
        plain = _plain(tensor)
        finite = plain is None or bool(torch.isfinite(plain).all())
    except _UNREADABLE as error:
        raise UsageError(f"The vector {str(file)!r} cannot be read: {_reason(error)}.") from error
    if plain is None:
        raise UsageError(
            f"The vector {str(file)!r} holds {_described(tensor)}; it has to be numbers of shape "
            "[n_layers + 1, d_model]."
        )
    if not finite:
        raise UsageError(f"The vector {str(file)!r} holds numbers that are not finite.")
    return plain


def _plain(tensor: Any) -> Tensor | None:
    """The same in float32, without zeros left out or gradients; None where it is no matrix."""
    if not isinstance(tensor, Tensor) or tensor.is_meta or not tensor.is_floating_point():
        return None
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    return tensor.detach().float() if tensor.dim() == 2 else None


def _described(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return "a tensor without numbers (meta)" if value.is_meta else str(list(value.shape))


def write_vector(vector: Tensor, file: str | Path) -> None:
    """Write one vector [layer, d_model]; the suffix chooses the format.

    Raises:
        UsageError: no such format or folder.
    """
    path = Path(file).expanduser()
    if not path.parent.is_dir():
        raise UsageError(f"The folder of {str(file)!r} does not exist.")
    vector = vector.detach().cpu().float().contiguous()
    if path.suffix == ".npy":
        np.save(path, vector.numpy())
    elif path.suffix == ".pt":
        torch.save(vector, path)
    elif path.suffix == ".safetensors":
        save_file({"vector": vector}, path)
    else:
        raise UsageError(f"{str(file)!r} ends in none of {', '.join(SUFFIXES)}.")


def _read_npy(path: Path) -> Tensor:
    return torch.from_numpy(np.load(path, allow_pickle=False))


def _reason(error: Exception) -> str:
    """What is wrong with a file, without its reader's advice to load it unsafely."""
    if isinstance(error, pickle.UnpicklingError) or "pickle" in str(error):
        return "it holds more than a tensor, or is damaged (no pickle is ever loaded)"
    return one_line(error).rstrip(".")


def _read_pt(path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice on what cannot be read; the error says it
        return torch.load(path, weights_only=True, map_location="cpu")


def _read_safetensors(path: Path) -> Tensor:
    tensors = load_file(path)
    if len(tensors) != 1:
        raise ValueError(f"it holds {len(tensors)} tensors ({', '.join(tensors)}), not one")
    return next(iter(tensors.values()))


def is_vector_file(source: str) -> bool:
    """Whether a vector is in a file, and not in a store.

    Raises:
        UsageError: there is nothing there.
    """
    path = Path(source).expanduser()
    if path.is_file() or path.suffix.lower() in SUFFIXES:
        return True
    if "://" not in source and not path.exists():
        raise UsageError(
            f"There is nothing at {source!r}: a vector is a {', '.join(SUFFIXES[:-1])} or "
            f"{SUFFIXES[-1]} file, or in a store with trait_vectors; there is no Zarr store either."
        )
    return False


def load_vector(
    source: str, trait: str, average: str, model: str, run: str | None = None
) -> Tensor:
    """A trait vector, [n_layers + 1, d_model].

    Args:
        source: a ``.npy``, ``.pt`` or ``.safetensors`` file, or a store with `trait_vectors`.
        trait: which one, where it is a store.
        average: over which tokens, where it is a store.
        model: label of the model it was made on, where it is a store.
        run: which run, where the store has several.

    Raises:
        UsageError: there is no such vector.
    """
    if is_vector_file(source):
        return read_vector(source)
    if average not in AVERAGES:
        raise UsageError(f"Unknown average {average!r}; use {', '.join(AVERAGES)}.")
    results = _open_vectors(source, trait, model, run)
    vector = results["vector"].sel(average=average).isel(trait=0)
    return torch.from_numpy(vector.transpose("layer", "d_model").values).float()


def _open_vectors(store: str, trait: str, model: str, run: str | None) -> xr.Dataset:
    runs = run or runs_of(store, "trait_vectors", trait, model)
    return open_results(store, "trait_vectors", run=runs).isel(model=0)


def check_unseen(
    asked: Trait,
    artifacts: str | Path | None,
    source: str,
    model: str,
    run: str | None = None,
    split_seed: int | None = None,
) -> None:
    """See that no question on which a vector is evaluated is one that it was made from.

    Args:
        asked: the questions.
        artifacts: folder of the trait, whose extraction questions vectors are made from.
        source: the vector, as in `load_vector`; a store also knows the questions of its rows.
        model: label of the model it was made on, where it is a store.
        run: which run, where the store has several.
        split_seed: what divides its one list of questions into halves, where it has one.

    Raises:
        UsageError: a question is not held out, or there is no such vector.
    """
    seen = set(extraction_questions(asked.name, artifacts, split_seed))
    if not is_vector_file(source):
        rows = _open_vectors(source, asked.name, model, run)
        seen |= set(rows.row_question.values[rows.kept.values == 1].tolist())
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
    found = [
        info
        for info in list_runs(store, experiment)
        if info.attrs["grid"] == trait and info.attrs["model"] == model
    ]
    if not found:
        raise UsageError(
            f"The store {str(store)!r} holds no {experiment} of {trait!r} for the model {model!r}; "
            f"run {experiment} first."
        )
    if len(found) > 1:
        raise UsageError(
            f"The store {str(store)!r} holds several {experiment} of {trait!r} for {model!r}; "
            "choose a run: " + "; ".join(info.describe() for info in found)
        )
    return found[0].run
