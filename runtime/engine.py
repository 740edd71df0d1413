"""The engine: data parallelism, sharded by ZeRO stages, around one model and its optimizer.

One micro-batch, on every rank:

    output = engine(batch)
    engine.backward(loss, num_tokens)
    result = engine.step()          # None until the step's last micro-batch

[Note: the mean]
The loss is the mean over all tokens of the step, of all ranks and micro-batches. So each backward runs on the
*sum* over its tokens, gradients and token counts are summed over ranks, and one division by the global count
follows, together with clipping. How samples are spread over ranks and micro-batches changes neither loss nor
gradients. Without a number of tokens each micro-batch counts as one: the mean over ranks, as DDP takes it.

[Note: loss scale]
fp16 holds nothing below 6e-8, so its losses are multiplied before the backward. What arrives is a sum over
tokens and ranks; `_unit`, a power of two near the number of tokens of a step, divides it beforehand, so that the
scale means what it means elsewhere. Infinite gradients on one rank are infinite in the sum, so all ranks see the
overflow, skip the step and lower the scale alike, without a word about it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn, Protocol

import torch
from torch import Tensor, nn

from dstrain.runtime.comm import Communicator
from dstrain.runtime.ema import WeightAverage
from dstrain.runtime.gradients import GradientReducer
from dstrain.runtime.hooks import Hook
from dstrain.runtime.loss_scale import LossScaler
from dstrain.runtime.optimizers import set_learning_rate
from dstrain.runtime.pipeline.feed import TrainingFeed
from dstrain.runtime.pipeline.gradients import StagedGradients
from dstrain.runtime.pipeline.pipeline import Pipeline
from dstrain.runtime.precision import DTYPES, first_non_finite
from dstrain.runtime.replicas import ReplicaGuard
from dstrain.runtime.spec.errors import NonFiniteError, UsageError
from dstrain.runtime.spec.event import EventWriter
from dstrain.runtime.spec.parallel_dims import parallel_dims
from dstrain.runtime.spec.trace import Category
from dstrain.runtime.spec.training_config import CheckpointConfig, ParallelConfig, PrecisionConfig, ZeroConfig
from dstrain.runtime.task import Task
from dstrain.runtime.tracing.recorder import Recorder
from dstrain.runtime.tracing.tracer import Tracer
from dstrain.runtime.zero.divergence import ranks_in_words
from dstrain.runtime.zero.spread import needs_whole_tensors, spread

if TYPE_CHECKING:
    from dstrain.runtime.checkpoint.load import Loaded
    from dstrain.runtime.checkpoint.save import Saver

_REMEDY = "a smaller optimizer.lr, a longer schedule.warmup_steps or train.clip may help"

_CHECK_EVERY = 100

LEFT_OUT_IN_A_ROW = 10
"""Steps that are not finite that `skip` bears: the weights stay as they are, so that only other samples can mend it."""

OptimizerFactory = Callable[[Sequence[tuple[str, nn.Parameter]]], torch.optim.Optimizer]


@dataclass(frozen=True)
class EngineConfig:
    """The engine's share of a job.

    clip: largest global norm, or None. accumulation: micro-batches of a step. on_nonfinite: `skip` leaves out a step
    whose loss or gradient is not finite; the others raise, and whoever trains may rewind. check_replicas_every: steps
    between two comparisons of what ranks hold alike; None or 0: never. trace: the first and the last step whose
    timeline is kept, counted from 1 since the engine was made.
    """

    zero: ZeroConfig = field(default_factory=ZeroConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    clip: float | None = None
    accumulation: int = 1
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    ema_decay: float | None = None
    compile: bool = False
    on_nonfinite: Literal["stop", "skip", "rewind"] = "stop"
    check_replicas_every: int | None = 10
    trace: tuple[int, int] | None = None


class StepResult(NamedTuple):
    """What one step gives, the same on every rank. grad_norm: before clipping. tokens: of all ranks.

    skipped: the gradients overflowed fp16 or were not finite, nothing was updated. stop, save: a rank has been asked
    to.
    """

    loss: float
    grad_norm: float
    tokens: int
    skipped: bool = False
    stop: bool = False
    save: bool = False


class Schedule(Protocol):
    """Learning rates: ours, or torch's behind `TorchSchedule`."""

    def apply(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        """Set the learning rate of `step`, counted from 1, and return it."""

    def advance(self) -> None:
        """A step has been done."""

    def observe(self, val_loss: float) -> None:
        """A validation has been done."""

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs; JSON."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""


class Engine:
    """Trains `module` alike on every rank.

    On construction rank 0's parameters and buffers are broadcast: one collective for each. A step reduces every
    gradient once (at stages 2 and 3, once for each micro-batch), and all-reduces a few numbers; now and then a checksum
    of each rank's besides.

    global_step: steps done. micro_step: micro-batches of the step under way. learning_rate, grad_norm: of the last
    step. stop_requested, save_requested: set by signal handlers; the next step tells all ranks. dataloader: what
    `initialize` made of training_data. saver: what `step` moves on, while a save is in flight. checkpoints: the job's
    folder and section. loaded: what `load_checkpoint` has found last, with what was missing. trace: what steps consist
    of, while `tracer`, of `EngineConfig.trace`, records it.
    """

    def __init__(
        self,
        module: nn.Module,
        comm: Communicator,
        config: EngineConfig,
        optimizer: torch.optim.Optimizer | OptimizerFactory,
        schedule: Schedule | Callable[[torch.optim.Optimizer], Schedule],
        fill: Callable[[Tensor], object] = lambda parameter: None,
        pipeline: Pipeline | None = None,
    ) -> None:
        """fill: gives a parameter its numbers, for a module whose parameters wait for it (`build_deferred`). pipeline:
        of which the module is some stages."""
        self.module, self.comm, self.config, self.pipeline = module, comm, config, pipeline
        parallel = config.parallel
        self.dims = parallel_dims(
            comm.world_size, config.zero.stage, parallel.pipeline, parallel.data_replicate, parallel.data_shard
        )
        self.data = comm if pipeline is None else pipeline.data
        self.trace = Recorder()
        self.tracer = self._make_tracer()
        self.global_step = self.micro_step = 0
        self._stepped_behind = 0  # micro-batches of the step under way, when step() was last called
        self.learning_rate = self.grad_norm = 0.0
        self.dataloader: Iterable[Any] = ()
        self.saver: Saver | None = None
        self.checkpoints: tuple[Path, CheckpointConfig] | None = None
        self.loaded: Loaded | None = None
        self.stop_requested = self.save_requested = False
        trained = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
        self._elsewhere = [] if pipeline is None else pipeline.part.elsewhere
        trained += self._elsewhere
        whole_tensors = config.zero.stage > 0 and needs_whole_tensors(optimizer, trained)
        self.weights, self.gradients = spread(
            module,
            self.data,
            self.dims,
            config.zero,
            config.precision,
            whole_tensors,
            fill,
            config.compile,
            None if pipeline is None else pipeline.part,
        )
        self.weights.record(self.trace)
        self.gradients.record(self.trace)
        self._parameters = dict(module.named_parameters())
        self._seen_traits = self._traits()
        self._broadcast_buffers()
        self.trained = self.weights.trained
        self._piece_of = dict(self.trained)
        self.optimizer = self._own_optimizer(optimizer)
        self.schedule = schedule(self.optimizer) if callable(schedule) else schedule
        self.scaler = LossScaler(config.precision.loss_scale, enabled=config.precision.dtype == "fp16")
        self.average = WeightAverage(self.trained, config.ema_decay) if config.ema_decay else None
        self.replicas = ReplicaGuard(
            comm,
            self.weights,
            self.optimizer,
            self._parameters,
            self.average,
            config.check_replicas_every,
            self.dims.pipeline,
        )
        self._is_ordered = False
        self._left_out = 0  # steps in a row that were not finite
        adopt = Hook(lambda *_: self.weights.adopt(list(module.parameters())))
        module.register_load_state_dict_post_hook(adopt)  # type: ignore[no-untyped-call] # torch's
        self._forward: Callable[..., Any] = torch.compile(module) if config.compile else module
        if pipeline is not None:
            assert isinstance(self.gradients, StagedGradients)
            pipeline.attach(self._run_model, self.weights.in_backward, self.gradients, self.trace)
        # Sum of the loss, tokens, stop, save, squares of gradients; who could go on with the save in flight; of each
        # part of the model, the order of gathers, and its square.
        self._totals = torch.zeros(6 + 2 * self.dims.pipeline, dtype=torch.float64, device=comm.device)
        in_fp16 = "fp16" in (config.precision.dtype, config.precision.reduce_dtype)
        self._unit = 0.0 if in_fp16 else 1.0

    # --- what users see ----------------------------------------------------------------------------------------

    @property
    def rank(self) -> int:
        return self.comm.rank

    @property
    def world_size(self) -> int:
        return self.comm.world_size

    @property
    def device(self) -> torch.device:
        return self.comm.device

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward, in autocast if the job says so; returns what the model returns."""
        if not self.module.training or not torch.is_grad_enabled():
            return self._run_model(*args, **kwargs)
        self.enter_step()
        with self.trace.span(Category.FORWARD, f"0F{self.micro_step}"):
            return self._run_model(*args, **kwargs)

    def _run_model(self, *args: Any, **kwargs: Any) -> Any:
        with self.weights.in_forward():
            if not self.config.precision.autocast:
                return self._forward(*args, **kwargs)
            with self.autocast():
                return self._forward(*args, **kwargs)

    def autocast(self) -> AbstractContextManager[Any]:
        """torch.autocast in the job's dtype, for a loss that is computed outside of the model."""
        precision = self.config.precision
        return torch.autocast(self.device.type, DTYPES[precision.dtype], enabled=precision.dtype != "fp32")

    def backward(self, loss: Tensor, num_tokens: int | None = None) -> None:
        """Add the gradients of one micro-batch. [Note: the mean]

        loss: a scalar, the mean over num_tokens tokens (samples, whatever is counted); without it, over one.
        The step's last micro-batch is all-reduced while its gradients are made. What other backwards leave in `grad`
        counts for nothing. Raises UsageError where step() has not been called in between.
        """
        if self.micro_step == self.config.accumulation:
            raise UsageError.mismatch(
                "engine.backward", "engine.step() behind every backward", "another backward", "add up losses before it"
            )
        self.enter_step()
        with self.trace.span(Category.BACKWARD, f"0B{self.micro_step}"):
            self._backward(loss, 1 if num_tokens is None else num_tokens)
        self.micro_step += 1

    def _backward(self, loss: Tensor, weight: int) -> None:
        assert isinstance(self.gradients, GradientReducer), "the stages of a pipeline have train_batch"
        self.gradients.begin_backward(self.micro_step == self.config.accumulation - 1, counts=weight > 0)
        unit = self._choose_unit(weight)
        if weight:  # a mean over nothing is no number
            counted = loss.new_tensor(weight, dtype=torch.double)
            self._totals[:2] += torch.stack([loss.detach().double() * weight, counted])
        if weight or self.weights.backward_gathers:
            with self.weights.in_backward():
                (loss * (weight * self.scaler.value / unit)).backward()  # type: ignore[no-untyped-call] # torch's
        self.gradients.end_backward()

    def step(self) -> StepResult | None:
        """Behind each backward: None until the step's last one, then the update from the gradients of all ranks.

        Raises UsageError where no backward() has come since the last call; and NonFiniteError, on all ranks at the
        same step and before any parameter changes, when the loss or the gradient is not finite (an fp16 gradient that
        overflows skips the step instead, and so does on_nonfinite: skip); ReplicasDifferError, alike, when ranks no
        longer hold the same parameters.
        """
        if self.micro_step == self._stepped_behind:
            fix = "write engine.backward(loss) in place of loss.backward()"
            raise UsageError.mismatch("engine.step", "engine.backward(loss) before every step()", "none", fix)
        self._stepped_behind = self.micro_step
        if self.micro_step < self.config.accumulation:
            return None
        asked, self.save_requested = self.save_requested, False
        self._totals[2:4] = torch.tensor([self.stop_requested, asked])
        self._check_parameters()
        self._own_loss = self._totals[0].clone()
        with self.weights.at_step_end():
            with self.trace.span(Category.WAIT, "sums of gradients"):
                self.gradients.wait()
            squares = self.gradients.squares()
            is_spread = self.weights.sharers > 1 or self.dims.pipeline > 1
            if is_spread:  # each has the squares of its own shards
                self._totals[4] = squares
            self._totals[5] = self.saver is not None and self.saver.is_ready
            self._note_order()
            with self.trace.span(Category.WAIT, "the other ranks' numbers"):
                reading = self.replicas.all_reduce(self._totals, self.global_step + 1)
                if not is_spread:
                    self._totals[4] = squares
                loss_sum, tokens, stop, save, total, ready, *orders = self._totals.tolist()
        for part in range(self.dims.pipeline):
            self.weights.check_order(orders[2 * part], orders[2 * part + 1], self.dims.data_ranks(part))
        self.replicas.check(reading, f"step {self.global_step + 1}")
        norm = math.sqrt(total * self.weights.sharers / self.dims.data if is_spread else total)
        divisor = tokens * self.scaler.value / self._unit if tokens else 1.0
        result = StepResult(loss_sum / max(tokens, 1), norm / divisor, int(tokens), stop=stop > 0, save=save > 0)
        is_finite = math.isfinite(result.loss) and math.isfinite(result.grad_norm)
        overflowed = self.scaler.enabled and math.isfinite(result.loss) and not is_finite
        self._left_out = 0 if is_finite or overflowed else self._left_out + 1
        if self._left_out and (self.config.on_nonfinite != "skip" or self._left_out > LEFT_OUT_IN_A_ROW):
            self._fail_non_finite(result)
        self.learning_rate = self.schedule.apply(self.optimizer, self.global_step + 1)
        self.grad_norm = result.grad_norm
        if is_finite:
            self._update(self._clip_factor(result.grad_norm) / divisor)
        self.scaler.update(overflowed)
        self._begin_step()
        if self.saver is not None and self.saver.in_flight and ready == self.world_size:
            self.saver.advance()
        return result._replace(skipped=not is_finite)

    def train_batch(self, task: Task, batches: Sequence[Any]) -> StepResult:
        """One step of a pipeline: all its micro-batches, on this rank's device, through all stages, and the update.

        Each rank of a pipeline has the same batches. Raises as `step` does.
        """
        assert self.pipeline is not None
        self.enter_step()
        if len(batches) != self.config.accumulation:
            expected = f"{self.config.accumulation} micro-batches"
            raise UsageError.mismatch("engine.train_batch", expected, str(len(batches)))
        feed = TrainingFeed(task, batches)
        unit = self._choose_unit(max(feed.weights))
        feed.scale = self.scaler.value / unit
        self.pipeline.train(feed)
        self._totals[:2] = feed.totals
        self.micro_step = self.config.accumulation
        result = self.step()
        assert result is not None
        return result

    def enter_step(self) -> None:
        """What comes now belongs to the next step. For the trace; a step's first forward says it too."""
        if self.tracer is not None:
            self.tracer.enter(self.global_step + 1)

    def finish_trace(self) -> None:
        """Behind the last step, on all ranks."""
        if self.tracer is not None:
            self.tracer.finish()

    def close_trace(self) -> None:
        """At the end, whatever it is."""
        if self.tracer is not None:
            self.tracer.close()

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The model with its averaged weights, where `train.ema_decay` keeps them."""
        if self.average is None:
            yield
            return
        try:
            self.weights.settle()
            with self.average.swapped():
                self.weights.publish()
                yield
                self.weights.settle()
        finally:
            self.weights.publish()

    def save_checkpoint(self, dir: str | Path | None = None, *, asynchronous: bool | None = None) -> Path:
        """Save everything that resuming needs as dir/step-N, between two steps; on all ranks. Returns its path.

        Without dir, in the job's folder, as its section checkpoint says (asynchronous, keep_last, keep_every,
        replicas). asynchronous: it is written while the training goes on, and counts some steps later;
        `finish_checkpoint` waits for it. With a dir nothing is deleted, and it is written at once by default. Raises
        CheckpointError, also for what became of an asynchronous save before; UsageError where the job keeps none.
        """
        self.check_replicas()
        saver = self._saver_of(dir, asynchronous)
        with self.trace.whole(Category.CHECKPOINT, "checkpoint"):
            path = saver.begin()
            if not saver.asynchronous:
                saver.finish()
        saver.raise_problems()
        return path

    def _saver_of(self, dir: str | Path | None, asynchronous: bool | None) -> Saver:
        from dstrain.runtime.checkpoint.save import Saver

        words: dict[str, Any] = {}
        if dir is None:
            if self.checkpoints is None:
                fix = "give a folder, or let the job have one"
                raise UsageError.mismatch("engine.save_checkpoint", "a folder or the section checkpoint", "none", fix)
            dir, config = self.checkpoints
            words = {"keep_last": config.keep_last, "keep_every": config.keep_every, "replicas": config.replicas}
            asynchronous = config.asynchronous if asynchronous is None else asynchronous
        root, is_beside = Path(dir), bool(asynchronous)
        if self.saver is None or (self.saver.root, self.saver.asynchronous) != (root.absolute(), is_beside):
            self.finish_checkpoint()
            if self.saver is not None:
                self.saver.close()
            self.saver = Saver(self, root, asynchronous=is_beside, **words)
        return self.saver

    def finish_checkpoint(self) -> None:
        """Wait for the save in flight, if there is one; on all ranks. Raises CheckpointError where it has failed."""
        if self.saver is not None:
            self.saver.finish()
            self.saver.raise_problems()

    def check_replicas(self) -> None:
        """Compare all that ranks hold alike, unless train.check_replicas_every is off; on all ranks, between two steps.

        Raises ReplicasDifferError on all ranks.
        """
        self.replicas.check_all(f"behind step {self.global_step}")

    def save_model(self, dir: str | Path) -> Path:
        """Write the trained model as dir/model.safetensors, whatever the stage; on all ranks. CheckpointError."""
        from dstrain.runtime.checkpoint.model_file import save_model

        with self.averaged():
            return save_model(self, Path(dir))

    def load_checkpoint(self, dir: str | Path, *, model_only: bool = False, exempt: Sequence[str] = ()) -> int:
        """Go on from a checkpoint, or from the newest whole one in a folder of them; on all ranks. Returns its step.

        model_only: only parameters and buffers, to train on from them; the step stays. exempt: patterns of names that
        may then be missing on either side, or differ in shape. Raises CheckpointError, and changes nothing, where there
        is none that is whole and fits.
        """
        from dstrain.runtime.checkpoint.load import load

        self.loaded = load(self, Path(dir), model_only=model_only, exempt=exempt)
        return self.loaded.step

    def piece_of(self, name: str) -> nn.Parameter:
        """What the optimizer of this rank moves of parameter `name`."""
        return self._piece_of[name]

    def observe_validation(self, val_loss: float) -> None:
        """Tell a schedule that looks at the validation loss."""
        self.schedule.observe(val_loss)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps beside tensors; JSON."""
        return {
            "global_step": self.global_step,
            "unit": self._unit,
            "loss_scale": self.scaler.state_dict(),
            "schedule": self.schedule.state_dict(),
            "average_updates": self.average.updates if self.average else 0,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.global_step, self._unit = state["global_step"], state["unit"]
        self.micro_step = self._stepped_behind = 0
        self._totals.zero_()
        self.gradients.begin_step()
        self.scaler.load_state_dict(state["loss_scale"])
        self.schedule.load_state_dict(state["schedule"])

    @torch.no_grad()
    def share_buffers(self) -> None:
        """Rank 0's buffers (a batch norm's statistics) on all ranks: what is validated and saved is one model."""
        for module in self.module.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if name not in module._non_persistent_buffers_set:
                    self.data.broadcast(buffer)

    @contextlib.contextmanager
    def whole(self, parameters: Iterable[nn.Parameter], changed_on: int | None = None) -> Iterator[None]:
        """Inside, these parameters of the model have all their elements, at every stage; on all ranks.

        What rank `changed_on` writes to them inside becomes everyone's; what is written without it is lost at stage 3,
        and makes ranks differ at others.
        """
        chosen = list(parameters)
        with self.weights.whole(chosen), torch.no_grad():
            yield
            if changed_on is not None:
                for parameter in chosen:
                    self.comm.broadcast(parameter.data, changed_on)
                self.weights.adopt(chosen)
                self.comm.barrier()

    def _own_optimizer(self, given: torch.optim.Optimizer | OptimizerFactory) -> torch.optim.Optimizer:
        """An optimizer of `self.trained`. One that was made for the model's parameters is taken over, also where a
        factory made it so and did not look at what it was given."""
        made = given if isinstance(given, torch.optim.Optimizer) else given([*self.trained, *self._elsewhere])
        own = {parameter for _, parameter in [*self.trained, *self._elsewhere]}
        members = (parameter for group in made.param_groups for parameter in group["params"])
        if made is given or any(member.requires_grad and member not in own for member in members):
            self.weights.stand_in(made)
        return made

    # --- the step ----------------------------------------------------------------------------------------------

    def _make_tracer(self) -> Tracer | None:
        if self.config.trace is None:
            return None
        place = ""
        if self.pipeline is not None:
            own = self.pipeline.part.own
            place = f"stage{'s' if len(own) > 1 else ''} {', '.join(map(str, own))}"
        return Tracer(self.trace, self.comm, self.config.trace, EventWriter.from_environment(), place)

    def _choose_unit(self, weight: int) -> float:
        """[Note: loss scale] Chosen once, in the first backward, by rank 0."""
        if not self._unit:
            tokens = torch.tensor([weight * self.dims.data * self.config.accumulation], device=self.device)
            self.comm.broadcast(tokens)
            self._unit = 2.0 ** round(math.log2(max(1, int(tokens))))
        return self._unit

    def _note_order(self) -> None:
        """In the places of this rank's part of the model."""
        order, place = float(self.weights.order), 6 + 2 * self.dims.pipeline_rank(self.rank)
        self._totals[place : place + 2] = torch.tensor([order, order * order], dtype=torch.float64)

    def _clip_factor(self, norm: float) -> float:
        """The factor of torch's clip_grad_norm_."""
        return 1.0 if self.config.clip is None else min(1.0, self.config.clip / (norm + 1e-6))

    def _traits(self) -> list[tuple[bool, torch.Size]]:
        """Of each parameter that initialize saw: whether it requires a gradient, and its shape."""
        return [(parameter.requires_grad, parameter.shape) for parameter in self._parameters.values()]

    def _check_parameters(self) -> None:
        """What changed in the model since initialize would be trained, or not be trained, in silence.

        At each step the parameters that initialize saw, in 0.15 ms for 500; now and then whether there are others.
        """
        traits = self._traits()
        if traits != self._seen_traits:
            self._refuse_change(traits)
        if self.global_step > 2 and self.global_step % _CHECK_EVERY:
            return
        known = self._parameters
        for name, parameter in self.module.named_parameters():
            if known.get(name) is not parameter:
                found = "a new one" if name not in known else f"another one, of shape {tuple(parameter.shape)}"
                raise UsageError.mismatch(
                    f"parameter {name}", "the one that initialize saw", found, "change the model before initialize"
                )

    def _refuse_change(self, traits: Sequence[tuple[bool, torch.Size]]) -> None:
        for name, now, seen in zip(self._parameters, traits, self._seen_traits, strict=True):
            if now == seen:
                continue
            expected, found = (f"requires_grad={grad} and shape {tuple(shape)}" for grad, shape in (seen, now))
            fix = "change it before initialize, or call initialize again for a new engine"
            raise UsageError.mismatch(f"parameter {name}", f"{expected}, as initialize saw it", found, fix)

    def _fail_non_finite(self, result: StepResult) -> NoReturn:
        step = self.global_step + 1
        if not math.isfinite(result.loss):
            everyones = self.comm.all_gather_object(float(self._own_loss))
            ranks = [rank for rank, own in enumerate(everyones) if not math.isfinite(own)]
            where = f" on {ranks_in_words(ranks)}" if 0 < len(ranks) < self.world_size else ""
            raise NonFiniteError(f"step {step}: expected a finite loss, found {result.loss}{where}; {_REMEDY}")
        here = first_non_finite([(name, gradient) for name, _, gradient in self.weights.with_gradients()])
        words = self.comm.all_gather_object((here, self.gradients.sample_is_finite()))
        found = next((named for named, _ in words if named), None)
        more = f" and {found[1] - 1} more" if found and found[1] > 1 else ""
        where = f" (in {found[0]}{more})" if found else " (its square overflows)"
        ranks = [rank for rank, (_, is_finite) in enumerate(words) if not is_finite]
        whose = f" on {ranks_in_words(ranks)}" if 0 < len(ranks) < self.world_size else ""
        raise NonFiniteError(
            f"step {step}: expected a finite gradient, found norm {result.grad_norm}{where}{whose}; {_REMEDY}"
        )

    def _update(self, scale: float) -> None:
        with self.trace.span(Category.UPDATE, "clip and divide"):
            self.gradients.scale(scale)
            for _, own, gradient in self.weights.with_gradients():
                own.grad = gradient.to(own.dtype)
        with self.trace.span(Category.UPDATE, "optimizer"):
            self.optimizer.step()
        with self.trace.span(Category.UPDATE, "new parameters"):
            for _, master in self.trained:  # also of those that the optimizer does not move
                master.grad = None
            self.weights.publish()
            self.schedule.advance()
            if self.average is not None:
                self.average.update()

    def _begin_step(self) -> None:
        if not self._is_ordered:
            self.gradients.agree(self.data)
            self._is_ordered = True
        self.global_step += 1
        self.micro_step = self._stepped_behind = 0
        self._totals.zero_()
        self.gradients.begin_step()
        self.weights.begin_step()

    def _broadcast_buffers(self) -> None:
        for buffer in self.module.buffers():
            self.data.broadcast(buffer)


class JobSchedule:
    """Our own schedule, on the job's peak learning rate."""

    def __init__(self, peak: float, ratios: Any) -> None:
        """ratios: an LRSchedule."""
        self.peak, self.ratios = peak, ratios

    def apply(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        lr = self.peak * float(self.ratios.ratio(step))
        set_learning_rate(optimizer, lr)
        return lr

    def advance(self) -> None:
        """The step's number says it all."""

    def observe(self, val_loss: float) -> None:
        self.ratios.observe(val_loss)

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = self.ratios.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.ratios.load_state_dict(state)


class TorchSchedule:
    """A scheduler of torch's, stepped behind each optimizer step; or none: the optimizer's own learning rates.

    A ReduceLROnPlateau is the script's to step, with the loss that it has measured.
    """

    def __init__(self, scheduler: torch.optim.lr_scheduler.LRScheduler | None) -> None:
        self.scheduler = scheduler

    def apply(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        return float(optimizer.param_groups[0]["lr"])

    def advance(self) -> None:
        if self.scheduler is not None and not isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self.scheduler.step()

    def observe(self, val_loss: float) -> None:
        """torch's schedulers are told by the script."""

    def state_dict(self) -> dict[str, Any]:
        return self.scheduler.state_dict() if self.scheduler is not None else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state)
