"""DeepSpeed's engine over ours."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dstrain.runtime.checkpoint.disks import is_first_there
from dstrain.runtime.checkpoint.load import load
from dstrain.runtime.checkpoint.save import save
from dstrain.runtime.engine import Engine, TorchSchedule
from dstrain.runtime.spec.config import JobConfig
from dstrain.runtime.spec.errors import CheckpointError, UsageError

LATEST = "latest"


class DeepSpeedEngine:
    """DeepSpeed's methods that its documentation teaches; attributes of the module are reached through it.

    Losses are means; the gradient is that of their mean over micro-batches and ranks. `step` behind every backward;
    one that is not the last of a step only counts. micro_steps, global_steps, skipped_steps: as there.
    """

    def __init__(
        self, engine: Engine, job: JobConfig, training_dataloader: DataLoader[Any] | None, steps_per_print: int | None
    ) -> None:
        self._engine, self._job, self._steps_per_print = engine, job, steps_per_print
        self.training_dataloader = training_dataloader
        self.micro_steps = self.skipped_steps = 0
        self._step_applied = False
        schedule = engine.schedule
        self.lr_scheduler = schedule.scheduler if isinstance(schedule, TorchSchedule) else None

    # --- training ----------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._engine(*args, **kwargs)

    forward = __call__

    def backward(self, loss: Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True) -> Tensor:
        """Add a micro-batch's gradients. Returns the loss ÷ micro-batches of a step, as DeepSpeed does."""
        if retain_graph:
            raise UsageError.mismatch("engine.backward", "retain_graph=False", "True", "add up the losses before it")
        if not scale_wrt_gas:
            fix = "gradients are always those of the mean over a step's micro-batches"
            raise UsageError.mismatch("engine.backward", "scale_wrt_gas=True", "False", fix)
        self._engine.backward(loss)
        return loss / self.gradient_accumulation_steps()

    def step(self, lr_kwargs: Mapping[str, Any] | None = None) -> None:
        """Behind each backward: an update behind the last one of a step, else nothing but the count."""
        if lr_kwargs:
            fix = "step a scheduler that wants them in the script, without passing it to initialize"
            raise UsageError.mismatch("engine.step", "no lr_kwargs", str(dict(lr_kwargs)), fix)
        result = self._engine.step()
        self.micro_steps += 1
        self._step_applied = result is not None and not result.skipped
        if result is None:
            return
        self.skipped_steps += result.skipped
        if self._steps_per_print and self.global_steps % self._steps_per_print == 0 and self.global_rank == 0:
            print(f"step={self.global_steps}, skipped={self.skipped_steps}, lr={self.get_lr()}", flush=True)

    def train(self, mode: bool = True) -> None:
        self.module.train(mode)

    def eval(self) -> None:
        self.module.eval()

    def zero_grad(self) -> None:
        """Nothing: no gradient stays behind a step."""

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the micro-batch under way is the last one of its step."""
        return (self.micro_steps + 1) % self.gradient_accumulation_steps() == 0

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        fix = "gradient_accumulation_steps says how many micro-batches a step has"
        raise UsageError.mismatch("engine.set_gradient_accumulation_boundary", "no call of it", str(is_boundary), fix)

    def no_sync(self) -> NoReturn:
        fix = "gradient_accumulation_steps says how many micro-batches are added up before they are reduced"
        raise UsageError.mismatch("engine.no_sync", "no call of it", "one", fix)

    def was_step_applied(self) -> bool:
        """Whether the last step() has changed parameters."""
        return self._step_applied

    # --- what it is --------------------------------------------------------------------------------------------

    @property
    def module(self) -> nn.Module:
        return self._engine.module

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self._engine.optimizer

    @property
    def global_steps(self) -> int:
        return self._engine.global_step

    @property
    def global_samples(self) -> int:
        return self.global_steps * self.train_batch_size()

    @property
    def local_rank(self) -> int:
        return self._engine.comm.local_rank

    @property
    def global_rank(self) -> int:
        return self._engine.rank

    @property
    def world_size(self) -> int:
        return self._engine.world_size

    dp_world_size = world_size

    @property
    def device(self) -> torch.device:
        return self._engine.device

    def get_lr(self) -> list[float]:
        """Of each group of the optimizer."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def get_global_grad_norm(self) -> float:
        """Of the last step, before clipping."""
        return self._engine.grad_norm

    def train_batch_size(self) -> int:
        assert self._job.batch is not None
        return self._job.batch.global_

    def train_micro_batch_size_per_gpu(self) -> int:
        assert self._job.batch is not None
        return self._job.batch.micro

    def gradient_accumulation_steps(self) -> int:
        return self._engine.config.accumulation

    def gradient_clipping(self) -> float:
        """0: none."""
        return self._job.train.clip or 0.0

    def zero_optimization(self) -> bool:
        return self._job.zero.stage > 0

    def zero_optimization_stage(self) -> int:
        return self._job.zero.stage

    def fp16_enabled(self) -> bool:
        return self._job.precision.dtype == "fp16"

    def bfloat16_enabled(self) -> bool:
        return self._job.precision.dtype == "bf16"

    def loss_scale(self) -> float:
        return self._engine.scaler.value

    def __getattr__(self, name: str) -> Any:
        """The module's, as DeepSpeed does it."""
        if name.startswith("_") or "_engine" not in self.__dict__:
            raise AttributeError(name)
        try:
            return getattr(self._engine.module, name)
        except AttributeError:
            raise AttributeError(
                f"engine.{name}: neither the model nor our form of DeepSpeed's engine has it; see docs/deepspeed.md"
            ) from None

    # --- saving ------------------------------------------------------------------------------------------------

    def save_checkpoint(
        self,
        save_dir: str | Path,
        tag: str | None = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Save, on all ranks and between two steps, as save_dir/tag, by default global_stepN. True.

        What the tag was before is deleted once the new one stands. client_state: JSON, rank 0's, a part of the
        checkpoint, which load_checkpoint gives back. Raises UsageError, CheckpointError.
        """
        if exclude_frozen_parameters:
            raise UsageError.mismatch("engine.save_checkpoint", "all parameters saved", "exclude_frozen_parameters")
        if self._engine.micro_step:
            found = f"micro-batch {self._engine.micro_step} of {self.gradient_accumulation_steps()}"
            raise UsageError.mismatch("engine.save_checkpoint", "a call between two steps", found)
        try:
            json.dumps(dict(client_state or {}))
        except TypeError as error:
            raise UsageError.mismatch("engine.save_checkpoint: client_state", "JSON", str(error)) from None
        tag = tag or f"global_step{self.global_steps}"
        save(self._engine, Path(save_dir) / str(tag), keep_last=1, extra=client_state)
        problem = None
        if save_latest and is_first_there(Path(save_dir), self._engine.comm):
            try:
                beside = Path(save_dir) / f"{LATEST}.tmp"
                beside.write_text(str(tag))
                beside.replace(Path(save_dir) / LATEST)
            except OSError as error:  # all ranks must hear of it
                problem = f"{save_dir}: expected to save, found {error.strerror}"
        for said in self._engine.comm.all_gather_object(problem):
            if said:
                raise CheckpointError(said)
        return True

    def load_checkpoint(
        self, load_dir: str | Path, tag: str | None = None, **settings: Any
    ) -> tuple[str | None, dict[str, Any] | None]:
        """(path, client_state) of what save_checkpoint made; without a tag the latest; (None, None) if there is none.

        The first rank that knows a tag has the word. settings: DeepSpeed's others. load_module_only takes the
        parameters and buffers alone, load_module_strict=False also where names or shapes differ; the rest can only be
        what it is by default. Raises UsageError, CheckpointError.
        """
        module_only = settings.pop("load_module_only", False)
        exempt = [] if settings.pop("load_module_strict", True) else ["*"]
        whole = {"load_optimizer_states": True, "load_lr_scheduler_states": True, "custom_load_fn": None}
        for name, value in settings.items():
            if value != whole.get(name, ...) and not (module_only and name in whole and name != "custom_load_fn"):
                fix = "a checkpoint is loaded as a whole, or by load_module_only=True"
                raise UsageError.mismatch("engine.load_checkpoint", "none of its other arguments", name, fix)
        if exempt and not module_only:
            fix = "add load_module_only=True"
            raise UsageError.mismatch("engine.load_checkpoint", "load_module_strict=True", "False", fix)
        found = next(filter(None, self._engine.comm.all_gather_object(tag or _latest(Path(load_dir)))), None)
        if found is None:
            return None, None
        loaded = load(self._engine, Path(load_dir) / str(found), model_only=module_only, exempt=exempt)
        self.micro_steps = self.global_steps * self.gradient_accumulation_steps()
        return os.fspath(Path(load_dir) / str(found)), dict(loaded.extra)

    def save_16bit_model(self, save_dir: str | Path, save_filename: str = "", **settings: Any) -> bool:
        """Write the whole model in its dtype, at every stage, as save_dir/model.safetensors; on all ranks. True."""
        if save_filename not in ("", "model.safetensors"):
            fix = "no pickle is written; leave it out, and read the model by safetensors"
            raise UsageError.mismatch("engine.save_16bit_model", "model.safetensors", repr(save_filename), fix)
        if settings.get("exclude_frozen_parameters"):
            raise UsageError.mismatch("engine.save_16bit_model", "all parameters saved", "exclude_frozen_parameters")
        self._engine.save_model(save_dir)
        return True

    save_fp16_model = save_16bit_model


def _latest(folder: Path) -> str | None:
    """The tag that was saved last, on this rank's disk."""
    try:
        return (folder / LATEST).read_text().strip() or None
    except (OSError, ValueError):
        return None
