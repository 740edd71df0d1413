"""Errors that a person can act on, shared by launcher and runtime.

    DstrainError                     has an exit code and one clear line
    ├── UsageError              2    a command line, file or configuration that cannot be right
    │   ├── HostfileError            carries file:line:column
    │   ├── ConfigError              carries file:line and the key
    │   └── ScheduleError            carries rank and cell
    ├── HostError             200    a host and what it refused; the transports translate third-party errors to these
    │   ├── UnreachableError  200
    │   ├── HostKeyError      201    unknown, changed or revoked
    │   └── AuthenticationError 201
    ├── RendezvousError       205    the fixed address or port cannot be had
    ├── CheckpointError       204    a checkpoint cannot be written, or none that is whole can be read
    ├── NonFiniteError        206    loss or gradient is not finite
    └── ReplicasDifferError   209    ranks no longer hold the same parameters

Standard library only: the agent uses this module on a bare Python.
"""

from __future__ import annotations

from dstrain.runtime.spec.exit_codes import ExitCode


class DstrainError(Exception):
    """A user's error. `str(error)` is the one line to show; `exit_code` is what the process returns."""

    exit_code: int = ExitCode.USAGE


class UsageError(DstrainError):
    """Something that the user wrote cannot be right."""

    @classmethod
    def mismatch(cls, where: str, expected: str, found: str, fix: str = "") -> UsageError:
        """`where: expected …, found …. fix` in the one form that all our messages have."""
        return cls(f"{where}: expected {expected}, found {found}" + (f"; {fix}" if fix else ""))


class HostfileError(UsageError):
    """A hostfile (or a --hosts expression) that cannot be read; the message starts with file:line:column."""


class ConfigError(UsageError):
    """A job.yaml, --set or option that cannot be right; the message starts with file:line and the key."""


class ScheduleError(UsageError):
    """A pipeline schedule that cannot run. The message is one line, below it the part of the grid that it is about.

    rank, cell: where; a cell that follows the row's last means that something is missing there.
    """

    def __init__(self, message: str, rank: int, cell: int) -> None:
        super().__init__(message)
        self.rank, self.cell = rank, cell


class HostError(DstrainError):
    """A host that we could not use.

    host: its name as the user wrote it. cause: what happened. remedy: what the user can do.
    """

    exit_code = ExitCode.HOST_UNREACHABLE

    def __init__(self, host: str, cause: str, remedy: str) -> None:
        super().__init__(f"{host}: {cause}; {remedy}")
        self.host, self.cause, self.remedy = host, cause, remedy


class UnreachableError(HostError):
    """No connection: name unknown, refused, timed out, no route."""


class HostKeyError(HostError):
    """The host's key is unknown, has changed, or is revoked."""

    exit_code = ExitCode.HOST_KEY_OR_AUTHENTICATION


class AuthenticationError(HostError):
    """The host is there and is who it says, but did not let us in."""

    exit_code = ExitCode.HOST_KEY_OR_AUTHENTICATION


class RendezvousError(DstrainError):
    """The fixed rendezvous address or port cannot be had."""

    exit_code = ExitCode.RENDEZVOUS


class CheckpointError(DstrainError):
    """A checkpoint cannot be written, or none that is whole can be read."""

    exit_code = ExitCode.CHECKPOINT


class NonFiniteError(DstrainError):
    """The loss or a gradient is not a finite number."""

    exit_code = ExitCode.NON_FINITE


class ReplicasDifferError(DstrainError):
    """Ranks no longer hold the same numbers where they must: a memory or a processor is at fault.

    ranks: those that may be; a majority shows which, of two it is both.
    """

    exit_code = ExitCode.REPLICAS_DIFFER

    def __init__(self, message: str, ranks: tuple[int, ...]) -> None:
        super().__init__(message)
        self.ranks = ranks
