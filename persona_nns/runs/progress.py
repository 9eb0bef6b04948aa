"""How far long work has come: a bar on a terminal or in a notebook, lines anywhere else."""

import html
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

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

_FIRST_INTERVAL = 5.0  # seconds between two lines, at first; later a tenth of what has passed
_LONGEST_INTERVAL = 300.0
_BAR = 24  # characters of a notebook's bar


class UnitProgress:
    """Shows how many units (say, cells) are complete.

    On a terminal it is a bar with the time that is left, and in a notebook too, where it says in
    the end that it is complete, or stopped. Elsewhere, in the log of a batch system, say, it is a
    line now and then, on stderr.
    """

    def __init__(
        self,
        title: str,
        noun: str,
        n_units: int,
        n_done: int = 0,
        *,
        enabled: bool,
        verbose: bool = False,
    ) -> None:
        """Begin.

        Args:
            title: what is being measured.
            noun: what a unit is called.
            n_units: how many are asked for.
            n_done: how many of them were complete before.
            enabled: show anything at all.
            verbose: print each event on a line of its own.
        """
        self._title, self._noun, self._verbose = title, noun, verbose
        self._n_units, self._n_before, self._n_done = n_units, n_done, n_done
        self._console = Console(stderr=True)
        self._started = time.monotonic()
        self._bar, self._task = _bar(self._console, noun), TaskID(0)
        self._show: Callable[[str], None] | None = None
        self._in_notebook = enabled and self._console.is_jupyter
        self._said: float | None = None
        self._batches = ""
        if not enabled:
            self._bar.disable = True
        elif self._console.is_terminal:
            self._task = self._bar.add_task(title, total=n_units, completed=n_done, jobs="")
        else:
            self._bar.disable = True
            self._show = self._below_cell() if self._in_notebook else self._print

    def __enter__(self) -> "UnitProgress":
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._bar.stop()
        if self._in_notebook and self._show is not None and kind is not None:
            self._show(f"{self._line(time.monotonic() - self._started, going=False)}, stopped")

    def begin(self, how: str) -> None:
        """Say what there is to do, and how it is done."""
        if self._show is not None or not self._bar.disable:
            self._print(f"{self._title}: {count(self._n_units - self._n_done, self._noun)}, {how}")

    def nothing_to_do(self) -> None:
        """Say that everything was there before."""
        if self._show is not None or not self._bar.disable:
            done = f"{self._n_done} of {self._n_units} {self._noun}s"
            self._print(f"{self._title}: {done} complete, nothing computed")

    def update(self, n_done: int, batch: tuple[int, int] | None = None) -> None:
        """So many units are complete.

        Args:
            n_done: of those that are asked for.
            batch: which batch of this process was the last, and how many there are.
        """
        self._n_done = n_done
        if batch is not None:
            self._batches = f"batch {batch[0]} of {batch[1]}, "
        if self._show is None:
            if not self._bar.disable:
                self._bar.update(self._task, completed=n_done)
            return
        moment = time.monotonic()
        finished, passed = n_done >= self._n_units, moment - self._started
        interval = min(max(_FIRST_INTERVAL, passed / 10), _LONGEST_INTERVAL)
        lately = self._said is not None and moment - self._said < interval
        if self._show == self._print and lately and not finished:
            return
        self._said = moment
        self._show(self._line(passed))

    def look(self, n_done: int) -> None:
        """So many units were found complete; nothing is said where they are as many as before."""
        if n_done != self._n_done:
            self.update(n_done)

    def advance(self, n_units: int) -> None:
        """So many more units are complete."""
        self.update(self._n_done + n_units)

    def tell(self, event: str) -> None:
        """An event: shown beside the bar, and on a line of its own where asked for."""
        if not self._bar.disable:
            self._bar.update(self._task, jobs=escape(event))
        if self._verbose:
            self._print(event)

    def states(self, states: Sequence[str]) -> None:
        """What the jobs in flight are doing, as ``2 jobs running, 1 queued (position 3)``."""
        counts = Counter(states)
        shown = ", ".join(f"{count} {state}" for state, count in counts.items())
        if not self._bar.disable:
            self._bar.update(self._task, jobs=escape(f"jobs: {shown}" if shown else ""))

    def _line(self, passed: float, *, going: bool = True) -> str:
        done = f"{self._n_done} of {self._n_units} {self._noun}s"
        line = f"{self._title}: {self._batches}{done}, {clock(passed)}"
        measured, left = self._n_done - self._n_before, self._n_units - self._n_done
        if measured > 0 and left > 0 and going:
            line += f", about {clock(passed / measured * left)} left"
        return f"{line}, complete" if self._in_notebook and left <= 0 else line

    def _below_cell(self) -> Callable[[str], None]:
        """What shows a line below a notebook's cell, in the place of the one before.

        A display of its own needs nothing but Jupyter; rich's bar needs ipywidgets too.
        """
        from IPython.display import display  # type: ignore[import-not-found]

        handle: Any = None

        def show(line: str) -> None:
            nonlocal handle
            filled = _BAR * self._n_done // max(self._n_units, 1)
            bar = f'<progress value="{self._n_done}" max="{self._n_units}"></progress>'
            shown = {
                "text/plain": f"{'█' * filled}{'░' * (_BAR - filled)} {line}",
                "text/html": f"<div>{bar} {html.escape(line)}</div>",
            }
            if handle is None:
                handle = display(shown, raw=True, display_id=True)
            else:
                handle.update(shown, raw=True)

        return show

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def _bar(console: Console, noun: str) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn(f"{noun}s"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[jobs]}"),
        console=console,
    )


def count(number: int, noun: str) -> str:
    """A number of things, as ``1 thread`` or ``2 threads``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def clock(seconds: float) -> str:
    """A time as ``2:05`` or ``1:02:05``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
