"""Where a store is: a folder, or a URL that zarr reads through fsspec (``s3://bucket/store``).

A local file is put in place whole (zarr renames it) but reaches the disk some time later, in any
order; `Location.flush` waits for it. An object store has what it said it has.
"""

import ctypes
import json
import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zarr
from zarr.errors import ContainsGroupError

from persona_nns.errors import PersonaError, UsageError, first_line, one_line

# A listing that fsspec remembers does not show what other processes have added since.
_FRESH: Mapping[str, Any] = {"use_listings_cache": False}
# What a process that was killed left of a file is removed once nobody can be writing it.
_ABANDONED_AFTER = 600.0
_BUCKETS = ("s3", "s3a", "gs", "gcs", "az", "abfs")
_EXTRAS = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs"}


@dataclass(frozen=True)
class Location:
    """A store's path or URL, and how to reach it.

    Attributes:
        address: what zarr and xarray open.
        options: what fsspec needs to know about a URL; empty for a path.
        shown: as the user wrote it.
    """

    address: str
    options: Mapping[str, Any]
    shown: str

    @property
    def folder(self) -> Path | None:
        """The folder of a local store."""
        return None if "://" in self.address else Path(self.address)

    @property
    def is_on_hub(self) -> bool:
        """Whether it lies in a repository of the Hugging Face hub, where a write is a commit."""
        return self.address.startswith("hf://")

    def open_root(self) -> zarr.Group | None:
        """The root of the store for reading; None where there is no Zarr store.

        Raises:
            PersonaError: the URL cannot be reached.
        """
        try:
            return self._open("r")
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            if self.folder is None:
                raise
            return None  # no Zarr, or its metadata were cut off

    def open_for_writing(self) -> zarr.Group:
        """The root of the store, created where there is none."""
        try:
            return self._open("a")
        except ContainsGroupError:  # another process was faster
            return self._open("r+")

    def _open(self, mode: Any) -> zarr.Group:
        if self.folder is not None:
            return zarr.open_group(self.address, mode=mode, zarr_format=3)
        try:
            return zarr.open_group(
                self.address, mode=mode, zarr_format=3, storage_options=dict(self.options)
            )
        except (FileNotFoundError, ContainsGroupError):
            raise
        except ImportError as error:
            protocol = self.address.partition("://")[0]
            package = _EXTRAS.get(protocol, "an fsspec package")
            how = "pip install 'persona-nns[s3]'" if package == "s3fs" else f"pip install {package}"
            raise UsageError(f"The store {self.shown!r} needs {package}: {how}.") from error
        except Exception as error:
            # Every file system has errors of its own for a wrong key, host or bucket.
            reason = hub_reason(error) if self.is_on_hub else one_line(error)
            raise PersonaError(f"The store {self.shown!r} cannot be reached: {reason}") from error

    def check_writable(self) -> None:
        """See that the store can be written; a path is not touched.

        Raises:
            UsageError: the path cannot be written, or holds something else.
            PersonaError: the URL cannot be reached.
        """
        if self.folder is None:
            self._check_bucket()
            return
        try:
            self._check_folder(self.folder)
        except OSError as error:  # a name that is too long, a folder that may not be read
            raise UsageError(
                f"The store {self.shown!r} cannot be written: {error.strerror}."
            ) from error

    def _check_folder(self, path: Path) -> None:
        damaged = _is_zarr(path) and _is_damaged(path / "zarr.json")
        if path.exists() and not (path.is_dir() and (_is_unused(path) or _is_zarr(path))):
            raise UsageError(f"{self.shown!r} exists and is no Zarr store; choose another --store.")
        if not damaged and _is_zarr(path) and self.open_root() is None:
            raise UsageError(
                f"{self.shown!r} is no group of Zarr format 3; choose another --store."
            )
        existing = next(each for each in (path, *path.absolute().parents) if each.exists())
        if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
            raise UsageError(f"The store {self.shown!r} cannot be written; choose another --store.")

    def _check_bucket(self) -> None:
        import fsspec

        if self.open_root() is not None:
            return
        protocol, _, path = self.address.partition("://")
        bucket = path.partition("/")[0]
        if protocol in _BUCKETS and not fsspec.filesystem(protocol, **self.options).exists(bucket):
            raise UsageError(
                f"There is no bucket {bucket!r} for the store {self.shown!r}; create it first."
            )

    def flush(self) -> None:
        """Wait until what was written has reached the disk (object stores wait by themselves).

        This waits for what others have written to the file system by then, too, and is the faster
        way all the same: of the 300 files of a batch, 7 ms where a wait for each file takes 90
        (ext4), and 0.1 s where it takes 1.8 beside a process that never stops writing; of the 13
        files of a block, 9 ms and 46.
        """
        if self.folder is None:
            return
        if not sys.platform.startswith("linux"):
            os.sync()
            return
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            if ctypes.CDLL(None, use_errno=True).syncfs(descriptor) != 0:
                code = ctypes.get_errno()
                raise OSError(code, os.strerror(code), str(self.folder))
        finally:
            os.close(descriptor)

    def discard_damaged_metadata(self, group: str) -> None:
        """Remove what a crash left of a group: metadata that are not whole, unfinished files.

        Files are renamed into place, so that one that is not whole was cut off by a loss of
        power; it is written anew by whoever allocates the group.
        """
        if self.folder is None or not self.folder.is_dir():
            return
        path = self.folder / group
        above = [self.folder, *(self.folder / part for part in Path(group).parents), path]
        within = [child for child in path.glob("*") if child.is_dir()]
        for folder in dict.fromkeys([*above, *within]):
            metadata = folder / "zarr.json"
            if metadata.is_file() and _is_damaged(metadata):
                metadata.unlink(missing_ok=True)
            for part in folder.glob("*.partial"):
                with suppress(FileNotFoundError):  # another process has put it into place
                    if time.time() - part.stat().st_mtime > _ABANDONED_AFTER:
                        part.unlink()

    def size(self, group: str) -> int:
        """Bytes that a group takes."""
        if self.folder is not None:
            files = (self.folder / group).rglob("*")
            return sum(_size_of(file) for file in files if file.is_file())
        filesystem, path = self.filesystem()
        return int(filesystem.du(f"{path}/{group}", total=True))

    def names(self, group: str) -> set[str]:
        """What lies directly in a group or array."""
        if self.folder is not None:
            with suppress(FileNotFoundError):
                return set(os.listdir(self.folder / group))
            return set()
        filesystem, path = self.filesystem()
        try:
            found = filesystem.ls(f"{path}/{group}", detail=False)
        except FileNotFoundError:
            return set()
        return {name.rpartition("/")[2] for name in found}

    def filesystem(self) -> tuple[Any, str]:
        """The file system of a store at a URL, and its path there."""
        import fsspec

        return fsspec.url_to_fs(self.address, **self.options)


