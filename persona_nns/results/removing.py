"""A run taken out of a store, so that whatever cuts it off, no unit is taken for complete.

What says that units are complete goes first, then what says that there is a run; the rest comes
after that has reached the disk. What is left of a removal that was cut off is no run: removing it
again takes it away, and the same run measured again finds nothing complete in it. Runs that took
units over from this one keep them: they have copies.
"""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from persona_nns.errors import PersonaError, UsageError
from persona_nns.results.claims import at_work
from persona_nns.results.locations import Location, location_of
from persona_nns.results.store import begun_group

_REQUESTS_AT_A_TIME = 8


def remove_run(store: str | Path, experiment: str, run: str) -> None:
    """Remove a run with everything below it, or what a removal that was cut off has left of it.

    Args:
        store: path or URL of the store.
        experiment: name of the experiment.
        run: name of the run's group.

    Raises:
        UsageError: there is no such group, or a process of this machine computes it. (Of those of
            other machines nobody knows: `results.claims.at_work`.)
        PersonaError: the store cannot be written.
    """
    path = f"{experiment}/{run}"
    group = begun_group(store, experiment, run)
    if group is None:
        raise UsageError(f"There is no run {path!r} in {str(store)!r}.")
    here, _ = at_work(group)
    if here:
        raise UsageError(f"The run {path} is being computed ({', '.join(here)}); end that first.")
    location = location_of(store)
    try:
        if location.folder is not None:
            _remove_folder(location, location.folder / path)
        else:
            _remove_objects(location, path)
    except OSError as error:
        raise PersonaError(
            f"The run {path} could not be removed ({error}); what is left of it holds nothing "
            "that is complete, and the same command goes on."
        ) from error


def _remove_folder(location: Location, folder: Path) -> None:
    for file in sorted(folder.rglob("completed/*"), key=_rank):
        file.unlink()
    location.flush()
    for child in folder.iterdir():
        if child.is_dir():
            shutil.rmtree(child)
    shutil.rmtree(folder)


def _remove_objects(location: Location, group: str) -> None:
    filesystem, root = location.filesystem()
    path = f"{root}/{group}"
    if location.is_on_hub:
        filesystem.rm(path, recursive=True)  # one commit: all of it or nothing
        return
    names: list[str] = filesystem.find(path)
    flags = [name for name in names if "/completed/" in name]
    chunks = [name for name in flags if not name.endswith("/zarr.json")]
    last = f"{path}/zarr.json"
    rest = [name for name in names if name not in flags and name != last]
    with ThreadPoolExecutor(_REQUESTS_AT_A_TIME) as pool:  # each waits for a server
        for some in (chunks, [*{*flags} - {*chunks}], rest, [last]):
            # One by one: `rm` would take a name with brackets in it for a pattern.
            list(pool.map(filesystem.rm_file, some))


def _rank(file: Path) -> tuple[bool, str]:
    """Chunks before the metadata: without these, other processes would see no flags to set."""
    return file.name == "zarr.json", str(file)
