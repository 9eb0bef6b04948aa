"""A real Jupyter kernel, its cells and what they show."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import KernelManager, start_new_kernel


@dataclass
class Shown:
    """What a cell showed.

    Attributes:
        printed: by it.
        displays: what stands below it in the end, by its kind: ``text/plain``, say.
        error: its name and message, and what Jupyter shows of it; None where it ended well.
    """

    printed: str = ""
    displays: list[dict[str, str]] = field(default_factory=list[dict[str, str]])
    error: tuple[str, str, str] | None = None


@dataclass
class Kernel:
    """A kernel that runs."""

    manager: KernelManager
    client: BlockingKernelClient

    def tries(self, cell: str, *, stop: str = "") -> Shown:
        """Run a cell, whatever comes of it; interrupt it when it has shown some text."""
        shown, places = Shown(), dict[str, int]()

        def show(message: dict[str, Any]) -> None:
            nonlocal stop
            kind, content = message["msg_type"], message["content"]
            if kind == "stream":
                shown.printed += content["text"]
            elif kind == "error":
                traceback = "\n".join(content["traceback"])
                shown.error = content["ename"], content["evalue"], traceback
            elif kind in ("display_data", "update_display_data", "execute_result"):
                name = content.get("transient", {}).get("display_id", str(len(shown.displays)))
                if places.setdefault(name, len(shown.displays)) == len(shown.displays):
                    shown.displays.append({})
                shown.displays[places[name]] = content["data"]
                if stop and stop in content["data"].get("text/plain", ""):
                    stop = ""
                    self.manager.interrupt_kernel()

        self.client.execute_interactive(cell, output_hook=show, timeout=60)
        return shown

    def runs(self, cell: str) -> Shown:
        """Run a cell that ends well."""
        shown = self.tries(cell)
        assert shown.error is None, shown.error[:2]
        return shown


@contextmanager
def started() -> Iterator[Kernel]:
    """A kernel, for a while."""
    manager, client = start_new_kernel(kernel_name="python3")
    try:
        yield Kernel(manager, client)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
