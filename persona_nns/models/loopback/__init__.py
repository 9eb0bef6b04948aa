"""A server of its own for one model: what ``--backend simulate`` runs jobs on.

It speaks the NDIF 0.1 protocol in another process, in another directory, without this package
and without what NDIF lacks: more faithful than nnsight's ``remote="local"``.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from persona_nns.errors import PersonaError
from persona_nns.models.servers import Server

SERVER = Path(__file__).with_name("server.py")


class LoopbackServer:
    """A running server process; it ends with this one at the latest."""

    def __init__(
        self,
        source: str,
        repo_id: str,
        dtype: str = "float32",
        *,
        script: Path = SERVER,
        options: Sequence[str] = (),
    ) -> None:
        """Start it and wait until it listens.

        Args:
            source: folder or hub id of the model.
            repo_id: the name it is hosted under.
            dtype: its precision.
            script: the server's program.
            options: more options of it.

        Raises:
            PersonaError: it does not start.
        """
        outside = {"PYTHONPATH", "NDIF_API_KEY"}
        environment = {name: text for name, text in os.environ.items() if name not in outside}
        place = str(Path(source).resolve()) if Path(source).is_dir() else source
        command = ["--model", place, "--repo-id", repo_id, "--dtype", dtype, "--until-stdin-closes"]
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - the process writes to it
        self._process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-P", str(script), *command, *options],
            cwd=tempfile.gettempdir(),
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        assert self._process.stdout is not None
        port = self._process.stdout.readline().strip()
        if not port:
            self._process.wait()
            self._log.seek(0)
            reason = (self._log.read().strip().splitlines() or ["no reason given"])[-1]
            raise PersonaError(f"The simulated server of {repo_id!r} did not start: {reason}")
        self.address = Server(f"http://127.0.0.1:{port}", sends_key=False)

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.address.url.rpartition(":")[2])

    def stop(self) -> None:
        """End it, in the middle of whatever it does."""
        self._process.kill()
        self._process.communicate()
        self._log.close()
