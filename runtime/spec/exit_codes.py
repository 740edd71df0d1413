"""The exit codes of `dstrain run`, written once.

1 to 125 and 255 are the root cause worker's own; 128+N means that it died of signal N.
`report.json` has `origin: worker | launcher`, which settles a collision. Standard library only.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    OK = 0
    USAGE = 2
    INTERRUPTED = 130  # Ctrl-C
    HANGUP = 129  # the terminal was closed
    TERMINATED = 143  # the head got SIGTERM
    HOST_UNREACHABLE = 200  # unreachable or lost
    HOST_KEY_OR_AUTHENTICATION = 201
    PREFLIGHT = 202
    HANG = 203
    CHECKPOINT = 204  # checkpoints cannot be written
    RENDEZVOUS = 205  # a fixed rendezvous address or port cannot be had
    NON_FINITE = 206
    AGENT_LOST = 207
    LEFT_EARLY = 208  # a rank left early and the others stalled
    REPLICAS_DIFFER = 209  # ranks no longer hold the same parameters


def of_status(status: int) -> int:
    """A shell's code for a wait status as `subprocess` gives it: -N (died of signal N) becomes 128+N."""
    return 128 - status if status < 0 else status
