"""The plan: pure, printable, and exactly what runs.

(what the user asked for, the hosts with their slots) -> LaunchPlan. `dstrain run --dry-run` prints it, `dstrain run`
executes it.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from dstrain.launcher.hostfile import Host
from dstrain.runtime.spec.errors import UsageError
from dstrain.runtime.spec.frames import ProcessSpec

TargetKind = Literal["script", "module", "program"]
JOB_FILE_ENDINGS = (".yaml", ".yml")  # of a target that is a job for our trainer
MASK = "***"
SECRET_WORDS = ("KEY", "SECRET", "TOKEN", "PASS", "CREDENTIAL", "AUTH")


@dataclass(frozen=True)
class Target:
    """What every rank runs. `arguments` reach it byte for byte."""

    kind: TargetKind
    name: str
    arguments: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        words = {"script": ["python", self.name], "module": ["python", "-m", self.name], "program": [self.name]}
        return shlex.join([*words[self.kind], *self.arguments])


@dataclass(frozen=True)
class Request:
    """Everything that a run is asked to be, from the command line and the job file, before any host was seen."""

    target: Target
    hosts: tuple[Host, ...]  # of the first attempt
    cwd: str
    nproc_per_node: int | Literal["auto"] | None = None
    environment: dict[str, str] = field(default_factory=dict)  # --env, --env-file, run.env
    secret_names: frozenset[str] = frozenset()  # of these, values are never written down
    pass_environment: dict[str, str] = field(default_factory=dict)
    python: str | None = None
    prologue: str | None = None
    master_address: str | None = None
    master_port: int = 0
    interface: str | None = None
    max_restarts: int = 0
    min_nodes: int | None = None  # None: all of `hosts`
    grace_s: float = 10.0
    hang_s: float | None = None  # None: from the run's own steps; 0: never
    preload: bool = True
    requirements: tuple[str, ...] = ()
    job: str | None = None
    excluded_slots: dict[str, tuple[int, ...]] = field(default_factory=dict)  # by host, where slots are not known yet
    spares: tuple[Host, ...] = ()  # for later attempts
    notes: tuple[str, ...] = ()  # what the user should know at once

    def to_json(self) -> dict[str, Any]:
        """As `job.json` has it: every secret masked."""
        shown = asdict(self) | {"environment": self.shown_environment(), "secret_names": sorted(self.secret_names)}
        del shown["pass_environment"]
        return shown | {"job": json.loads(self.job) if self.job else None}

    def slots(self, host: Host) -> int | None:
        """Ranks on this host as far as anybody has said; None: the agent counts the GPUs."""
        if isinstance(self.nproc_per_node, int):
            return self.nproc_per_node
        if self.nproc_per_node == "auto":
            return len(host.gpus) if host.gpus is not None else None
        return host.slots if host.slots is not None else (len(host.gpus) if host.gpus is not None else None)

    def shown_environment(self) -> dict[str, str]:
        """The job's environment with every value masked that came from elsewhere than the command line itself."""
        both = {**dict.fromkeys(self.pass_environment, MASK), **self.environment}
        hidden = {name for name in both if name in self.secret_names or _sounds_secret(name)}
        return {name: MASK if name in hidden else value for name, value in both.items()}


def _sounds_secret(name: str) -> bool:
    return any(word in name.upper() for word in SECRET_WORDS)


@dataclass(frozen=True)
class NodePlan:
    """One host's part. `processes` in the order of local_rank; `gpus`: None leaves the choice to the ranks."""

    node_rank: int
    host: str
    transport: str
    processes: tuple[ProcessSpec, ...]
    gpus: tuple[int, ...] | None = None


@dataclass(frozen=True)
class LaunchPlan:
    """Ranks are numbered host by host in the hostfile's order."""

    run_id: str
    target: Target
    cwd: str
    world_size: int
    nodes: tuple[NodePlan, ...]
    environment: dict[str, str]  # as shown: secret values masked
    master_address: str  # what is known before the hosts have dialled each other
    max_restarts: int
    grace_s: float
    hang_s: float | None
    spares: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()  # of the job, so that it fits fewer ranks

    def host_of(self, rank: int) -> NodePlan:
        return next(node for node in self.nodes if any(spec.rank == rank for spec in node.processes))

    def to_json(self) -> dict[str, Any]:
        """The plan as `plan.json` and `--dry-run --json` have it."""
        return asdict(self)


def make_plan(request: Request, run_id: str, slots: Sequence[int], changes: tuple[str, ...] = ()) -> LaunchPlan:
    """Number the ranks. slots: ranks per host, in the order of request.hosts. Raises UsageError for an empty world."""
    world_size = sum(slots)
    if world_size == 0:
        raise UsageError.mismatch("hosts", "at least one rank", "0 slots on every host", "give slots=N or -n N")
    nodes: list[NodePlan] = []
    first = 0
    for node_rank, (host, count) in enumerate(zip(request.hosts, slots, strict=True)):
        specs = [
            ProcessSpec(first + local, local, _rank_environment(first + local, local, count, node_rank, slots))
            for local in range(count)
        ]
        nodes.append(NodePlan(node_rank, host.name, host.transport, tuple(specs), host.gpus))
        first += count
    single = len(request.hosts) == 1
    return LaunchPlan(
        run_id=run_id,
        target=request.target,
        cwd=request.cwd,
        world_size=world_size,
        nodes=tuple(nodes),
        environment=request.shown_environment(),
        master_address=request.master_address or ("127.0.0.1" if single else f"of {request.hosts[0].name}, dialled"),
        max_restarts=request.max_restarts,
        grace_s=request.grace_s,
        hang_s=request.hang_s,
        spares=tuple(host.name for host in request.spares),
        changes=changes,
    )


def _rank_environment(rank: int, local: int, count: int, node: int, slots: Sequence[int]) -> dict[str, str]:
    """torchrun's names for what differs between ranks (torch.distributed.run documents them)."""
    used = [index for index, slot_count in enumerate(slots) if slot_count]
    values = {
        "RANK": rank,
        "LOCAL_RANK": local,
        "WORLD_SIZE": sum(slots),
        "LOCAL_WORLD_SIZE": count,
        "GROUP_RANK": used.index(node),
        "GROUP_WORLD_SIZE": len(used),
        "NODE_RANK": used.index(node),
        "ROLE_RANK": rank,
        "ROLE_WORLD_SIZE": sum(slots),
        "ROLE_NAME": "default",
    }
    return {name: str(value) for name, value in values.items()}


def attempt_environment(
    run_id: str, attempt: int, max_restarts: int, address: str, port: int, interface: str
) -> dict[str, str]:
    """What is common to all ranks of one host in one attempt."""
    values = {
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": run_id,
        "TORCHELASTIC_RESTART_COUNT": str(attempt),
        "TORCHELASTIC_MAX_RESTARTS": str(max_restarts),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "DSTRAIN_RUN_ID": run_id,
        "DSTRAIN_ATTEMPT": str(attempt),
    }
    if interface:
        values |= {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": f"={interface}"}  # "=": not its namesakes
    return values
