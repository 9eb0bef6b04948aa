"""What a server runs on, and what it hosts."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from persona_nns.errors import RemoteError
from persona_nns.runs.remote.connection import Connection, client_python

#: Packages whose version decides what a request means and computes. NDIF's server takes any
#: nnsight 0.8 (its metadata say so), and nnsight itself compares these three and demands nothing.
CRITICAL = ("nnsight", "torch", "transformers")
_ROUNDING = "numbers may differ within rounding"
_ATTENTION_FOLLOWS = (0, 8, 1)  # from this nnsight on a server computes attention as it is asked
_STATES = ("RUNNING", "DEPLOYING", "NOT_STARTED", "UNHEALTHY")


@dataclass(frozen=True)
class Environment:
    """Python and packages of a server beside ours.

    Attributes:
        python: the server's, as ``3.11``; empty where it does not say.
        packages: the server's versions of `CRITICAL`.
    """

    python: str
    packages: Mapping[str, str]

    @property
    def differences(self) -> list[str]:
        """What differs and what follows, as ``torch 2.9.0 (here 2.13.0: …)``."""
        ours = {name: _own(name) for name in CRITICAL}
        found = [
            f"{name} {_release(theirs)} (here {_release(ours[name])}: {_follows(name, theirs)})"
            for name, theirs in self.packages.items()
            if _release(theirs) != _release(ours[name])
        ]
        if self.python and self.python != client_python():
            follows = "what can be sent as source alone runs there, the rest is refused"
            found.append(f"Python {self.python} (here {client_python()}: {follows})")
        return found

    def check(self, url: str) -> list[str]:
        """See whether requests of ours can run there; returns what to warn of.

        Raises:
            RemoteError: its nnsight is another minor version, which reads requests differently.
        """
        theirs, ours = self.packages.get("nnsight", ""), _own("nnsight")
        if theirs and theirs.split(".")[:2] != ours.split(".")[:2]:
            raise RemoteError(
                f"The server {url} runs nnsight {theirs}, and here is {ours}; install the same "
                f"minor version (pip install 'nnsight=={theirs}')."
            )
        if not self.packages:
            return [f"The server {url} does not say which versions it runs."]
        if self.differences:
            return [f"The server {url} runs other versions: {'; '.join(self.differences)}."]
        return []

    def attributes(self) -> dict[str, Any]:
        """For the store."""
        return {"server_python": self.python, "server_versions": dict(self.packages)}


def read_environment(connection: Connection) -> Environment:
    """Ask a server what it runs on; empty where it does not tell."""
    try:
        answer = connection.ask("/env")
    except RemoteError as error:
        if type(error) is not RemoteError:  # it cannot be reached, or wants another key
            raise
        return Environment("", {})
    packages = answer.get("packages", {})
    python = ".".join(str(answer.get("python_version", "")).split(".")[:2])
    return Environment(python, {name: packages[name] for name in CRITICAL if name in packages})


@dataclass(frozen=True)
class Deployment:
    """A model on a server.

    Attributes:
        repo_id: its name.
        revision: of the repository.
        level: ``HOT`` (loaded), ``WARM`` (in memory) or ``COLD``.
        state: ``RUNNING``, ``DEPLOYING``, …
    """

    repo_id: str
    revision: str
    level: str
    state: str


def read_deployments(connection: Connection) -> list[Deployment]:
    """The models that a server hosts, those that run first."""
    best: dict[tuple[str, str], Deployment] = {}
    for entry in connection.ask("/status").get("deployments", {}).values():
        found = Deployment(
            repo_id=str(entry.get("repo_id", "?")),
            revision=str(entry.get("revision") or "main"),
            level=str(entry.get("deployment_level", "?")),
            state=str(entry.get("application_state", "?")),
        )
        key = (found.repo_id, found.revision)  # a model may have several replicas
        if key not in best or _rank(found) < _rank(best[key]):
            best[key] = found
    return sorted(best.values(), key=lambda one: (*_rank(one), one.repo_id))


def _rank(deployment: Deployment) -> tuple[int, str]:
    known = deployment.state in _STATES
    return (_STATES.index(deployment.state) if known else len(_STATES), deployment.level)


def _follows(package: str, theirs: str) -> str:
    """What follows from another version of a package on a server, of nnsight the same minor one."""
    if package == "torch":
        return _ROUNDING
    if package == "transformers":
        return f"{_ROUNDING}, and a model whose modules are others there is refused"
    parts = [int(part) for part in _release(theirs).split(".") if part.isdigit()]
    if tuple(parts) < _ATTENTION_FOLLOWS:
        return "requests mean the same; it computes attention its own way, within rounding"
    return "requests mean the same"


def _own(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _release(text: str) -> str:
    """A version without its build: ``2.13.0`` of ``2.13.0+cpu``."""
    return text.partition("+")[0]
