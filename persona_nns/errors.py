"""The errors a reader is meant to see: one sentence that says what was wrong and what to do."""


class PersonaError(Exception):
    """Something failed that the message explains; the command line exits with 1."""

    exit_code = 1


class UsageError(PersonaError):
    """The request itself was wrong (a name, a number, a file); the command line exits with 2."""

    exit_code = 2
