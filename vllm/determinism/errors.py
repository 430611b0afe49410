"""What can go wrong, and the exit status that each kind of it gives."""

EXIT_PASS = 0
EXIT_FAIL = 1
EXIT_USAGE = 2
EXIT_INCONCLUSIVE = 3
EXIT_INTERRUPTED = 130
EXIT_READER_GONE = 141
"""As the shell has it for a command whose reader went away."""


class HarnessError(Exception):
    """Ends the run; its text is the one line that the user reads."""

    exit_code = EXIT_USAGE


class UsageError(HarnessError):
    """A setting, or a request made from it, that cannot work."""

    def __init__(self, name: str, value: object, valid: str) -> None:
        super().__init__(f"{name}={value!r} is not valid: {valid}")


class Refused(HarnessError):
    """The server answers, but not to this: a wrong key, an unknown model, a prompt beyond the context."""


class Unreachable(HarnessError):
    """Nothing answers at the address, or nothing answers there any more."""


class RunFailed(HarnessError):
    """The server never gave a sound answer where the run needs one."""

    exit_code = EXIT_FAIL


class LevelNotOffered(HarnessError):
    """The level that was asked for cannot be compared on this server."""

    exit_code = EXIT_INCONCLUSIVE


class RequestFailed(Exception):
    """One request got no answer that can be compared; the run goes on and cannot pass.

    Attributes:
        kind: a word for counting: http, malformed, dropped, timeout, busy, nan, replaced.
        status: the HTTP status, where there was one.
    """

    def __init__(self, kind: str, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.status = status
