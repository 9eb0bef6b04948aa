"""How far long work has come."""

from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


def progress_bar(noun: str, *, enabled: bool) -> Progress:
    """A bar of units, or whatever they are called, with an ETA; nothing without a terminal."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn(f"{noun}s"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not (enabled and console.is_terminal),
    )


class JobProgress:
    """A bar over units with the state of the jobs beside it, and a line for each event if asked.

    Where there is no terminal the bar is silent; the lines are not.
    """

    def __init__(
        self, title: str, noun: str, n_units: int, n_done: int, *, enabled: bool, verbose: bool
    ) -> None:
        console = Console(stderr=True)
        self._verbose = verbose
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn(noun),
            TimeElapsedColumn(),
            TextColumn("{task.fields[jobs]}"),
            console=console,
            disable=not (enabled and console.is_terminal),
        )
        self._task: TaskID = self._bar.add_task(title, total=n_units, completed=n_done, jobs="")
        self._console = console

    def __enter__(self) -> "JobProgress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def tell(self, event: str) -> None:
        """An event: shown beside the bar, and on a line of its own where asked for."""
        self._bar.update(self._task, jobs=escape(event))
        if self._verbose:
            self._console.print(escape(event), highlight=False, soft_wrap=True)

    def states(self, states: Sequence[str]) -> None:
        """What the jobs in flight are doing, as ``2 jobs running, 1 queued (position 3)``."""
        counts = Counter(states)
        shown = ", ".join(f"{count} {state}" for state, count in counts.items())
        self._bar.update(self._task, jobs=escape(f"jobs: {shown}" if shown else ""))

    def advance(self, n_units: int) -> None:
        """Units are in the store."""
        self._bar.advance(self._task, n_units)
