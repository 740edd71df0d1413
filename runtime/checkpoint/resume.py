"""What a job goes on from: its own checkpoints, another's, or a model to begin with."""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace
from pathlib import Path

from dstrain.runtime.checkpoint.commit import in_use, leave_later
from dstrain.runtime.checkpoint.disks import is_first_there
from dstrain.runtime.checkpoint.load import Loaded, load
from dstrain.runtime.checkpoint.manifest import Manifest, folder_of, steps_in
from dstrain.runtime.engine import Engine
from dstrain.runtime.spec.config import JobConfig
from dstrain.runtime.spec.errors import CheckpointError, UsageError


def folder_of_job(job: JobConfig) -> Path | None:
    """Where the job keeps its checkpoints; None: it keeps none."""
    if job.checkpoint is None:
        return None
    return job.checkpoint.dir or Path("checkpoints") / job.name


def resume_job(engine: Engine, job: JobConfig, *, fresh_only: bool) -> Loaded | None:
    """Go on as `checkpoint.resume` says, or from the newest whole one if this is another attempt of the job; else begin
    with the model of `checkpoint.init_from`.

    None: neither. fresh_only: without a word to go on, checkpoints that are there already are an error,
    since those of this run would mix with them. Raises UsageError, CheckpointError.
    """
    root, config = folder_of_job(job), job.checkpoint
    if root is None or config is None:
        return None
    _sweep(engine, root)
    word, attempt = config.resume, int(os.environ.get("DSTRAIN_ATTEMPT", "0"))
    run_id = os.environ.get("DSTRAIN_RUN_ID", "")
    held = steps_in(root)
    everyone = engine.comm.all_gather_object((held, attempt > 0 and _has_saved(root, held, run_id)))
    if any(has_saved for _, has_saved in everyone):
        word = "auto"
    steps = sorted({step for steps, _ in everyone for step in steps}, reverse=True)
    if word is None and fresh_only and attempt == 0 and steps:
        fix = "go on from it by --resume auto, or give another checkpoint.dir or name"
        found = f"step {steps[0]} in {root}"
        raise UsageError.mismatch("checkpoint.dir", "no checkpoints of another run", found, fix)
    here = _resolve(root, word, steps)
    if here is None:
        path = config.init_from
        return load(engine, path, model_only=True, exempt=config.init_except) if path is not None else None
    loaded = load(engine, here)
    loaded = replace(loaded, left=_leave_later(engine, root, loaded))
    if job.train.steps is not None and loaded.step > job.train.steps:
        found = f"step {loaded.step} in {loaded.path}"
        raise UsageError.mismatch("train.steps", "more steps than the checkpoint has", found)
    return loaded


def _resolve(root: Path, word: str | None, steps: list[int]) -> Path | None:
    """What `--resume auto|STEP|PATH` means: a checkpoint or a folder of them; None: auto, and there is none."""
    if word is None or word == "auto":
        return root if steps and word else None
    return folder_of(root, int(word)) if word.isdigit() else Path(word)


def _sweep(engine: Engine, root: Path) -> None:
    """What saves have left unfinished, unless somebody saves there now; all ranks wait for it."""
    if is_first_there(root, engine.comm):
        with contextlib.suppress(OSError), in_use(root):
            pass


def _leave_later(engine: Engine, root: Path, loaded: Loaded) -> tuple[int, ...]:
    """Newer steps than the one that the job goes on from are of another life: a restart must not go on from them.
    Returns those that were set aside."""
    left: list[int] = []
    if is_first_there(root, engine.comm) and loaded.path.parent.absolute() == root.absolute():
        with contextlib.suppress(OSError):
            left = leave_later(root, loaded.step)
    return tuple(sorted({step for steps in engine.comm.all_gather_object(left) for step in steps}))


def _has_saved(root: Path, steps: list[int], run_id: str) -> bool:
    """Whether this run, in an attempt before, has saved anything here."""
    for step in steps:
        with contextlib.suppress(CheckpointError):
            if Manifest.read(folder_of(root, step)).run_id == run_id:
                return True
    return False
