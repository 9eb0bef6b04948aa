"""A cache that goes through a labelled array and Zarr comes back bit for bit."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from nnsight import TransformersModel

from persona_nns.errors import PersonaError, UsageError
from persona_nns.models.load import load_model, record_of
from persona_nns.results.caches import label_cache, open_cache, write_cache
from persona_nns.tracing.kv.arrays import unlabel_cache
from persona_nns.tracing.kv.cache import KVCache
from persona_nns.tracing.kv.rotation import read_rotation
from persona_nns.tracing.kv.splice import Piece, splice
from persona_nns.tracing.prefixes import fill_cache

ROWS = [[5 + (37 * k) % 1000 for k in range(n)] for n in (27, 33, 19)]
CELLS = ["chef/haiku", "chef/policy", "yoda/haiku"]


def assert_same(one: KVCache, other: KVCache) -> None:
    assert one.dtype is other.dtype
    assert torch.equal(one.attention_mask, other.attention_mask)
    assert torch.equal(one.position_ids, other.position_ids)
    held = one.attention_mask[:, None, :, None] > 0
    for mine, theirs in zip((*one.keys, *one.values), (*other.keys, *other.values), strict=True):
        assert torch.equal(mine.where(held, 0), theirs.where(held, 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["qwen2", "gemma3"])
def test_through_zarr_and_back(
    tmp_path: Path, make_folder: Callable[..., Path], name: str, dtype: torch.dtype
) -> None:
    model = load_model(make_folder(name, dtype=dtype))
    cache = fill_cache(model, ROWS)
    assert cache.dtype is dtype
    array = label_cache(cache, CELLS, record_of(model))
    assert array.dims == ("cell", "layer", "kv", "head", "position", "d_head")
    assert array.shape == (3, 5, 2, 2, 33, 8)
    write_cache(tmp_path / "s.zarr", f"caches/{name}", array)
    stored = open_cache(tmp_path / "s.zarr", f"caches/{name}")
    assert stored.dtype == np.float32
    assert_same(unlabel_cache(stored, record_of(model)), cache)
    # Positions are absolute: the shorter row has none beyond its own.
    one = stored.sel(cell="yoda/haiku", kv="key", layer=2)
    assert one.dims == ("head", "position", "d_head")
    assert int(one.notnull().all(("head", "d_head")).sum()) == 19
    expected = cache.keys[2][2, :, -19:].float().numpy()
    np.testing.assert_array_equal(one.sel(position=slice(0, 18)), expected)
    alone = unlabel_cache(stored.sel(cell="yoda/haiku"), record_of(model))
    assert alone.width == 19
    assert torch.equal(alone.values[4][0], cache.values[4][2, :, -19:])
    with pytest.raises(UsageError, match="already holds a group"):
        write_cache(tmp_path / "s.zarr", f"caches/{name}", array)
    with pytest.raises(UsageError, match="holds no cache 'caches/other'"):
        open_cache(tmp_path / "s.zarr", "caches/other")
    with pytest.raises(UsageError, match="There is no Zarr store"):
        open_cache(tmp_path / "none.zarr", "caches")


def test_a_cache_goes_where_every_store_goes(
    tmp_path: Path,
    random_model: Callable[[str], TransformersModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = random_model("qwen2")
    array = label_cache(fill_cache(model, ROWS), CELLS, record_of(model))
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UsageError, match=r"no Zarr store at '~/s\.zarr'"):
        open_cache("~/s.zarr", "c")
    write_cache("~/s.zarr", "c", array)
    assert (tmp_path / "s.zarr" / "c" / "zarr.json").exists()
    np.testing.assert_array_equal(open_cache("~/s.zarr", "c"), array)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="exists and is no Zarr store"):
        write_cache(tmp_path / "file", "c", array)


def test_spare_places_stay_empty(random_model: Callable[[str], TransformersModel]) -> None:
    model = random_model("qwen2")
    filled = fill_cache(model, ROWS)
    pieces = [
        Piece(filled, [range(3)] * 3),
        Piece(filled, [range(3, 6)] * 3, slots=[5] * 3),
        Piece(filled, [range(6, 9), range(6, 20), range(6, 9)]),
    ]
    cache = splice(pieces, read_rotation(model, 10))
    array = label_cache(cache, CELLS, record_of(model))
    present = array.isel(layer=0, kv=0, head=0, d_head=0).notnull()
    assert present.sum("position").values.tolist() == [9, 20, 9]
    assert_same(unlabel_cache(array, record_of(model)), cache)


def test_a_cache_of_another_model_or_precision_is_refused(
    random_model: Callable[[str], TransformersModel], random_folder: Callable[[str], Path]
) -> None:
    model = random_model("qwen2")
    array = label_cache(fill_cache(model, ROWS), CELLS, record_of(model))
    half = load_model(random_folder("qwen2"), dtype="bfloat16")
    with pytest.raises(UsageError, match="of the model 'qwen2' in float32, not of 'llama'"):
        unlabel_cache(array, record_of(random_model("llama")))
    with pytest.raises(UsageError, match="not of 'qwen2' in bfloat16"):
        unlabel_cache(array, record_of(half))
    forgotten = array.copy()
    forgotten[:, 1, :, :, :4] = np.nan
    with pytest.raises(PersonaError, match="Layer 1 of this cache lacks positions"):
        unlabel_cache(forgotten, record_of(model))
