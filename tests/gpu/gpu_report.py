"""What has been seen, written part by part: a script that is killed leaves what it had."""

import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Report:
    """One JSON file.

    Attributes:
        seen: what stands in it.
    """

    def __init__(self, file: Path, seconds: float, **about: Any) -> None:
        """A file, and how long all parts may take together."""
        self.seen: dict[str, Any] = {**about, "parts": {}, "left_out": {}, "failed": {}}
        self._file, self._stop = file, time.monotonic() + seconds
        self.write()

    def write(self) -> None:
        """Put the file in place whole."""
        part = self._file.with_name(f"{self._file.name}.part")
        part.write_text(json.dumps(self.seen, indent=1, default=str))
        part.replace(self._file)

    def leave_out(self, name: str, why: str) -> None:
        """Note what was not looked at."""
        self.seen["left_out"][name] = f"left out: {why}"
        self.write()

    def part(self, name: str, needs: float, look: Callable[[float], Any]) -> bool:
        """Look at something, if there is time for it; says whether it is as it should be.

        Args:
            name: of the part.
            needs: the least seconds that it takes.
            look: what is to be noted, given the seconds that are left.
        """
        left = self._stop - time.monotonic()
        if left < needs:
            self.leave_out(name, f"{left:.0f} s are left, and it takes {needs:.0f}")
            return True
        started = time.monotonic()
        try:
            found = look(left)
        except Exception:  # a card may fail in any way, and the other parts are still to be seen
            self.seen["failed"][name] = traceback.format_exc()
            self.write()
            return False
        self.seen["parts"][name] = {"took_s": round(time.monotonic() - started, 2), "found": found}
        self.write()
        return True
