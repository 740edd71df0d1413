"""Number formats: low-precision parameters with fp32 master weights (Micikevicius et al. 2018)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dstrain.runtime.spec.errors import UsageError
from dstrain.runtime.spec.training_config import PrecisionConfig
from dstrain.runtime.tracing.recorder import Recorder

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def parameter_dtype(config: PrecisionConfig) -> torch.dtype:
    """Of parameters and their gradients; autocast leaves them in fp32."""
    return torch.float32 if config.autocast else DTYPES[config.dtype]


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Make fp32 parameters `dtype`, in place. Buffers stay as they are (tables of positions lose too much), except
    those of batch norms, which torch wants in the dtype of their weights."""
    for parameter in model.parameters():
        if parameter.dtype == torch.float32:
            parameter.data = parameter.data.to(dtype)
    cast_buffers(model, dtype)


def cast_buffers(model: nn.Module, dtype: torch.dtype) -> None:
    """The buffers' part of `cast_parameters`."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            for buffer in module.buffers(recurse=False):
                if buffer.dtype == torch.float32:
                    buffer.data = buffer.data.to(dtype)


class HasGradients(Protocol):
    """The gradients of whole parameters."""

    def of_parameters(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each parameter with its gradient."""


class MasterWeights:
    """Stage 0: what the optimizer moves. An fp32 copy of each low-precision parameter; others are their own master.

    trained: the masters, by name. `publish` rounds them into the model.
    """

    def __init__(self, parameters: Sequence[tuple[str, nn.Parameter]], gradients: HasGradients) -> None:
        self._gradients = gradients
        self._name_of = {parameter: name for name, parameter in parameters}
        self._master_of: dict[nn.Parameter, nn.Parameter] = {}
        for _, parameter in parameters:
            is_low = parameter.dtype in (torch.bfloat16, torch.float16)
            self._master_of[parameter] = nn.Parameter(parameter.detach().float()) if is_low else parameter
        self.trained = [(name, self._master_of[parameter]) for name, parameter in parameters]
        self._size_of = {name: parameter.numel() for name, parameter in parameters}
        low = [(p, master) for p, master in self._master_of.items() if p is not master]
        self._low = [parameter.data for parameter, _ in low]
        self._masters = [master.data for _, master in low]

    @property
    def exist(self) -> bool:
        """Whether any parameter has a master of its own."""
        return bool(self._low)

    def publish(self) -> None:
        """Round the masters into the model's parameters."""
        if self._low:
            torch._foreach_copy_(self._low, self._masters)

    def settle(self) -> None:
        """Before masters change: nobody else reads them."""

    def restored(self) -> None:
        """Parameters and masters have been put back."""
        self.publish()

    def adopt(self, parameters: Sequence[nn.Parameter]) -> None:
        """Somebody has written to these of the model's parameters: their masters follow."""
        with torch.no_grad():
            for parameter in parameters:
                if parameter in self._master_of:
                    self._master_of[parameter].copy_(parameter)

    def whole(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
        """Around what reads whole parameters: they always are."""
        return nullcontext()

    @property
    def sharers(self) -> int:
        """Ranks that share one copy of the state: this one."""
        return 1

    @property
    def backward_gathers(self) -> bool:
        """Whether a rank's backward needs the other ranks' backwards."""
        return False

    def in_forward(self) -> AbstractContextManager[None]:
        """Around each forward of the model."""
        return nullcontext()

    def in_backward(self) -> AbstractContextManager[None]:
        """Around each backward."""
        return nullcontext()

    def record(self, trace: Recorder) -> None:
        """There is nothing to wait for."""

    def describe(self) -> str:
        """One line for people on how the state is spread; "" where it is not."""
        return ""

    def at_step_end(self) -> AbstractContextManager[None]:
        """Around the collectives that end a step."""
        return nullcontext()

    @property
    def order(self) -> int:
        """That of gathers: there are none."""
        return 0

    def check_order(self, total: float, squares: float, ranks: Sequence[int]) -> None:
        """It never differs."""

    def begin_step(self) -> None:
        """Behind each step."""

    def copies(self, parameters: Mapping[str, nn.Parameter]) -> list[tuple[str, Tensor]]:
        """Those of the model's parameters that are whole on all ranks: every one."""
        return [(name, parameter.detach()) for name, parameter in parameters.items()]

    def shard_of(self, name: str) -> Tensor | None:
        """Nothing is sharded."""
        return None

    def collect(self, name: str, own: Tensor) -> Tensor | None:
        """Every rank has the whole tensor."""
        return own

    def interval_of(self, name: str) -> tuple[int, int]:
        """What this rank has of parameter `name`, flattened: all."""
        return 0, self._size_of[name]

    def with_gradients(self) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
        """Each master with its name and its gradient."""
        for parameter, gradient in self._gradients.of_parameters():
            yield self._name_of[parameter], self._master_of[parameter], gradient

    def stand_in(self, optimizer: torch.optim.Optimizer) -> None:
        """Have an optimizer that was made for the model's parameters move the masters."""
        for group in optimizer.param_groups:
            group["params"] = [self._own(optimizer, parameter) for parameter in group["params"]]

    def _own(self, optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> nn.Parameter:
        if not parameter.requires_grad:
            return parameter
        if parameter not in self._master_of:
            raise UsageError.mismatch(
                "optimizer",
                "parameters of the model that are trained",
                f"another one, of shape {tuple(parameter.shape)}",
                "make what a loss trains a part of the model",
            )
        master = self._master_of[parameter]
        if master is not parameter and parameter in optimizer.state:
            state = optimizer.state.pop(parameter)
            lower = (torch.bfloat16, torch.float16)
            optimizer.state[master] = {
                key: value.float() if isinstance(value, Tensor) and value.dtype in lower else value
                for key, value in state.items()
            }
        return master


def first_non_finite(named: Sequence[tuple[str, Tensor]]) -> tuple[str, int] | None:
    """The first name with a number that is not finite, and how many tensors have one; None: all are finite."""
    names = [name for name, tensor in named if not tensor.isfinite().all()]
    return (names[0], len(names)) if names else None
