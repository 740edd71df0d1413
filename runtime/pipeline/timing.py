"""How long each layer of a model takes, measured before the model is taken apart.

[Note: a profile]
Rank 0 alone runs the layers one after the other on a real micro-batch, each with numbers of its own, which are given
back behind it: so a model is measured of which one layer, not all, fits. Layers of one kind that get tensors of one
form are measured once. What was measured is kept beside the job's checkpoints, so that a job that goes on has the
stages that it had.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dstrain.runtime.pipeline.cuts import Chain, Layer
from dstrain.runtime.pipeline.messages import signature_of
from dstrain.runtime.pipeline.part import ModelPart, tensors_of
from dstrain.runtime.precision import cast_buffers
from dstrain.runtime.spec.schedule import Action, Kind, Schedule
from dstrain.runtime.task import Task

ROUNDS = 5
"""Of each layer behind one that warms up; their median counts."""

FILE_NAME = "layer-times.json"
"""Beside the checkpoints: what it was measured with, and seconds of each layer."""


class LayerTimer:
    """Measures forward and backward of the layers of a model. [Note: a profile]"""

    def __init__(
        self,
        model: nn.Module,
        chain: Chain,
        device: torch.device,
        dtype: torch.dtype,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        """dtype: that parameters in fp32 will have."""
        self._model, self._chain, self._device = model, chain, device
        self._dtype, self._autocast = dtype, autocast
        self._modules = dict(model.named_modules(remove_duplicate=False))
        cast_buffers(model, dtype)

    def seconds(self, task: Task, batch: Any) -> list[float]:
        """Of each layer, with one micro-batch on the device. Raises what the model raises."""
        layers = self._chain.layers
        part = ModelPart(self._model, self._chain, [range(n, n + 1) for n in range(len(layers))], _alone(layers), 0)
        known: dict[Any, tuple[float, tuple[Tensor, ...]]] = {}
        received: tuple[Tensor, ...] = ()
        seconds = []
        with torch.random.fork_rng([self._device] if self._device.type == "cuda" else []):
            for stage in range(len(layers)):
                kind = self._kind(layers[stage]), signature_of(received, training=True), stage == len(layers) - 1
                if kind not in known:
                    known[kind] = self._measure(part, stage, received, task, batch)
                taken, received = known[kind]
                seconds.append(taken)
        return seconds

    def key(self, batch: Any) -> dict[str, Any]:
        """What the times depend on, as far as layers and batch say it, as JSON."""
        name = torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else "cpu"
        return {
            "device": name,
            "dtype": str(self._dtype).removeprefix("torch."),
            "layers": [[layer.name, self._kind(layer)] for layer in self._chain.layers],
            "batch": str(signature_of(batch, training=True)),
        }

    def _measure(
        self, part: ModelPart, stage: int, received: tuple[Tensor, ...], task: Task, batch: Any
    ) -> tuple[float, tuple[Tensor, ...]]:
        """Seconds, and what the layer gives to the next."""
        found, outputs = [], received
        is_last = stage == len(part.layers) - 1
        with self._with_numbers(self._chain.layers[stage]):
            for _ in range(1 + ROUNDS):
                inputs = tuple(tensor.detach().requires_grad_(tensor.requires_grad) for tensor in received)
                begun = self._now()
                with self._autocast():
                    output = part.run(self._model, stage, inputs, task.arguments(batch))
                outputs = (task.loss_of(output, batch),) if is_last else tensors_of(output, f"layer {stage}")
                ends = [tensor for tensor in outputs if tensor.requires_grad]
                if ends:
                    torch.autograd.backward(ends, [torch.ones_like(tensor) for tensor in ends])
                found.append(self._now() - begun)
        return statistics.median(found[1:]), tuple(one.detach().requires_grad_(one.requires_grad) for one in outputs)

    @contextmanager
    def _with_numbers(self, layer: Layer) -> Iterator[None]:
        """Inside, the layer has parameters of its own, and what it does to its buffers is undone behind."""
        before: list[tuple[dict[str, Any], str, Any]] = []
        for module in (inner for name in layer.modules for inner in self._modules[name].modules()):
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    before.append((module._parameters, name, parameter))
                    module._parameters[name] = nn.Parameter(self._made_up(parameter), parameter.requires_grad)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    before.append((module._buffers, name, buffer))
                    module._buffers[name] = buffer.clone().to(self._device)
        try:
            yield
        finally:
            for where, name, tensor in before:
                where[name] = tensor

    def _made_up(self, parameter: Tensor) -> Tensor:
        """Numbers as small as those of a model's beginning."""
        dtype = self._dtype if parameter.dtype == torch.float32 else parameter.dtype
        return torch.empty(parameter.shape, dtype=dtype, device=self._device).normal_(0, 0.02)

    def _kind(self, layer: Layer) -> str:
        modules = [self._modules[name] for name in layer.modules]
        shapes = [tuple(parameter.shape) for module in modules for parameter in module.parameters()]
        recomputes = sum("forward" in vars(inner) for module in modules for inner in module.modules())
        return hashlib.sha256(f"{modules!r} {shapes} {recomputes}".encode()).hexdigest()[:16]

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def recorded(folder: Path | None, key: dict[str, Any], measure: Callable[[], list[float]]) -> list[float]:
    """What `folder` has of the same layers, batch and device; else what is measured now, and kept there."""
    path = None if folder is None else folder / FILE_NAME
    if path is not None and path.is_file():
        try:
            known = json.loads(path.read_text())
            if known["of"] == key:
                return [float(seconds) for seconds in known["seconds"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            sys.stderr.write(f"{path}: expected times of layers, found {error}; measured again\n")
    seconds = measure()
    if path is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{FILE_NAME}.tmp")
            temporary.write_text(json.dumps({"of": key, "seconds": seconds}))
            temporary.replace(path)
        except OSError as error:
            sys.stderr.write(f"{path}: {error}; a job that goes on will measure its layers again\n")
    return seconds


def _alone(layers: Sequence[Layer]) -> Schedule:
    """One rank has all layers, each as a stage."""
    row = [Action(Kind.FORWARD, stage, 0) for stage in range(len(layers))]
    row += [Action(Kind.BACKWARD, stage, 0) for stage in reversed(range(len(layers)))]
    return Schedule("profile", len(layers), 1, (tuple(row),), (0,) * len(layers))
