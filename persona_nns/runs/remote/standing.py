"""How jobs stand on their servers, asked without taking anything of theirs."""

from collections.abc import Iterable

from nnsight.schema.response import Status

from persona_nns.errors import RemoteError, first_line
from persona_nns.models.servers import Server
from persona_nns.runs.remote.connection import Connection, Patience, job_error
from persona_nns.runs.remote.flights import state_of
from persona_nns.runs.remote.job_book import Job

_PATIENCE = Patience(unreachable=5.0, read=10.0)


def standings(jobs: Iterable[Job]) -> dict[str, str]:
    """What servers say of jobs now, by id; a server that does not answer is asked once.

    The key is not sent: the addresses are a store's, which may be anybody's, and a status is given
    without it.
    """
    said: dict[str, str] = {}
    silent: set[str] = set()
    for job in jobs:
        said[job.id] = "the server does not answer"
        if job.host in silent:
            continue
        connection = Connection(Server(job.host, sends_key=False), _PATIENCE)
        try:
            said[job.id] = _standing(connection, job)
        except RemoteError:
            silent.add(job.host)
        finally:
            connection.close()
    return said


def _standing(connection: Connection, job: Job) -> str:
    response = connection.poll(job.id)
    if response is None:
        return "unknown to the server, or not begun"
    if response.status == Status.ERROR:
        return f"failed: {first_line(job_error(response.description))}"
    if response.status == Status.COMPLETED:
        return "done; the same command takes its result"
    return state_of(response)
