"""Stores are merged a unit at a time: nothing is lost, nothing is overwritten, in any order."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from store_writer import block_of, cells_of, plan_of, values_are_right, values_of, write_all
from test_crash import Killed, fail_at

import persona_nns as pn
from persona_nns.declarations.variables import Variable
from persona_nns.published.store import published_store
from persona_nns.results.allocation import attach
from persona_nns.results.groups import open_root
from persona_nns.results.merging import PlacedUnit, merge_stores, other_groups
from persona_nns.results.reading import list_runs, open_results
from persona_nns.results.store import RunGroup, find_group

CELLS = cells_of(range(4))


def write(store: str | Path, indices: list[int], **attrs: Any) -> RunGroup:
    """A run of four cells, of which some are complete."""
    block = block_of(4)
    group = attach(store, replace(block, attrs={**block.attrs, **attrs}))
    cells = [CELLS[index] for index in indices]
    arrays = values_of(cells)
    rows = [
        (cell, {name: array[row, ...] for name, array in arrays.items()})
        for row, cell in enumerate(cells)
    ]
    for row, index in zip(rows, indices, strict=True):
        group.write_units([row], seconds=index + 0.5)
    return group


def test_a_run_that_is_missing_comes_whole_and_as_it_is(tmp_path: Path) -> None:
    a, b = tmp_path / "a.zarr", tmp_path / "b.zarr"
    group = write(b, [0, 2], name="mine", session={"python": "3"})
    group.note("sessions", "s1", {"claims": [], "ended": "2026", "n_written": 2})
    group.note("jobs", "j1", {"id": "1", "state": "waiting", "units": ["p000/t"]})
    write_all(b, 3, 1, identity="other")
    (one, two) = merge_stores(a, b)
    assert (one.run, one.is_new, one.n_added, one.n_complete, one.n_units) == (
        *("m.g.i", True),
        *(2, 2, 4),
    )
    assert (two.run, two.n_added) == ("m.g.other", 3)
    for run in ("m.g.i", "m.g.other"):
        xr.testing.assert_identical(
            open_results(a, "e", run=run),
            open_results(b, "e", run=run),
        )
    copied = find_group(a, "e", "m.g.i")
    assert copied is not None
    assert copied.attrs == group.attrs
    assert copied.notes("sessions") == group.notes("sessions")
    assert copied.notes("jobs") == group.notes("jobs")
    files = [
        sorted(str(f.relative_to(root)) for f in root.rglob("*") if f.is_file()) for root in (a, b)
    ]
    assert files[0] == files[1]
    for file in files[0]:
        assert (a / file).read_bytes() == (b / file).read_bytes()


def test_units_that_only_one_store_has_are_added_and_the_run_is_as_old_as_the_older(
    tmp_path: Path,
) -> None:
    a, b = tmp_path / "a.zarr", tmp_path / "b.zarr"
    write(a, [0, 1], created="2026-03-01T00:00:00+00:00")
    write(b, [1, 3], created="2026-02-01T00:00:00+00:00", name="b")
    before = (b / "e" / "m.g.i" / "zarr.json").read_bytes()
    (merged,) = merge_stores(a, b)
    assert (merged.is_new, merged.n_added, merged.n_complete) == (False, 1, 3)
    results = open_results(a, "e")
    assert results.completed.values[0].tolist() == [True, True, False, True]
    assert values_are_right(results)
    assert results.seconds.values[0].tolist()[:2] == [0.5, 1.5]
    assert results.seconds.values[0, 3] == 3.5
    (info,) = list_runs(a)
    assert (info.attrs["created"], info.attrs["name"]) == ("2026-02-01T00:00:00+00:00", "b")
    assert (b / "e" / "m.g.i" / "zarr.json").read_bytes() == before
    assert [each.n_added for each in merge_stores(a, b)] == [0]
    (back,) = merge_stores(b, a)
    assert (back.n_added, back.n_complete) == (1, 3)


def test_the_same_run_in_another_order_and_by_another_name_is_the_same(tmp_path: Path) -> None:
    a, b = tmp_path / "a.zarr", tmp_path / "b.zarr"
    write(a, [0])
    plan = plan_of(4)
    order = [3, 1, 0, 2]
    turned = replace(
        plan,
        axes={"cell": [CELLS[k].label for k in order]},
        coords={"persona": ("cell", [CELLS[k].persona for k in order])},
    )
    group = attach(b, replace(block_of(4), run="m.h.i", plan=turned))
    arrays = values_of([CELLS[3]])
    group.write_units([(CELLS[3], {name: each[0, ...] for name, each in arrays.items()})], 1.0)
    (merged,) = merge_stores(a, b)
    assert (merged.run, merged.n_complete) == ("m.g.i", 2)
    results = open_results(a, "e")
    assert results.completed.values[0].tolist() == [True, False, False, True]
    assert values_are_right(results)


@pytest.mark.parametrize(
    ("name", "index", "value", "said"),
    [
        ("kl", (0, 1, 0, 0), 9.0, r"'kl' of the cell 'p001/t' is 1\.25 there and 9\.0 in the"),
        ("n_eval", (0, 1, 1), 7, "'n_eval' of the cell 'p001/t' is 2 there and 7 in"),
        ("text", (0, 1), "else", "'text' of the cell 'p001/t' is naïve .* there and else in"),
        ("hit", (0, 1, 0), False, "'hit' of the cell 'p001/t' is True there and False in"),
    ],
)
def test_other_numbers_are_refused_before_anything_is_written(
    tmp_path: Path, name: str, index: Any, value: Any, said: str
) -> None:
    a, b = tmp_path / "a.zarr", tmp_path / "b.zarr"
    write(a, [0, 1])
    write_all(b, 2, 2, identity="first")  # it would be merged before the other
    write(b, [0, 1, 2], created="2027-01-01T00:00:00+00:00")
    zarr.open_group(str(a / "e" / "m.g.i"))[name][index] = value  # type: ignore[index]
    with pytest.raises(pn.PersonaError, match=said) as caught:
        merge_stores(a, b)
    assert "nothing was merged" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [info.run for info in list_runs(a)] == ["m.g.i"]
    assert open_results(a, "e").completed.sum() == 2


def test_what_differs_by_rounding_stays_as_the_target_has_it(tmp_path: Path) -> None:
    a, b = tmp_path / "a.zarr", tmp_path / "b.zarr"
    write(a, [0, 1])
    write(b, [0, 1, 2])
    zarr.open_group(str(a / "e" / "m.g.i"))["kl"][0, 1, 0, 0] = 1.2501  # type: ignore[index]
    merge_stores(a, b)
    results = open_results(a, "e")
    assert results.kl.values[0, 1, 0, 0] == np.float32(1.2501)
    assert results.completed.sum() == 3


@pytest.mark.parametrize(
    ("attrs", "said"),
    [
        ({"precision": "bfloat16"}, "the precision 'float32' in the target and 'bfloat16' in"),
        ({"server_revision": "c0ffee"}, "the server_revision None in the target and 'c0ffee'"),
        ({"identity": "another"}, "is another one in the target"),
    ],
)
def test_what_is_no_longer_the_same_run_is_refused(tmp_path: Path, attrs: Any, said: str) -> None:
    write(tmp_path / "a.zarr", [0])
    write(tmp_path / "b.zarr", [1], **attrs)
    with pytest.raises(pn.PersonaError, match=said):
        merge_stores(tmp_path / "a.zarr", tmp_path / "b.zarr")
    assert open_results(tmp_path / "a.zarr", "e").completed.sum() == 1


def test_other_variables_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.zarr", [0])
    block = block_of(4)
    more = {**block.variables, "more": Variable("cell", "more")}
    attach(tmp_path / "b.zarr", replace(block, variables=more))
    with pytest.raises(pn.PersonaError, match="other variables or labels"):
        merge_stores(tmp_path / "a.zarr", tmp_path / "b.zarr")


def test_a_store_is_not_merged_into_itself_and_has_to_be_there(tmp_path: Path) -> None:
    write(tmp_path / "a.zarr", [0])
    with pytest.raises(pn.UsageError, match="merged into itself"):
        merge_stores(tmp_path / "a.zarr", tmp_path / "a.zarr")
    with pytest.raises(pn.UsageError, match="no Zarr store"):
        merge_stores(tmp_path / "a.zarr", tmp_path / "no.zarr")


def test_residuals_and_units_on_several_dimensions_come_along(tmp_path: Path) -> None:
    a, b = tmp_path / "a.zarr", tmp_path / "b.zarr"
    write(b, [1])
    kept = {"residuals": Variable("cell layer d_model", "residual")}
    below = attach(b, replace(block_of(4), run="m.g.i/residuals", variables=kept))
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    below.write_units([(CELLS[1], {"residuals": values})], 1.0)
    pairs = [PlacedUnit({"left": left, "right": right}) for left in "ab" for right in "xyz"]
    axes = {"left": ["a", "b"], "right": ["x", "y", "z"]}
    plan = replace(plan_of(0), units=pairs, axes=axes, unit_axes=("left", "right"), coords={})
    variables = {"n": Variable("right left", "a number", kind="int")}
    block = replace(block_of(0, "pairs"), plan=plan, variables=variables)
    chosen = [pairs[1], pairs[2], pairs[3]]
    for store, of in ((a, chosen[:1]), (b, chosen)):
        rows = [(pair, {"n": np.asarray(chosen.index(pair))}) for pair in of]
        attach(store, block).write_units(rows, 1.0)
    merge_stores(a, b)
    for run, residuals in (("m.g.i", True), ("m.g.pairs", False)):
        xr.testing.assert_identical(
            open_results(a, "e", run=run, residuals=residuals),
            open_results(b, "e", run=run, residuals=residuals),
        )


def test_units_with_a_place_beyond_those_of_completed_come_along(tmp_path: Path) -> None:
    a, b = tmp_path / "a.zarr", tmp_path / "b.zarr"
    units = [
        PlacedUnit({"left": "a"}),
        PlacedUnit({"left": "a", "right": "x"}),
        PlacedUnit({"left": "b", "right": "y"}),
    ]
    axes = {"left": ["a", "b"], "right": ["x", "y"]}
    plan = replace(plan_of(0), units=units, axes=axes, unit_axes=("left",), coords={})
    variables = {
        "alone": Variable("left", "of the first axis"),
        "both": Variable("left right", "of both", kind="int"),
    }
    group = attach(b, replace(block_of(0), plan=plan, variables=variables))
    group.write_units([(units[2], {"both": np.asarray(7)})], 1.0)
    merge_stores(a, b)
    xr.testing.assert_identical(open_results(a, "e"), open_results(b, "e"))
    assert open_results(a, "e").both.sel(left="b", right="y").item() == 7


def test_the_published_numbers_are_merged(tmp_path: Path) -> None:
    merge_stores(tmp_path / "a.zarr", published_store())
    for info in list_runs(published_store()):
        xr.testing.assert_identical(
            open_results(tmp_path / "a.zarr", info.experiment, run=info.run),
            open_results(published_store(), info.experiment, run=info.run),
        )


def test_a_session_that_goes_on_elsewhere_claims_nothing_here(tmp_path: Path) -> None:
    a, b = tmp_path / "a.zarr", tmp_path / "b.zarr"
    group = write(b, [0])
    group.note(
        "sessions", "s", {"claims": ["p001/t"], "process": 1, "host": "h", "started": "then"}
    )
    merge_stores(a, b)
    copied = find_group(a, "e", "m.g.i")
    assert copied is not None
    assert copied.sessions()["s"]["claims"] == []
    assert copied.sessions()["s"]["ended"] == "then"
    group.note("sessions", "s", {"claims": [], "ended": "later", "n_written": 3})
    merge_stores(a, b)
    assert copied.notes("sessions")["s"] == {"claims": [], "ended": "later", "n_written": 3}


def test_groups_that_are_no_runs_are_named(tmp_path: Path) -> None:
    write(tmp_path / "b.zarr", [0])
    zarr.open_group(str(tmp_path / "b.zarr")).create_group("cache")
    assert other_groups(tmp_path / "b.zarr") == ["cache"]


def test_a_run_that_grows_while_it_is_merged_from(tmp_path: Path) -> None:
    """Every step of another process that adds cells, between any two of ours."""
    a, b = tmp_path / "a.zarr", tmp_path / "b.zarr"
    group = write(b, [0])
    left = [1, 2, 3]
    original = RunGroup.read_units

    def read(self: RunGroup, units: Any, name: str) -> Any:
        if left:
            write(b, [left.pop(0)])
        return original(self, units, name)

    patch = pytest.MonkeyPatch()
    patch.setattr(RunGroup, "read_units", read)
    try:
        (merged,) = merge_stores(a, b)
    finally:
        patch.undo()
    assert (merged.n_added, merged.n_complete) == (1, 1)
    assert group.flags().all()
    assert values_are_right(open_results(a, "e"))
    (merged,) = merge_stores(a, b)
    assert (merged.n_added, merged.n_complete) == (3, 4)
    assert values_are_right(open_results(a, "e"))


@settings(max_examples=8)
@given(put=st.integers(0, 70), had=st.sets(st.integers(0, 3)), has=st.sets(st.integers(0, 3)))
def test_whatever_cuts_a_merge_off_the_same_merge_goes_on(
    put: int, had: set[int], has: set[int]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        a, b = Path(folder) / "a.zarr", Path(folder) / "b.zarr"
        if had:
            write(a, sorted(had))
        write(b, sorted(has))
        patch = fail_at(put, Killed)
        try:
            merge_stores(a, b)
        except Killed:
            pass
        finally:
            patch.undo()
        if open_root(a) is not None and list_runs(a):
            cut = open_results(a, "e")
            assert values_are_right(cut)
            assert cut.completed.values[0, sorted(had)].all()
        merge_stores(a, b)
        results = open_results(a, "e")
        assert set(np.flatnonzero(results.completed.values[0]).tolist()) == had | has
        assert values_are_right(results)
