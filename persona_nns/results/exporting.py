"""Results as files for other programs: tidy tables, or netCDF.

A table has a row for each combination of labels (model, cell, layer, position …), their further
coordinates (persona, task, depth) beside them, and a column for each variable. Variables of other
dimensions have a table of their own. There is no row for what was not measured: units that are not
complete, layers that a model lacks. Integers and truth values stay what they are; a number that is
missing in a row that others are in is empty.
"""

import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import xarray as xr

from persona_nns.errors import UsageError, missing_extra, one_line

_BOOKKEEPING = ("seconds", "completed")
_NULLABLE = {"int": "Int64", "bool": "boolean"}
_DONE = "the unit is complete"  # a name that no variable has


def export_results(
    results: xr.Dataset, file: Path, variables: Sequence[str] | None = None
) -> list[str]:
    """Write results to a file, and to others beside it where there are several tables.

    Files are put in place whole, over what was there. Of tables, the one that the first variable
    is in has the name that was asked for, others theirs and that of their dimensions
    (``kl-cell_position.csv``). Beside a CSV, ``<name>-columns.csv`` says what its columns mean;
    Parquet and netCDF hold that themselves.

    Args:
        results: from `open_results`.
        file: ``.csv`` (UTF-8), ``.parquet`` or ``.nc``.
        variables: only these; by default all but ``seconds`` and ``completed``, which netCDF has
            too.

    Returns:
        The files that were written.

    Raises:
        UsageError: no such variable or format, pyarrow is missing, or the file cannot be written.
    """
    suffix = file.suffix.lower()
    if suffix not in (".csv", ".parquet", ".nc"):
        raise UsageError(f"{file.name!r} is no name for an export; use .csv, .parquet or .nc.")
    for name in variables or ():
        if name not in results.data_vars:
            known = ", ".join(map(str, results.data_vars))
            raise UsageError(f"There is no variable {name!r}; there are: {known}.")
    if suffix == ".nc":
        chosen = results if variables is None else results[list(variables)]
        return _write({file: lambda path: _write_netcdf(chosen, path)})
    made = tables(results, variables)
    if suffix == ".parquet":
        return _write({_named(file, dims, made): _parquet_of(results, made[dims]) for dims in made})
    files = {_named(file, dims, made): frame for dims, frame in made.items()}
    writers = {path: _csv_of(frame) for path, frame in files.items()}
    columns: Any = pd.concat(
        [_columns(results, frame).assign(file=path.name) for path, frame in files.items()]
    )
    columns = columns[["file", *columns.columns.drop("file")]]
    return _write({**writers, file.with_stem(f"{file.stem}-columns"): _csv_of(columns)})


def tables(
    results: xr.Dataset, variables: Sequence[str] | None = None
) -> dict[tuple[str, ...], pd.DataFrame]:
    """Results as tidy tables, one for each set of dimensions that variables have.

    Args:
        results: from `open_results`.
        variables: only these; by default all but ``seconds`` and ``completed``.

    Returns:
        By dimensions, in the order of the variables; without rows in which nothing was measured.
    """
    names = variables or [str(name) for name in results.data_vars if name not in _BOOKKEEPING]
    by_dims: dict[frozenset[str], list[str]] = {}
    for name in names:
        by_dims.setdefault(frozenset(map(str, results[name].dims)), []).append(name)
    return {tuple(map(str, results[of[0]].dims)): _table(results, of) for of in by_dims.values()}


def _table(results: xr.Dataset, names: Sequence[str]) -> pd.DataFrame:
    dims = [str(dim) for dim in results[names[0]].dims]
    completed = results["completed"]
    done = completed.any([dim for dim in completed.dims if dim not in dims])
    part = results[list(names)].assign({_DONE: done})
    # An array may be called as one of its dimensions, which has no labels then.
    called = {dim: f"{dim}_index" for dim in dims if dim in part and part[dim].dims != (dim,)}
    order = [called.get(dim, dim) for dim in dims]
    frame: Any = part.rename_dims(called).to_dataframe(dim_order=order).reset_index()
    # Texts say nothing of it: a model may have said nothing.
    numbers = [name for name in names if results[name].dtype.kind != "O"]
    measured = frame[numbers].notna().any(axis=1) if numbers else True
    frame = frame[frame[_DONE].astype(bool) & measured].reset_index(drop=True)
    for name in names:
        if (kind := results[name].attrs.get("kind")) in _NULLABLE:
            frame[name] = frame[name].astype(_NULLABLE[kind])
    beside = [name for name in frame.columns if name not in (*order, *names, _DONE)]
    return frame[[*order, *beside, *names]]


def _columns(results: xr.Dataset, frame: pd.DataFrame) -> pd.DataFrame:
    """What the columns of a table mean."""
    rows = [{"column": name, **_meaning(results, str(name))} for name in frame.columns]
    return pd.DataFrame(rows)


def _meaning(results: xr.Dataset, name: str) -> dict[str, str]:
    attrs = results[name].attrs if name in results.variables else {}
    told = ("long_name", "units", "description")
    return {key: str(attrs.get(key, "")) for key in told}


def _named(file: Path, dims: tuple[str, ...], made: Mapping[tuple[str, ...], Any]) -> Path:
    """The file of a table: the first has the name that was asked for."""
    if dims == next(iter(made)):
        return file
    return file.with_stem(f"{file.stem}-{'_'.join(dims[1:] or dims)}")


def _csv_of(frame: pd.DataFrame) -> Callable[[Path], object]:
    # R takes TRUE for a truth value, and not True.
    said: Any = {True: "TRUE", False: "FALSE"}
    truths = frame.select_dtypes(["bool", "boolean"]).columns
    shown = frame.assign(**{name: frame[name].map(said) for name in truths})
    return lambda path: shown.to_csv(path, index=False, encoding="utf-8")


def _parquet_of(results: xr.Dataset, frame: pd.DataFrame) -> Callable[[Path], object]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise missing_extra("Parquet files need pyarrow", "export") from error
    table = pa.Table.from_pandas(frame, preserve_index=False)
    fields = [field.with_metadata(_meaning(results, field.name)) for field in table.schema]
    about = {"results": json.dumps(results.attrs, ensure_ascii=False)}
    schema = pa.schema(fields, {**(table.schema.metadata or {}), **about})
    return lambda path: pq.write_table(table.cast(schema), path)


def _write_netcdf(results: xr.Dataset, path: Path) -> None:
    # By netCDF4 or h5netcdf where one is installed, else as netCDF 3.
    try:
        results.to_netcdf(path)
    except (ValueError, TypeError) as error:
        raise UsageError(
            f"netCDF 3 does not hold this ({one_line(error)[:-1]}); netCDF 4 needs another "
            "package: pip install 'persona-nns[export]'."
        ) from error


def _write(writers: Mapping[Path, Callable[[Path], object]]) -> list[str]:
    """Write files, each put in place whole."""
    for file, writer in writers.items():
        with in_place(file) as path:
            writer(path)
    return [str(file) for file in writers]


@contextmanager
def in_place(file: Path) -> Iterator[Path]:
    """A path beside a file, which takes its place once it is written.

    Raises:
        UsageError: it cannot be written.
    """
    path = file.with_name(f".{file.stem}-{secrets.token_hex(4)}{file.suffix}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        yield path
        os.replace(path, file)
    except OSError as error:
        raise UsageError(f"The file {str(file)!r} cannot be written: {one_line(error)}") from error
    finally:
        path.unlink(missing_ok=True)
