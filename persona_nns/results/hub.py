"""Stores as datasets of the Hugging Face hub: ``hf://datasets/<user>/<name>[@<revision>]/<folder>``.

Whatever is written there is a commit, and a store is thousands of files: what a dataset holds is
brought here, merged into, and sent back in one commit, which the hub refuses if somebody else has
made one meanwhile. A store that is only opened is read where it is, through fsspec.
"""

import hashlib
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal
from urllib.parse import unquote

from persona_nns.errors import PersonaError, UsageError
from persona_nns.results.blocks import LOCK
from persona_nns.results.card import dataset_card
from persona_nns.results.choosing import choose_run
from persona_nns.results.locations import hub_reason, location_of
from persona_nns.results.merging import Merged, merge_stores, other_groups
from persona_nns.results.reading import list_runs

_ADDRESS = re.compile(r"hf://datasets/([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.*))?")
_CARD = "README.md"
_CACHE = ".cache"  # where the hub's client notes what it has brought


@dataclass(frozen=True)
class _Dataset:
    """A store's place in a dataset.

    Attributes:
        repo: ``user/name``.
        revision: the branch, or a tag or commit to read; None is the main one.
        folder: of the store; empty where it was not said.
    """

    repo: str
    revision: str | None
    folder: str

    @property
    def address(self) -> str:
        """What `open_results` takes."""
        at = f"@{self.revision.replace('/', '%2F')}" if self.revision else ""
        return f"hf://datasets/{self.repo}{at}/{self.folder}".rstrip("/")


def _dataset_of(address: str) -> _Dataset:
    """The dataset that an address names.

    Raises:
        UsageError: it names none.
    """
    found = _ADDRESS.fullmatch(address)
    if found is None:
        raise UsageError(
            f"{address!r} is no dataset of the hub; write hf://datasets/USER/NAME, and a folder "
            "in it if need be."
        )
    repo, revision, folder = found.groups()
    return _Dataset(repo, unquote(revision) if revision else None, (folder or "").strip("/"))


def merge(
    target: str | Path, source: str | Path, runs: Sequence[str] = (), *, public: bool = False
) -> list[Merged]:
    """Put runs of one store into another, wherever both are; see `merge_stores`.

    Args:
        target: path or URL of the store that is added to; one on the hub as by `push`.
        source: path or URL of the store that is read.
        runs: of the source, as `choose_run` takes them; by default all.
        public: as `merge_stores` takes it.

    Raises:
        UsageError: there is no source or no such run, it is the target, or the target cannot be
            written.
        PersonaError: a run is in both with other numbers; nothing has been written then. The hub
            cannot be reached, or refuses.
    """
    if location_of(target).is_on_hub:
        return push(source, str(target), runs)[1]
    with _at_hand(source) as near:
        chosen = [choose_run(near, name) for name in runs] or None
        if others := other_groups(near):
            warnings.warn(
                f"{', '.join(others)} in {str(source)!r} are no runs; they are not merged.",
                stacklevel=2,
            )
        return merge_stores(target, near, chosen, public=public)


def push(
    store: str | Path,
    target: str,
    runs: Sequence[str] = (),
    *,
    create: Literal["private", "public"] | None = None,
) -> tuple[str, list[Merged]]:
    """Publish runs of a store: merge them into one elsewhere, without what names this machine.

    Args:
        store: path or URL.
        target: ``hf://datasets/USER/NAME``, where the store's folder is called as it is here
            unless the address says it; or any other path or URL.
        runs: as `choose_run` takes them; by default all.
        create: make the dataset where there is none.

    Returns:
        Where the store is now, and what became of each run.

    Raises:
        UsageError: there is no store or no such run, or the target is no address.
        PersonaError: as of `merge`.
    """
    if not location_of(target).is_on_hub:
        return target, merge(target, store, runs, public=True)
    there = _dataset_of(target)
    if not there.folder:
        there = _Dataset(there.repo, there.revision, _name_of(store))
    with TemporaryDirectory() as folder:
        near = Path(folder) / there.folder
        head, files = _fetch(there, Path(folder), create)
        before = _digests(Path(folder))
        merged = merge(near, store, runs, public=True)
        if _CARD not in files:
            card = dataset_card(there.repo, there.address, list_runs(near))
            (Path(folder) / _CARD).write_text(card, encoding="utf-8")
        _send(there, Path(folder), before, head, f"{len(merged)} runs of persona_nns")
    return there.address, merged


def _name_of(store: str | Path) -> str:
    name = str(store).rstrip("/").rpartition("/")[2]
    return name if name not in ("", ".", "..") else "results.zarr"


def _fetch(
    there: _Dataset, folder: Path, create: Literal["private", "public"] | None
) -> tuple[str, set[str]]:
    """Bring what a dataset holds of a store; returns the commit, and the dataset's files."""
    from huggingface_hub import HfApi, snapshot_download

    api, kind = HfApi(), "dataset"
    with _explained(there, "create it with --create private or --create public"):
        if create is not None:
            api.create_repo(there.repo, repo_type=kind, private=create == "private", exist_ok=True)
        info = api.dataset_info(there.repo, revision=there.revision)
        files = {file.rfilename for file in info.siblings or ()}
        if f"{there.folder}/zarr.json" in files:
            wanted = [f"{there.folder}/*"]
            snapshot_download(
                there.repo,
                repo_type=kind,
                revision=info.sha,
                local_dir=folder,
                allow_patterns=wanted,
            )
        return str(info.sha), files


def _send(
    there: _Dataset, folder: Path, before: Mapping[str, bytes], head: str, message: str
) -> None:
    """Send what has changed in a folder as one commit on top of another.

    (`upload_folder` would make several commits of many files.)
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    changed = [path for path, digest in _digests(folder).items() if before.get(path) != digest]
    if not changed:
        return
    with _explained(there, "create it first"):
        HfApi().create_commit(
            there.repo,
            [CommitOperationAdd(path, folder / path) for path in changed],
            repo_type="dataset",
            revision=there.revision,
            parent_commit=head,
            commit_message=message,
        )


def _digests(folder: Path) -> dict[str, bytes]:
    """What the files of a folder hold, by their paths in it; locks of blocks hold nothing."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).digest()
        for file in files
        if _CACHE not in file.parts and file.suffix != LOCK
    }


@contextmanager
def _at_hand(store: str | Path) -> Iterator[str | Path]:
    """A store as it is, but one on the hub in a folder here, all of one commit."""
    if not location_of(store).is_on_hub:
        yield store
        return
    there = _dataset_of(str(store))
    with TemporaryDirectory() as folder:
        _fetch(there, Path(folder), None)
        near = Path(folder) / there.folder
        if not (near / "zarr.json").is_file():
            raise UsageError(f"There is no Zarr store at {str(store)!r}.")
        yield near


@contextmanager
def _explained(there: _Dataset, how: str) -> Iterator[None]:
    """Errors of the hub, and of the way to it, as one sentence."""
    try:
        yield
    except PersonaError:
        raise
    except Exception as error:
        # The hub's client has errors of its own, and those of whichever HTTP client it uses.
        raise PersonaError(f"The dataset {there.repo!r}: {hub_reason(error, how)}") from error
