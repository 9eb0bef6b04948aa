"""The plan of a run before it starts: what it would compute, write, send and ask for.

What follows from the plan is exact or a bound, and said as such. How long it takes, and how many
token-layers are run, depends on what an experiment does, and is not counted by hand: it is known
from earlier runs, or from a batch that is measured for it.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnsight import TransformersModel

from persona_nns.declarations.catalog import Experiment
from persona_nns.declarations.functions import the_experiment
from persona_nns.declarations.plans import Unit
from persona_nns.declarations.variables import Variable
from persona_nns.errors import UsageError
from persona_nns.models.load import hosted, load_model, outline_model
from persona_nns.prompts.grids import Grid
from persona_nns.runs.estimates import (
    Rate,
    Read,
    Written,
    counted,
    earlier_rate,
    job_sizes,
    read,
    written,
)
from persona_nns.runs.known import known_of, missing_layers
from persona_nns.runs.progress import clock, count
from persona_nns.runs.remote.payload import payload_of
from persona_nns.runs.run import PlannedRun, measure_batch, plan_run

_CALIBRATED = 4  # units that are measured, at most, after one that warms up
_DOLLARS_OF = 1_000_000  # tokens that a price is for


@dataclass(frozen=True)
class Judging:
    """What a judge behind an endpoint is asked.

    Attributes:
        n_calls: at most; what is said twice, or was judged before, is asked once.
        dollars: about; None where there are no prices, or it is not known what is asked.
    """

    n_calls: int
    dollars: float | None


@dataclass(frozen=True)
class Jobs:
    """What goes to a server and comes back.

    Attributes:
        sizes: units of each job, as long as the server refuses none.
        sent: bytes of the first job.
        returned: bytes of all results, about; they are compressed, and texts come on top.
    """

    sizes: tuple[int, ...]
    sent: int
    returned: int


@dataclass(frozen=True)
class Calibration:
    """A batch that was measured.

    Attributes:
        n_units: in it.
        token_layers: that it ran: tokens of each pass, padding included, times layers.
        seconds: that it took.
    """

    n_units: int
    token_layers: int
    seconds: float


@dataclass(frozen=True)
class Explanation:
    """The plan of a run; printed, it is a list of sentences.

    Attributes:
        experiment: its name.
        model: label of the model.
        grid: name of the inputs.
        run: the group that results go to.
        noun: what a unit is called.
        n_asked: units that were asked for.
        n_complete: those that the run holds.
        n_elsewhere: further ones that other runs of the store hold: they are copied.
        n_partly: further ones of which other runs hold some layers: the rest is measured.
        n_layers: of the model.
        read: the prompts of the units that are left.
        written: what these units write.
        judging: what is asked of a judge; None where none is asked behind an endpoint.
        jobs: on a server; None where the model runs here.
        rate: of earlier runs; None where there are none.
        calibration: a batch that was measured for this; None where none was.
    """

    experiment: str
    model: str
    grid: str
    run: str
    noun: str
    n_asked: int
    n_complete: int
    n_elsewhere: int
    n_partly: int
    n_layers: int
    read: Read
    written: Written
    judging: Judging | None
    jobs: Jobs | None
    rate: Rate | None
    calibration: Calibration | None

    @property
    def n_left(self) -> int:
        """Units that will be measured."""
        return self.n_asked - self.n_complete - self.n_elsewhere

    @property
    def seconds(self) -> float | None:
        """How long it will take, about; None where it is not known."""
        if not self.n_left:
            return 0.0
        if self.calibration is not None:
            return self.calibration.seconds / self.calibration.n_units * self.n_left
        return None if self.rate is None else self.rate.seconds * self.n_left

    def __str__(self) -> str:
        """What there is to say, a line each."""
        lines = [f"{self.experiment} on {self.model}, {self.grid}", f"  {self._units()}"]
        if self.n_left:
            said = (self._prompts(), self._work(), self._store(), self._judge(), self._jobs())
            lines += [f"  {line}" for line in (*said, self._time()) if line]
        return "\n".join(lines)

    def _repr_pretty_(self, printer: Any, _cycle: bool) -> None:  # noqa: FBT001 - IPython's
        printer.text(str(self))

    def _units(self) -> str:
        line = f"{count(self.n_asked, self.noun)} asked for, {self.n_complete} complete"
        if self.n_elsewhere:
            line += f", {self.n_elsewhere} copied from other runs of the store"
        line += f": {self.n_left} to measure" if self.n_left else ": nothing to compute"
        return f"{line}, {self.n_partly} of them at some layers only" if self.n_partly else line

    def _prompts(self) -> str:
        return (
            f"prompts: {self.read.n_prompts:,} rendered, of {self.read.n_tokens:,} tokens, "
            f"{self.read.n_shared:,} where shared beginnings are read once; through "
            f"{self.n_layers} layers {self.read.n_shared * self.n_layers:,} token-layers, "
            "before anything is said or done to them"
        )

    def _work(self) -> str:
        if self.calibration is None:
            return "token-layers in all: not known before a batch is measured (--calibrate)"
        measured = self.calibration
        n_all = round(measured.token_layers / measured.n_units * self.n_left)
        return (
            f"token-layers in all: about {n_all:,}, from the {measured.token_layers:,} of "
            f"{count(measured.n_units, self.noun)} that were measured for this"
        )

    def _store(self) -> str:
        texts = f" and {count(self.written.n_texts, 'text')}" if self.written.n_texts else ""
        return (
            f"store: at most {_size(self.written.n_bytes)} of numbers{texts} in "
            f"{self.written.n_chunks:,} chunks, compressed"
        )

    def _judge(self) -> str:
        if self.judging is None:
            return ""
        line = f"judge: at most {count(self.judging.n_calls, 'call')}"
        if self.judging.dollars is None:
            return f"{line}; what they cost is not known"
        return f"{line}, about ${self.judging.dollars:.2f} if answers are as long as they may be"

    def _jobs(self) -> str:
        if self.jobs is None:
            return ""
        sizes = self.jobs.sizes
        return (
            f"server: {count(len(sizes), 'job')} of {', '.join(map(str, sizes[:4]))}"
            f"{', …' if len(sizes) > 4 else ''} {self.noun}s, more if the server refuses some; the "
            f"first sends {_size(self.jobs.sent)}, all return about {_size(self.jobs.returned)}"
        )

    def _time(self) -> str:
        if self.calibration is not None:
            of = f"{count(self.calibration.n_units, self.noun)} that were measured for this"
            judge = ", without the judge" if self.judging is not None else ""
            return f"time: about {clock(self.seconds or 0.0)}, from {of}{judge}"
        if self.rate is None:
            elsewhere = self.jobs is not None
            hint = "" if elsewhere else "; --calibrate measures a batch"
            return f"time: not known, there is no earlier run in the store{hint}"
        queue = ", without waiting for the server" if self.jobs is not None else ""
        return f"time: about {clock(self.seconds or 0.0)}, as {self.rate.of} took{queue}"


def explain(
    experiment: str | Path | Experiment | Callable[..., Any],
    model: TransformersModel | str | Path,
    grid: str | Path | Grid | None = None,
    *,
    variables: Mapping[str, Variable] | None = None,
    store: str | Path = "stores/results.zarr",
    calibrate: bool = False,
    **settings: Any,
) -> Explanation:
    """Tell what a run would do before it starts; nothing is written, and no weights are loaded.

    Args:
        experiment: as in `run`.
        model: as in `run`; of a name, the weights are loaded only where a batch is measured.
        grid: as in `run`.
        variables: as in `run`.
        store: as in `run`; what it holds is not computed again.
        calibrate: measure a batch of at most four units, and one before that, to tell how long
            all of them take. Nothing of it is kept.
        **settings: other arguments of `run`.

    Raises:
        UsageError: the request is wrong, or cannot be told before something else is measured.
    """
    experiment = the_experiment(experiment, variables)
    check_explainable(experiment, settings)
    if isinstance(model, str | Path):
        model = load_model(model) if calibrate else outline_model(model)
    planned = plan_run(experiment, model, grid, store=store, **settings)
    return explain_planned(planned, calibrate=calibrate)


def explain_planned(
    planned: PlannedRun, *, calibrate: bool = False, remote: bool = False
) -> Explanation:
    """Tell what a checked run would do.

    Args:
        planned: the run.
        calibrate: measure a batch, as `explain` does.
        remote: it would go to a server, though the model is not that of one: its outline, say.

    Raises:
        UsageError: a batch cannot be measured.
    """
    request, store = planned.request, planned.store
    remote = remote or hosted(planned.model) is not None
    done = planned.done()
    pending = [unit for unit in request.units if unit.label not in done]
    copied, partly = _elsewhere(planned, pending)
    left = [unit for unit in pending if unit.label not in copied]
    goes = written(request.blocks, left)
    rate = earlier_rate(store, request.block)
    plan = request.plan
    return Explanation(
        experiment=request.experiment.name,
        model=request.block.model,
        grid=plan.name,
        run=request.block.run,
        noun=plan.noun,
        n_asked=len(request.units),
        n_complete=len(request.units) - len(pending),
        n_elsewhere=len(copied),
        n_partly=len(partly),
        n_layers=request.block.n_layers,
        read=read(plan, left),
        written=written(request.blocks, pending),
        judging=_judging(planned, goes.n_judged),
        jobs=_jobs(planned, left, goes, rate) if remote and left else None,
        rate=rate,
        calibration=_calibrated(planned, left, remote=remote) if calibrate and left else None,
    )


def check_explainable(experiment: Experiment, options: Mapping[str, Any]) -> None:
    """See that an experiment's plan is known before anything is measured.

    Raises:
        UsageError: it is not.
    """
    own = {name: options.get(name, each.default) for name, each in experiment.options.items()}
    if experiment.prepare is not None and (experiment.prepares or (lambda _: True))(own):
        raise UsageError(
            f"The experiment {experiment.name!r} first measures what it needs, and its plan is "
            "known after that; explain the experiment that it needs."
        )


def _elsewhere(planned: PlannedRun, pending: list[Unit]) -> tuple[set[str], set[str]]:
    """Labels of units that other runs hold, wholly and at some layers."""
    request = planned.request
    asked = set(request.arguments.get("layers", ()))
    known = known_of(planned.store, request)
    if request.experiment.finish is not None:
        known = [each for each in known if each.layers == asked]
    lacking = missing_layers(known, request, pending)
    partly = {unit.label for units in lacking.values() for unit in units}
    held = {label for each in known for label in each.units}
    return {unit.label for unit in pending if unit.label in held - partly}, partly


def _judging(planned: PlannedRun, n_judged: int) -> Judging | None:
    """What a judge behind an endpoint is asked, where the run has one."""
    request = planned.request
    options = request.options
    if "://" not in str(options.get("judge", "")) or not n_judged:
        return None
    prices, rubric = options.get("judge_prices"), request.plan.content.get("eval_prompt")
    longest = options.get("max_new_tokens")
    if not prices or rubric is None or longest is None:
        return Judging(n_judged, None)
    sent, received = (float(price) / _DOLLARS_OF for price in str(prices).split(","))
    n_sent = len(planned.model.tokenizer(rubric)["input_ids"]) + longest
    return Judging(n_judged, n_judged * (n_sent * sent + received))


def _jobs(planned: PlannedRun, left: list[Unit], goes: Written, rate: Rate | None) -> Jobs:
    """What goes to a server and comes back."""
    request = planned.request
    each = goes.n_numbers / len(left), 0.0 if rate is None else rate.seconds
    sizes = job_sizes(len(left), planned.batch_size, *each)
    first = left[: sizes[0]]
    sent = payload_of(planned.model, request, first, planned.execution, check=True)
    return Jobs(tuple(sizes), len(sent.data), goes.n_numbers)


def _calibrated(planned: PlannedRun, left: list[Unit], *, remote: bool) -> Calibration:
    """Measure a batch, after a unit that warms up; nothing is kept.

    Raises:
        UsageError: the model is not here.
    """
    model, request = planned.model, planned.request
    if remote or model.device.type == "meta":
        raise UsageError("A batch is measured of a model that is loaded here; leave out calibrate.")
    batch = left[: min(_CALIBRATED, planned.batch_size or _CALIBRATED)]
    measure_batch(request, model, batch[:1], planned.execution)
    with counted(model) as token_layers:
        started = time.perf_counter()
        measure_batch(request, model, batch, planned.execution)
        return Calibration(len(batch), token_layers(), time.perf_counter() - started)


def _size(n_bytes: int) -> str:
    """Bytes, for a person."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= size:
            return f"{n_bytes / size:.3g} {unit}"
    return f"{n_bytes} bytes"
