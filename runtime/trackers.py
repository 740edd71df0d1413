"""Where else the numbers go: TensorBoard and Weights & Biases. On rank 0 alone.

What a user must mend (a missing package, a missing key) is a UsageError before the training starts. Whatever else
fails, then or later, is told once on stderr, and the training goes on without that tracker.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

from dstrain.runtime.spec.errors import UsageError
from dstrain.runtime.spec.training_config import LogConfig

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter
    from wandb import Run

_KEY = "log.trackers"


class Tracker(Protocol):
    """One place that numbers go to. Its methods may raise anything."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Note the numbers of one step; steps rise."""

    def close(self) -> None:
        """Write what is left."""


class Trackers:
    """The trackers by name, as one that never raises."""

    def __init__(self, trackers: Mapping[str, Tracker]) -> None:
        self._trackers = dict(trackers)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Note the numbers of one step, such as {"loss": 2.1}, in every tracker."""
        self._each(lambda tracker: tracker.log(step, values))

    def close(self) -> None:
        """Let every tracker write what is left. Weights & Biases may take a while to send it."""
        self._each(lambda tracker: tracker.close())
        self._trackers.clear()

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                act(tracker)
            except Exception as error:  # whatever a third party raises: no tracker may end a training
                _warn(name, error)
                del self._trackers[name]


def open_trackers(config: LogConfig, name: str, run_id: str, folder: Path, job: Mapping[str, Any]) -> Trackers:
    """The trackers of the job `name`; their files go below `folder`, in one place for all attempts of `run_id`.

    run_id: empty where no launcher gave one. job: its whole configuration, as plain values.
    Raises UsageError (key log.trackers) for what the user must mend.
    """
    opened: dict[str, Tracker] = {}
    for kind in config.trackers:
        try:
            if kind == "tensorboard":
                own = run_id or f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
                opened[kind] = _TensorBoard(folder / "tensorboard" / own, job)
            else:
                opened[kind] = _WandB(config.project, name, run_id, folder, job)
        except UsageError:
            Trackers(opened).close()
            raise
        except Exception as error:  # a server that cannot be reached, and the like
            _warn(kind, error)
    return Trackers(opened)


class _TensorBoard:
    """Event files for `tensorboard --logdir`.

    The file is begun with the first step that comes: what an earlier attempt wrote of that step and later ones is
    then no longer shown.
    """

    def __init__(self, folder: Path, job: Mapping[str, Any]) -> None:
        self._summary_writer = _import("torch.utils.tensorboard", "tensorboard").SummaryWriter
        self._folder, self._job = folder, job
        self._writer: SummaryWriter | None = None
        with _in_folder(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if self._writer is None:
            self._writer = self._summary_writer(str(self._folder), purge_step=step, max_queue=1 << 16, flush_secs=10)
            as_code = "\n".join(f"    {line}" for line in json.dumps(self._job, indent=2).splitlines())
            self._writer.add_text("job", as_code, step)
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class _WandB:
    """A run of Weights & Biases; attempts of one run_id are one run there. WANDB_MODE and the like are honoured."""

    def __init__(self, project: str, name: str, run_id: str, folder: Path, job: Mapping[str, Any]) -> None:
        wandb = _import("wandb", "wandb")
        with _in_folder(folder):
            folder.mkdir(parents=True, exist_ok=True)
        try:
            self._run: Run = wandb.init(
                project=project,
                name=name,
                id=run_id or None,
                resume="allow" if run_id else None,
                dir=str(folder),
                config=dict(job),
                settings=wandb.Settings(console="off"),  # the launcher keeps every line as it is
            )
        except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
            reason = " ".join(str(error).split())
            fix = "`wandb login` or WANDB_API_KEY (--env WANDB_API_KEY); WANDB_MODE=offline keeps the numbers here"
            raise UsageError.mismatch(_KEY, "a wandb that lets us in", reason, fix) from error
        self._run.define_metric("*", step_metric="step")  # its own step may not fall, as ours does when we resume

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()


def _import(module: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        found = " ".join(str(error).split())
        raise UsageError.mismatch(_KEY, f"the package {package}", found, f"pip install {package}") from error


@contextmanager
def _in_folder(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError.mismatch(_KEY, "a folder that can be written", f"{folder}: {error.strerror}") from error


def _warn(name: str, error: Exception) -> None:
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    sys.stderr.write(f"dstrain: {_KEY}: {name} failed ({reason}); the training goes on without it\n")
