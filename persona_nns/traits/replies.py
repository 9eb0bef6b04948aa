"""What judges have replied, kept on disk, and what asking them has cost.

Replies are in an SQLite file, as JSON, under a hash of everything that determines them.
"""

import json
import sqlite3
import threading
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persona_nns.errors import UsageError

DEFAULT_CACHE = Path("~/.cache/persona-nns/judge.sqlite")


class ReplyCache:
    """Replies on disk, by the hash of what was asked. Threads and processes may share it."""

    def __init__(self, file: str | Path) -> None:
        self._file = Path(file).expanduser()
        self._lock = threading.Lock()
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with closing(self._open()) as connection, connection:
                connection.execute(
                    "CREATE TABLE IF NOT EXISTS reply (key TEXT PRIMARY KEY, value TEXT NOT NULL)"
                )
        except (OSError, sqlite3.Error) as error:
            raise UsageError(
                f"The judge's cache {str(file)!r} cannot be used: {error}; choose another."
            ) from error

    def _open(self) -> sqlite3.Connection:
        return sqlite3.connect(self._file, timeout=30)

    def get(self, key: str) -> Any:
        """A reply, or None."""
        with closing(self._open()) as connection:
            row = connection.execute("SELECT value FROM reply WHERE key = ?", (key,)).fetchone()
        return None if row is None else json.loads(row[0])

    def put(self, key: str, reply: Any) -> None:
        """Keep a reply."""
        with self._lock, closing(self._open()) as connection, connection:
            connection.execute(
                "INSERT OR REPLACE INTO reply VALUES (?, ?)", (key, json.dumps(reply))
            )


@dataclass
class Usage:
    """What the judge has cost since it was made.

    Attributes:
        calls: prompts sent.
        cached: prompts answered from disk.
        prompt_tokens: tokens sent.
        completion_tokens: tokens received.
    """

    calls: int = 0
    cached: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def describe(self, prices: tuple[float, float] | None = None) -> str:
        """One line for the terminal.

        Args:
            prices: US dollars for a million prompt tokens and a million completion tokens.
        """
        line = (
            f"{self.calls} calls to the judge ({self.cached} more were cached), "
            f"{self.prompt_tokens} + {self.completion_tokens} tokens"
        )
        if prices is None:
            return line
        dollars = (self.prompt_tokens * prices[0] + self.completion_tokens * prices[1]) / 1_000_000
        return f"{line}, ${dollars:.4f}"
