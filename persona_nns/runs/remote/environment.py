"""What a server runs on, and what it hosts."""

import json
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
        attaches: it has what adapters need (or does not say what it has).
    """

    python: str
    packages: Mapping[str, str]
    attaches: bool = True

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

    def check_adapter(self, url: str) -> None:
        """See that adapters can be attached there.

        Raises:
            RemoteError: they cannot.
        """
        if not self.attaches:
            raise RemoteError(
                f"The server {url} has no peft, so that it cannot attach an adapter; ask whoever "
                "runs it, or leave out --adapter."
            )

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
    critical = {name: packages[name] for name in CRITICAL if name in packages}
    return Environment(python, critical, attaches=not packages or "peft" in packages)


@dataclass(frozen=True)
class Deployment:
    """A model on a server.

    Attributes:
        repo_id: its name.
        revision: of the repository that it is asked for by; ``main`` where none is named.
        level: ``HOT`` (loaded), ``WARM`` (in memory), ``COLD`` (on disk); empty where the server
            does not say.
        state: of its replicas, ``RUNNING``, ``DEPLOYING``, …; empty where it has none.
        replicas: how many of them are in this state.
    """

    repo_id: str
    revision: str
    level: str
    state: str
    replicas: int

    def __str__(self) -> str:
        """Its name, and the revision that it has to be asked for by, if any."""
        return self.repo_id + (f" (--revision {self.revision})" if self.revision != "main" else "")


def read_deployments(connection: Connection) -> list[Deployment]:
    """The models that a server hosts, those that run first.

    Names and states are those of NDIF 0.1. A replica stands under a key that ends in what it is
    asked for by, in JSON; the server adds its name, revision and level where it knows them. What
    lies on disk stands under its name alone, also while it runs.
    """
    found: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for key, entry in connection.ask("/status").get("deployments", {}).items():
        asked = _asked_of(key)
        name = str(asked.get("repo_id") or entry.get("repo_id") or key)
        revision = str(asked.get("revision") or entry.get("revision") or "main")
        level, state = entry.get("deployment_level") or "", entry.get("application_state") or ""
        found.setdefault((name, revision), []).append((str(level).upper(), str(state).upper()))
    running = {name for (name, _), replicas in found.items() if any(state for _, state in replicas)}
    deployments: list[Deployment] = []
    for (name, revision), replicas in found.items():
        level, state = min(replicas, key=lambda one: _rank(one[1], one[0]))
        if not state and name in running:
            continue  # at another revision: its files on disk are no model beside it
        n_alike = sum(one[1] == state for one in replicas) if state else 0
        deployments.append(Deployment(name, revision, level, state, n_alike))
    return sorted(deployments, key=lambda one: (_rank(one.state, one.level), one.repo_id))


def _asked_of(key: str) -> Mapping[str, Any]:
    """What a replica's key says of its model; nothing where it is a name."""
    start = key.find("{")
    if start < 0:
        return {}
    try:
        asked = json.loads(key[start:])
    except ValueError:
        return {}
    return asked if isinstance(asked, dict) else {}


def _rank(state: str, level: str) -> tuple[int, str]:
    return (_STATES.index(state) if state in _STATES else len(_STATES), level)


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
