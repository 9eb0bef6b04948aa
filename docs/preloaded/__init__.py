"""Processes that begin with everything imported: the site and its tests start about a hundred.

A server imports what `persona-nns` and a notebook's kernel import, which is most of what a short
command takes, and forks itself for each. What is forked has the arguments, folder, environment and
standard streams of whoever asked, and has computed nothing before.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sphinx.application import Sphinx

HERE = Path(__file__).parent
PROGRAMS = Path(sys.executable).parent


@contextmanager
def preloaded(folder: Path) -> Iterator[dict[str, str]]:
    """A server for as long as this lasts; gives the environment in which it is asked.

    Args:
        folder: an empty one, for its socket and for what takes the place of `persona-nns` and of
            the kernel named ``python3``.
    """
    programs, kernel = folder / "bin", folder / "kernels" / "python3"
    programs.mkdir()
    kernel.mkdir(parents=True)
    client = folder / "client"
    ask = f"#!/bin/sh\nexec {sys.executable} -ES {HERE / 'client.py'} {folder / 'socket'}"
    for script, arguments in (
        (client, ""),
        (programs / "persona-nns", f" {PROGRAMS / 'persona-nns'}"),
    ):
        script.write_text(f'{ask}{arguments} "$@"\n', "utf-8")
        script.chmod(0o755)
    started = [str(client), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    described = {"argv": started, "display_name": "Python 3", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(described), "utf-8")
    command = [sys.executable, HERE / "server.py", folder / "socket"]
    with subprocess.Popen(  # noqa: S603
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        try:
            if not server.stdout.readline():
                raise RuntimeError("Nothing could be imported beforehand.")
            yield {
                "PATH": os.pathsep.join([str(programs), str(PROGRAMS), os.environ["PATH"]]),
                "JUPYTER_PATH": str(folder),
            }
        finally:
            server.stdin.close()  # it ends with whoever started it


def setup(app: "Sphinx") -> dict[str, Any]:
    """The pages' kernels, and the commands in them, are started so."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        os.environ |= stack.enter_context(preloaded(folder))
        ending = stack.pop_all()
    app.connect("build-finished", lambda *_: ending.close())
    return {"parallel_read_safe": True, "parallel_write_safe": True}
