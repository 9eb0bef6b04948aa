"""The errors a reader is meant to see: one sentence that says what was wrong and what to do."""


class PersonaError(Exception):
    """Something failed that the message explains; the command line exits with 1."""

    exit_code = 1


class UsageError(PersonaError):
    """The request itself was wrong (a name, a number, a file); the command line exits with 2."""

    exit_code = 2


class Interrupted(KeyboardInterrupt):
    """A run was stopped by hand; the message says what is kept.

    As an interruption it passes by whoever handles errors, and stops a notebook's other cells.
    """

    def _render_traceback_(self) -> list[str]:
        """What Jupyter shows in place of the traceback, of which nothing would be news."""
        return [str(self)]


def missing_extra(need: str, extra: str) -> UsageError:
    """The error where a package of an extra is missing; ``need`` is like ``Workers need Ray``."""
    return UsageError(f"{need}, which is not installed: pip install 'persona-nns[{extra}]'.")


class RemoteError(PersonaError):
    """Something failed on a server, or on the way to it.

    Attributes:
        server_traceback: what the server said, where it said more than the message.
    """

    def __init__(self, message: str, server_traceback: str = "") -> None:
        super().__init__(message)
        self.server_traceback = server_traceback
        if server_traceback:
            self.add_note(f"On the server:\n{server_traceback}")


class UnreachableError(RemoteError):
    """The server did not answer for as long as was waited."""


class AccessError(RemoteError):
    """The server does not accept the API key, or wants one."""


class NotHostedError(RemoteError):
    """The server does not host the model."""


class JobFailedError(RemoteError):
    """What was measured raised an exception on the server."""


class JobTooLargeError(RemoteError):
    """A job did not fit into the server's memory or time."""


class JobLostError(RemoteError):
    """The server does not know a job any more, or cannot give its result."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message; of one without a message, its type."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".: ")


def one_line(error: BaseException) -> str:
    """The first line of an error's message as a sentence."""
    return first_line(error) + "."


def says_out_of_memory(message: str) -> bool:
    """Whether a message, or a server's traceback, says that a batch did not fit."""
    return any(words in message for words in ("DefaultCPUAllocator", "OutOfMemoryError"))