def _size_of(file: Path) -> int:
    """Bytes of a file; none of one that is gone, as unfinished ones of a run that goes on are."""
    with suppress(FileNotFoundError):
        return file.stat().st_size
    return 0


def location_of(store: str | Path) -> Location:
    """The location of a store, from its path or URL.

    Raises:
        UsageError: the text cannot be a path.
    """
    text = str(store).removeprefix("file://")
    if "://" in text:
        return Location(text.rstrip("/"), _FRESH, text)
    if not text.strip() or "\0" in text:
        raise UsageError(f"The store {text!r} is no path; choose another --store.")
    try:
        return Location(str(Path(text).expanduser()), {}, text)
    except RuntimeError as error:
        raise UsageError(f"The store {text!r} is no path: {one_line(error)}") from error


def hub_reason(error: BaseException, how: str = "look at its name") -> str:
    """What went wrong at the Hugging Face hub, or on the way there, as the end of a sentence.

    Args:
        error: of `huggingface_hub`.
        how: what to do where there is no such dataset.
    """
    status = getattr(getattr(error, "response", None), "status_code", None)
    kinds = [kind.__name__ for kind in type(error).__mro__]
    log_in = "log in with `hf auth login`, or set HF_TOKEN"
    if "OfflineModeIsEnabled" in kinds:
        return "HF_HUB_OFFLINE is set; unset it to reach the hub."
    if status == 412:
        return "somebody has changed it meanwhile; push again."
    if status == 403:
        return "the token may not do this; it needs write access."
    if "GatedRepoError" in kinds:
        return f"its owner grants access to it first; {log_in}."
    if "RevisionNotFoundError" in kinds:
        return "it has no such revision."
    if "RepositoryNotFoundError" in kinds:
        return f"there is none, or it is private; {how}, or {log_in}."
    if status == 401 or "LocalTokenNotFoundError" in kinds:
        return f"the hub wants to know who you are; {log_in}."
    if status is None and {"TransportError", "ConnectionError", "TimeoutError"} & {*kinds}:
        return f"the hub cannot be reached ({first_line(error)})."
    return one_line(error)


def _is_zarr(path: Path) -> bool:
    return (path / "zarr.json").is_file()


def _is_unused(path: Path) -> bool:
    """Whether a folder holds nothing but what a process that was killed may have left."""
    return all(child.suffix == ".partial" for child in path.iterdir())


def _is_damaged(metadata: Path) -> bool:
    try:
        return not isinstance(json.loads(metadata.read_bytes()), dict)
    except ValueError:
        return True
