"""Arrays written here are those that zarr writes: metadata, files and what is read back."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from zarr.codecs import ZstdCodec

from persona_nns.declarations.variables import FILL, Kind
from persona_nns.results.chunks import label_array, unit_array, write_chunks

KINDS: dict[Kind, Any] = {"float": "float32", "int": "int64", "bool": "bool", "text": str}
SIZES = {"cell": 5, "layer": 3, "position": 2}
VALUES: dict[Kind, Any] = {
    "float": arrays("float32", (1, 2, 3, 2)),
    "int": arrays("int64", (1, 2, 3, 2)),
    "bool": arrays("bool", (1, 2, 3, 2)),
    # A text cannot end with the character 0: numpy drops it.
    "text": arrays(
        object, (1, 2, 3, 2), elements=st.text(max_size=9).map(lambda text: text.rstrip("\0"))
    ),
}


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and file.name != "zarr.json"
    }


def made_by_zarr(group: zarr.Group, kind: Kind, name: str = "theirs") -> Any:
    return group.create_array(
        name,
        shape=(1, *SIZES.values()),
        chunks=(1, 1, 3, 2),
        dtype=KINDS[kind],
        fill_value=FILL[kind],
        dimension_names=("model", *SIZES),
        compressors=ZstdCodec(checksum=True),
        chunk_key_encoding={"name": "default", "separator": "."},
        attributes={"units": "1"},
        overwrite=True,
    )


def made_here(group: zarr.Group, kind: Kind, name: str = "ours") -> Any:
    metadata = unit_array(kind, tuple(SIZES), SIZES, frozenset({"cell"}), {"units": "1"})
    return dict(group.create_hierarchy({name: metadata}, overwrite=True))[name]


@pytest.mark.parametrize("kind", KINDS)
def test_metadata_are_those_that_zarr_writes(tmp_path: Path, kind: Kind) -> None:
    group = zarr.open_group(tmp_path, mode="w")
    made_by_zarr(group, kind)
    made_here(group, kind)
    ours, theirs = (
        json.loads((tmp_path / name / "zarr.json").read_bytes()) for name in ("ours", "theirs")
    )
    assert ours == theirs


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), start=st.integers(0, 3), part=st.sampled_from(["all", "some", "nothing"]))
def test_chunks_are_the_bytes_that_zarr_writes(
    tmp_path: Path, kind: Kind, data: Any, start: int, part: str
) -> None:
    values = np.array(data.draw(VALUES[kind]))
    if part != "all":  # nothing is written of a chunk of what the array is filled with
        values[:, : 1 if part == "some" else 2] = FILL[kind]
    group = zarr.open_group(tmp_path, mode="w")
    ours, theirs = made_here(group, kind), made_by_zarr(group, kind)
    region = (slice(1), slice(start, start + 2), slice(None), slice(None))
    write_chunks(ours, region, values)
    theirs[region] = values
    assert files(tmp_path / "ours") == files(tmp_path / "theirs")
    np.testing.assert_array_equal(group["ours"][...], group["theirs"][...])  # pyright: ignore
    np.testing.assert_array_equal(np.asarray(ours[region], dtype=values.dtype), values)


def test_a_chunk_is_written_again_as_what_the_array_is_filled_with(tmp_path: Path) -> None:
    array = made_here(zarr.open_group(tmp_path, mode="w"), "float")
    whole = tuple(map(slice, array.shape))
    write_chunks(array, whole, np.ones(array.shape, "float32"))
    write_chunks(array, whole, np.full(array.shape, np.nan, "float32"))
    assert np.isnan(array[...]).all()
    assert not files(tmp_path)


def test_a_part_of_a_chunk_is_refused(tmp_path: Path) -> None:
    array = made_here(zarr.open_group(tmp_path, mode="w"), "float")
    region = (slice(1), slice(1), slice(2), slice(None))
    with pytest.raises(ValueError, match="is no chunk of"):
        write_chunks(array, region, np.zeros((1, 1, 2, 2), "float32"))
    assert not files(tmp_path)


def test_values_of_another_precision_and_order_are_written_as_the_array_says(
    tmp_path: Path,
) -> None:
    array = made_here(zarr.open_group(tmp_path, mode="w"), "float")
    values = np.random.default_rng(0).normal(size=array.shape[::-1]).T  # float64, strided
    write_chunks(array, tuple(map(slice, array.shape)), values)
    np.testing.assert_array_equal(array[...], values.astype("float32"))


def test_a_large_unit_is_a_shard_that_zarr_writes(tmp_path: Path) -> None:
    sizes = {"cell": 2, "layer": 2, "position": 2, "d_model": 2**16}
    metadata = unit_array("float", tuple(sizes), sizes, frozenset({"cell"}), {})
    group = zarr.open_group(tmp_path, mode="w")
    array: Any = dict(group.create_hierarchy({"large": metadata}))["large"]
    assert (array.shards, array.chunks) == ((1, 1, 2, 2, 2**16), (1, 1, 1, 1, 2**16))
    values = np.random.default_rng(0).normal(size=(1, 1, 2, 2, 2**16)).astype("float32")
    write_chunks(array, (slice(1), slice(1, 2), *[slice(None)] * 3), values)
    assert list(files(tmp_path / "large")) == ["c.0.1.0.0.0"]
    np.testing.assert_array_equal(array[0, 1], values[0, 0])
    assert np.isnan(array[0, 0]).all()


@pytest.mark.parametrize(
    ("kind", "labels"),
    [("text", ["a", "", "é\n"]), ("int", [0, 7]), ("float", [0.0, 0.25]), ("text", [""])],
)
def test_labels_are_read_as_they_were_written(tmp_path: Path, kind: Kind, labels: Any) -> None:
    values = np.asarray(labels, dtype=object if kind == "text" else None)
    metadata = label_array(kind, ["label"], values.shape, {"units": "1"})
    group = zarr.open_group(tmp_path, mode="w")
    array: Any = dict(group.create_hierarchy({"label": metadata}))["label"]
    write_chunks(array, (slice(len(labels)),), values)
    found: Any = zarr.open_group(tmp_path, mode="r")["label"]
    assert np.asarray(found[...]).tolist() == labels
