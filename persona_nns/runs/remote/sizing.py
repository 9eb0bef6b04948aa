"""How many units (say, cells) go into one job, by what became of the jobs before.

A job that is too large for the server costs a place in its queue and has to be sent again, so one
is risked at a time: larger than any that worked, by no more than `GROWTH`, and never as large as
one that was refused. What worked and what was refused is read from the notes of jobs in the
store, those of other clients and of earlier commands of the run among them.
"""

from collections.abc import Sequence
from math import sqrt

from persona_nns.runs.remote.job_book import Job

#: A job may take about this long, and return this much.
SECONDS_PER_JOB = 300.0
RESULT_BYTES_PER_JOB = 64e6
#: Units of the first job, and of any.
FIRST_UNITS = 4
MOST_UNITS = 32
#: A job has at most this many times the units of the largest that worked.
GROWTH = 4
#: After so many refusals no more sizes are tried.
MOST_REFUSED = 3
_WORTH_TRYING = 1.25  # what a size has to gain over the one that worked


def units_per_job(noted: Sequence[Job], batch_size: int | None, session: str = "") -> int:
    """How many units the next job may have; 0 where it is better to wait for one that is there.

    Units that go together cost less than apart. So as long as sizes grow, a client waits for the
    larger job that it has risked; once one was refused, it goes on meanwhile with what works.

    Args:
        noted: the jobs of the run on this server, those that wait among them.
        batch_size: what the user asked for; it is exceeded by no job.
        session: the client's.
    """
    refused = [len(job.units) for job in noted if job.state == "refused"]
    failed = min(refused, default=None)
    written = [
        job
        for job in noted
        if job.state == "written" and (failed is None or len(job.units) < failed)
    ]
    if not written:
        first = batch_size or FIRST_UNITS
        return first if failed is None or first < failed else max(1, min(FIRST_UNITS, failed // 2))
    worked = max(len(job.units) for job in written)
    wanted = batch_size or min(_fitting(max(written, key=_when)), GROWTH * worked)
    if failed is not None and wanted >= failed:
        between = round(sqrt(worked * failed))
        wanted = between if worked * _WORTH_TRYING <= between < failed else worked
    risked = [job for job in noted if job.state == "waiting" and len(job.units) > worked]
    if wanted > worked and not refused and any(job.session == session for job in risked):
        return 0
    if risked or len(refused) >= MOST_REFUSED:
        wanted = min(wanted, worked)
    return wanted


def _when(job: Job) -> str:
    return job.submitted


def _fitting(job: Job) -> int:
    """How many units a job may have, by what one has taken."""
    seconds, n_bytes = job.seconds / len(job.units), job.result_bytes / len(job.units)
    fitting = min(SECONDS_PER_JOB / max(seconds, 1e-3), RESULT_BYTES_PER_JOB / max(n_bytes, 1.0))
    return min(max(1, int(fitting)), MOST_UNITS)
