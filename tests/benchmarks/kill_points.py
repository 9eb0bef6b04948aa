"""Kill a process that writes cells, at random moments, and see what the store has lost.

``python tests/benchmarks/kill_points.py 200`` forks 200 processes (no torch in them), kills each
by SIGKILL at a random change of a file, and does to half of the stores what a loss of power may
do: any of the files that were written since the last flush are cut off, emptied, or gone. Then
the store has to open, its complete cells have to be right, and the same command has to finish
it without measuring one of them again. Prints what was counted; exit code 1 if anything is lost.
"""

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from store_writer import values_are_right, write_all

from persona_nns.results.locations import Location, location_of
from persona_nns.results.reading import list_runs, open_results

N_CELLS, BATCH = 6, 2


@dataclass
class Count:
    """What went wrong over all kill points."""

    killed: int = 0
    complete: int = 0
    wrong: list[int] = field(default_factory=list[int])
    closed: list[int] = field(default_factory=list[int])
    repeated: list[int] = field(default_factory=list[int])
    unfinished: list[int] = field(default_factory=list[int])

    @property
    def failures(self) -> int:
        return sum(map(len, (self.wrong, self.closed, self.repeated, self.unfinished)))


def forked(work: Callable[[int], Any]) -> tuple[bool, str]:
    """Do something in another process: whether it ended by itself, and what it wrote down."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        code = 1
        try:
            os.write(writer, json.dumps(work(writer)).encode())
            code = 0
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    status = os.waitpid(child, 0)[1]
    return os.waitstatus_to_exitcode(status) == 0, said


def write_and_die(store: Path, change: int, dying: int) -> int:
    """Write all cells; before the n-th change of a file, say what is not flushed, and die.

    Returns the number of changes, where the end was reached.

    Audit events come before what they announce, and a write is an opening and a renaming, so a
    file may be cut off before, within and after it is written.
    """
    unflushed: list[str] = []
    left = [change]
    flush = Location.flush

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        path = str(arguments[0]) if arguments else ""
        opened = event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_WRONLY
        if not path.startswith(str(store)) or not (opened or event in {"os.rename", "os.mkdir"}):
            return
        left[0] -= 1
        if left[0] == 0:
            os.write(dying, json.dumps(unflushed).encode())
            os.kill(os.getpid(), signal.SIGKILL)
        if event == "os.rename":
            unflushed.append(str(arguments[1]))

    def remember(place: Location) -> None:
        flush(place)
        unflushed.clear()

    Location.flush = remember  # type: ignore[method-assign]
    sys.addaudithook(watch)
    write_all(store, N_CELLS, BATCH)
    return change - left[0]


def lose_power(files: list[str], chance: random.Random) -> None:
    """Do to files that were not flushed what a loss of power may do."""
    for name in files:
        file = Path(name)
        if not file.is_file() or chance.random() < 0.5:
            continue
        data = file.read_bytes()
        fate = chance.choice(("empty", "half", "zeros", "gone"))
        if fate == "gone":
            file.unlink()
        else:
            kept = {"empty": b"", "half": data[: len(data) // 2], "zeros": bytes(len(data))}
            file.write_bytes(kept[fate])


def look(store: Path) -> list[str] | None:
    """The complete cells as a reader finds them, or None where one of them is wrong."""
    if location_of(store).open_root() is None or not list_runs(store):
        return []  # nothing of the run is there yet
    results = open_results(store, "e")
    done = results.cell[results.completed.values[0]].values.tolist()
    return done if values_are_right(results) else None


def measure_rest(store: Path) -> list[str]:
    return [label for batch in write_all(store, N_CELLS, BATCH) for label in batch]


def try_one(folder: Path, index: int, change: int, chance: random.Random, count: Count) -> None:
    store = folder / f"{index}.zarr"
    ended, unflushed = forked(lambda pipe: write_and_die(store, change, pipe))
    count.killed += not ended
    if not ended and chance.random() < 0.5:
        lose_power(json.loads(unflushed), chance)
    opened, said = forked(lambda _: look(store))
    if not opened:
        count.closed.append(index)
        return
    found = json.loads(said)
    if found is None:
        count.wrong.append(index)
        return
    count.complete += len(found)
    finished, said = forked(lambda _: measure_rest(store))
    again = set(json.loads(said) if finished else ()) & set(found)
    if again:
        count.repeated.append(index)
    whole, said = forked(lambda _: look(store))
    if not (finished and whole and len(json.loads(said) or ()) == N_CELLS):
        count.unfinished.append(index)
    shutil.rmtree(store)


def main(n_points: int, seed: int = 0) -> int:
    chance = random.Random(seed)
    count = Count()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ended, said = forked(lambda pipe: write_and_die(folder / "whole.zarr", -1, pipe))
        assert ended
        n_changes = json.loads(said)
        for index in range(n_points):
            try_one(folder, index, chance.randint(1, n_changes), chance, count)
    print(
        f"{n_points} kill points over {n_changes} changes of files: {count.killed} killed, "
        f"{count.complete} complete cells found; {len(count.wrong)} stores with wrong cells, "
        f"{len(count.closed)} that do not open, {len(count.repeated)} with complete cells "
        f"measured again, {len(count.unfinished)} not finished by the same command."
    )
    if count.failures:
        print(count)
    return 1 if count.failures else 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
