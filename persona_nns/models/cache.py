"""The user's cache of models that were made here once: each a folder that is whole or is not there.

A model is made in a temporary folder beside its place and renamed into it, so that a kill at any
moment leaves nothing that is taken for a model, and two that make the same one do not meet.
"""

import errno
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from safetensors import SafetensorError

from persona_nns.errors import PersonaError, one_line
from persona_nns.prompts.fetching import CACHE, cache_folder

_MAKING = ".making"


def models_folder() -> Path:
    """The folder whose folders are the models."""
    return cache_folder() / "models"


def is_kept(folder: str | Path) -> bool:
    """Whether a folder is a model of the cache."""
    return Path(folder).parent == models_folder()


def keep(key: str, make: Callable[[Path], None], *, needs: int = 0) -> Path:
    """The folder of a model in the cache; it is made where it is not there.

    Args:
        key: the folder's name; it says all that determines what is in it.
        make: fills an empty folder.
        needs: bytes that making it takes on disk.

    Raises:
        PersonaError: the folder cannot be written, or the disk is full.
    """
    place = models_folder() / key
    if place.is_dir():
        return place
    with _temporary(place, needs) as temporary:
        make(temporary)
        try:
            temporary.rename(place)
        except OSError:
            if not place.is_dir():
                raise
            # Somebody else made the same at the same time.
    return place


@contextmanager
def _temporary(place: Path, needs: int) -> Iterator[Path]:
    """An empty folder beside a place, which is gone afterwards if it is still there.

    Raises:
        PersonaError: it cannot be written into, or the disk is full.
    """
    temporary = None
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        _clear_away(place.parent)
        free = shutil.disk_usage(place.parent).free
        if free < needs:
            raise PersonaError(
                f"The model {place.name!r} needs {needs / 1e9:.1f} GB in {str(place.parent)!r}, "
                f"and {free / 1e9:.1f} GB are free there; {CACHE} names a folder on another disk."
            )
        beginning = f"{_MAKING}-{socket.gethostname()}-{os.getpid()}-"
        temporary = Path(tempfile.mkdtemp(prefix=beginning, dir=place.parent))
        yield temporary
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or (
            "No space left" in str(error) or "os error 28" in str(error)
        )
        why = "the disk is full" if full else one_line(error).rstrip(".")
        raise PersonaError(
            f"The model {place.name!r} could not be made in {str(place.parent)!r}: {why}; "
            f"{CACHE} names another folder."
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _clear_away(parent: Path) -> None:
    """Remove what processes of this machine left that were killed while they made a model."""
    beginning = f"{_MAKING}-{socket.gethostname()}-"
    for left in parent.glob(f"{beginning}*"):
        process = left.name.removeprefix(beginning).partition("-")[0]
        if process.isdigit() and not psutil.pid_exists(int(process)):
            shutil.rmtree(left, ignore_errors=True)
