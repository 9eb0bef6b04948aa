"""`server.py SOCKET`: fork, and run what is asked for, until the standard input ends."""

import atexit
import gc
import importlib
import json
import os
import random
import runpy
import select
import signal
import socket
import sys
import threading
from typing import IO, Any

# What commands and pages import sooner or later; nothing of it computes anything.
MODULES = (
    "ipykernel.kernelapp",
    "matplotlib.pyplot",
    "matplotlib_inline.backend_inline",
    "nnsight",
    "pandas",
    "persona_nns.cli",
    "rich.progress",
    "seaborn",
    "transformers.models.gemma2.modeling_gemma2",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.modeling_qwen2",
    "xarray",
    "zarr",
)


def serve(path: str) -> None:
    """Fork for each that asks; only what was forked returns."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them here
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen(64)
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        while sys.stdin not in select.select([listening, sys.stdin], [], [])[0]:
            connection, _ = listening.accept()
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                become(connection)
            connection.close()


def become(connection: socket.socket) -> None:
    """Run what is asked for as if it had been started there, and say how it ended."""
    _, streams, _, _ = socket.recv_fds(connection, 1, 3)
    asking = connection.makefile("rb")
    request = json.loads(asking.readline())
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin = sys.__stdin__ = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = sys.__stdout__ = _written(1)
    sys.stderr = sys.__stderr__ = _written(2)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    random.seed()
    threading.Thread(target=obey, args=[asking], daemon=True).start()
    status = [1]
    atexit.register(lambda: connection.sendall(bytes(status)))
    try:
        run(request["arguments"])
        status[0] = 0
    except SystemExit as end:
        status[0] = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise
    sys.exit(0)


def _written(number: int) -> IO[str]:
    lines = number == 2 or os.isatty(number)
    return open(number, "w", buffering=1 if lines else -1, encoding="utf-8", closefd=False)


def run(arguments: list[str]) -> None:
    """Run `-m MODULE …` or `SCRIPT …`."""
    sys.path[0] = ""
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path[0] = os.path.dirname(arguments[0])
        runpy.run_path(arguments[0], run_name="__main__")


def obey(asking: Any) -> None:
    """Take the signals that whoever asked was sent, and end when it has."""
    while said := asking.read(1):
        os.kill(os.getpid(), said[0])
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    for module in MODULES:
        importlib.import_module(module)
    gc.freeze()  # so that memory stays shared
    serve(sys.argv[1])
