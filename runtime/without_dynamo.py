"""torch's optimizers without torch.compile's machinery.

[Note: dynamo]
The first `add_param_group` or `step` of any optimizer of torch's imports torch._dynamo, only to tell it what not to
compile: 1.2 s and 71 MiB in every rank of a job that compiles nothing. The classes made here do the same work
without it. Once somebody has imported it, they call what torch would.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch.optim import Optimizer

Kind = TypeVar("Kind", bound=type[Optimizer])


def without_dynamo(kind: Kind) -> Kind:
    """A subclass of `kind`, of its name, that does not import torch._dynamo. [Note: dynamo]"""
    overridden: dict[str, Any] = {"__module__": kind.__module__, "__doc__": kind.__doc__}
    for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"):
        if getattr(kind, name) is getattr(Optimizer, name):
            overridden[name] = _plain(getattr(Optimizer, name))
    step: Any = kind.step
    if hasattr(step, "hooked"):  # by the profiler, which comes anew
        step = step.__wrapped__
    if inspect.unwrap(step) is not step:
        overridden["step"] = _step(step)
    return cast(Kind, type(kind.__name__, (kind,), overridden))


def _plain(decorated: Callable[..., Any]) -> Callable[..., Any]:
    plain = inspect.unwrap(decorated)

    @functools.wraps(plain)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (decorated if "torch._dynamo" in sys.modules else plain)(*args, **kwargs)

    return call


def _step(decorated: Callable[..., Any]) -> Callable[..., Any]:
    plain = inspect.unwrap(decorated)

    @functools.wraps(plain, updated=())
    def step(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" in sys.modules:
            return decorated(self, *args, **kwargs)
        with torch.set_grad_enabled(self.defaults.get("differentiable", False)):
            return plain(self, *args, **kwargs)

    return step
