"""The training runtime: what runs in each worker.

The public names are loaded when they are first used, so that `import dstrain.runtime.spec…` loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dstrain.runtime.comm import Communicator as Communicator
    from dstrain.runtime.engine import Engine as Engine
    from dstrain.runtime.engine import EngineConfig as EngineConfig
    from dstrain.runtime.engine import StepResult as StepResult
    from dstrain.runtime.initialization import initialize as initialize
    from dstrain.runtime.spec.config import JobConfig as JobConfig
    from dstrain.runtime.spec.load import load_job as load_job

_HOME = {
    "Communicator": "comm",
    "Engine": "engine",
    "EngineConfig": "engine",
    "JobConfig": "spec.config",
    "StepResult": "engine",
    "initialize": "initialization",
    "load_job": "spec.load",
}

__all__ = ["Communicator", "Engine", "EngineConfig", "JobConfig", "StepResult", "initialize", "load_job"]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
