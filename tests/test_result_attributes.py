"""What a Dataset of results says beside its numbers: attributes, bands, residuals; NetCDF."""

from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from test_store import CELLS, VARIABLES, make_block, values_of

from persona_nns.declarations.bands import band_labels, band_layers
from persona_nns.declarations.variables import Variable
from persona_nns.errors import UsageError
from persona_nns.results.allocation import attach
from persona_nns.results.attributes import read_attribute
from persona_nns.results.reading import open_results

NOTED = {
    "markers": {"chef": ["fresh", "sauté"]},
    "session": {"commit": None, "dirty": False},
    "template": "{%- if x %}{{ x }}",
    "system_role": True,
    "responses": None,
}


@pytest.mark.parametrize("n_cells", [0, 1, 3])
def test_every_result_is_written_to_netcdf(tmp_path: Path, n_cells: int) -> None:
    store = tmp_path / "s.zarr"
    for model in ("m", "n"):
        block = make_block(run=f"{model}.g.1", model=model, attrs={**NOTED, "model": model})
        group = attach(store, block)
        cells = list(enumerate(CELLS.values()))[:n_cells]
        group.write_units([(cell, values_of(index)) for index, cell in cells], seconds=1.0)
    for run in ("m.g.1", None):
        ds = open_results(store, "e", run=run)
        ds.to_netcdf(tmp_path / "ds.nc")
        with xr.open_dataset(tmp_path / "ds.nc") as back:
            for name in VARIABLES:
                np.testing.assert_array_equal(back[name].values, ds[name].values)
            assert read_attribute(back, "markers") == NOTED["markers"]
            assert back.kl.attrs["units"] == "nat"


def test_attributes_are_read_back_as_they_were_noted(tmp_path: Path) -> None:
    attach(tmp_path / "s.zarr", make_block(attrs=NOTED))
    ds = open_results(tmp_path / "s.zarr", "e")
    for name in ("markers", "session", "template"):
        assert read_attribute(ds, name) == NOTED[name]
    assert ds.attrs["template"] == NOTED["template"]
    assert ds.attrs["system_role"] == 1
    assert ds.attrs["grid"] == "g"
    assert read_attribute(ds, "parameters")["layers"] == [1, 3]
    assert read_attribute(ds, "absent", 5) == 5


def test_attributes_of_joined_models_stay(tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    parameters = {"layers": [1, 3], "positions": ["p_last", "g1"]}
    attach(store, make_block(attrs={**NOTED, "run": "m.g.1"}))
    other = {**NOTED, "model": "n", "run": "n.g.2", "parameters": {**parameters, "layers": [2]}}
    attach(
        store,
        make_block(run="n.g.2", model="n", layers=[2], attrs={**other, "created": "2027-01-01"}),
    )
    alike = {"parameters": parameters, "run": "k.g.3", "model": "k"}
    attach(store, make_block(run="k.g.3", model="k", attrs={**NOTED, **alike, "created": "2028"}))
    ds = open_results(store, "e")
    assert ds.model.values.tolist() == ["m", "n", "k"]
    assert read_attribute(ds, "markers") == NOTED["markers"]
    assert (ds.attrs["identity"], ds.attrs["system_role"]) == ("i", 1)
    assert read_attribute(ds, "run") == ["m.g.1", "n.g.2", "k.g.3"]
    assert [each["layers"] for each in read_attribute(ds, "parameters")] == [[1, 3], [2], [1, 3]]


def banded(store: Path, model: str, n_layers: int) -> None:
    """A run with a number for each band of a model's layers: how many layers it has."""
    labels = band_labels(n_layers)
    block = make_block(
        run=f"{model}.g.1",
        model=model,
        n_layers=n_layers,
        layers=[],
        positions=[],
        variables={"n": Variable("cell layer_band", "layers", coords={"layer_band": labels})},
        attrs={"model": model, "parameters": {}},
    )
    sizes = np.array([len(band_layers(label, n_layers)) for label in labels], dtype=np.float32)
    attach(store, block).write_units([(cell, {"n": sizes}) for cell in CELLS.values()], seconds=1.0)


def test_bands_have_their_bounds_as_coordinates(tmp_path: Path) -> None:
    banded(tmp_path / "s.zarr", "m", 5)
    ds = open_results(tmp_path / "s.zarr", "e")
    assert ds.band_start.dims == ds.band_stop.dims == ("layer_band",)
    assert ds.band_start.sel(layer_band=["all", "3", "0:2", "2:5"]).values.tolist() == [0, 3, 0, 2]
    assert ds.band_stop.sel(layer_band=["all", "3", "0:2", "2:5"]).values.tolist() == [5, 4, 2, 5]
    np.testing.assert_array_equal(ds.band_stop - ds.band_start, ds.n[0, 0])
    ds.to_netcdf(tmp_path / "ds.nc")


def test_bands_of_models_of_different_depth_have_bounds_of_their_own(tmp_path: Path) -> None:
    banded(tmp_path / "s.zarr", "m", 5)
    banded(tmp_path / "s.zarr", "n", 3)
    ds = open_results(tmp_path / "s.zarr", "e")
    assert ds.band_stop.sel(layer_band="all").values.tolist() == [5, 3]
    assert np.isnan(ds.band_start.sel(model="n", layer_band="2:5"))
    np.testing.assert_array_equal(ds.band_stop - ds.band_start, ds.n[:, 0])


def test_residuals_are_opened_where_they_are_asked_for(tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    attach(store, make_block())
    with pytest.raises(UsageError, match=r"'m\.g\.1' kept no residuals; .* keep_residuals=True"):
        open_results(store, "e", residuals=True)
    kept = {"residuals": Variable("cell layer d_model", "residual")}
    values = {"residuals": np.arange(6, dtype=np.float32).reshape(2, 3)}
    below = attach(store, make_block(run="m.g.1/residuals", variables=kept))
    below.write_units([(CELLS["chef/policy"], values)], seconds=1.0)
    ds = open_results(store, "e", residuals=True)
    assert ds.residuals.dims == ("model", "cell", "layer", "d_model")
    assert ds.residuals.sel(cell="chef/policy", layer=3).values.tolist() == [[3.0, 4.0, 5.0]]
    assert np.isnan(ds.residuals.sel(cell="chef/haiku")).all()
    assert "residuals" not in open_results(store, "e")
    attach(store, make_block(run="n.g.1", model="n", attrs={"model": "n"}))
    with pytest.raises(UsageError, match=r"choose one with run: m\.g\.1, n\.g\.1"):
        open_results(store, "e", residuals=True)
