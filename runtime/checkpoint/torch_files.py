"""Files of torch.save, read without running any code of theirs.

[Note: stand-ins]
torch.load(weights_only=True) builds tensors and plain values alone. Some programs put objects of their own beside the
tensors, such as DeepSpeed's loss scaler. The names in STAND_INS, and no others, become inert objects: nothing is
imported for them and nothing of theirs runs. Any other name is refused.
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dstrain.runtime.checkpoint.dtypes import NAMES
from dstrain.runtime.spec.errors import CheckpointError, UsageError

STAND_INS = (
    "argparse.Namespace",
    "deepspeed.runtime.bf16_optimizer.fragment_address",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy.dtype",
    "numpy.ndarray",
    "pathlib.PosixPath",
)
"""[Note: stand-ins]"""

_ZIP = b"PK\x03\x04"


class StandIn:
    """In place of an object that is not built. arguments: those of its constructor."""

    arguments: tuple[Any, ...]

    def __new__(cls, *arguments: Any) -> StandIn:
        made = super().__new__(cls)
        made.arguments = arguments
        return made

    def __setstate__(self, state: Any) -> None:
        """What the object held is of no use here."""


def load_torch_file(path: Path) -> Any:
    """What the file holds, on the CPU; the tensors stay in the file until they are read, where its format allows that.

    Raises UsageError where it holds objects that are refused, CheckpointError where it is damaged.
    """
    try:
        with path.open("rb") as file:
            is_zip = file.read(len(_ZIP)) == _ZIP
        with warnings.catch_warnings(), torch.serialization.safe_globals([(StandIn, name) for name in STAND_INS]):
            warnings.simplefilter("ignore")  # of pickle's protocols and old formats
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise _refused(path, str(error)) from None
    except OSError as error:
        raise CheckpointError(f"{path}: expected a file that can be read, found {error.strerror or error}") from None
    except Exception as error:  # damaged bytes can raise anything
        reason = (str(error).splitlines() or [""])[0][:200]
        found = f"{type(error).__name__}: {reason}; is it cut off or damaged?"
        raise CheckpointError(f"{path}: expected a file of torch.save, found {found}") from None


def _refused(path: Path, message: str) -> UsageError | CheckpointError:
    name = re.search(r"GLOBAL (\S+) ", message)
    if name is not None:
        fix = "no code of a file is run; save its tensors alone, by torch.save(model.state_dict(), …)"
        return UsageError.mismatch(f"SOURCE: {path}", "tensors and plain values", f"an object of {name[1]}", fix)
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    reason = next((line for line in lines if not line.startswith("Weights only load failed")), "a damaged pickle")
    return CheckpointError(f"{path}: expected a file of torch.save, found one that torch refuses: {reason[:200]}")


def check_tensor(path: Path, name: str, tensor: Tensor) -> None:
    """Raises UsageError where a checkpoint cannot hold it."""
    dense = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided and not tensor.is_quantized
    if not dense or tensor.device.type != "cpu":
        found = f"one of {type(tensor).__name__}, {tensor.layout}, on {tensor.device.type}"
        raise UsageError.mismatch(f"SOURCE: {path}", f"{name} as a dense tensor", found)
    if tensor.dtype not in NAMES:
        raise UsageError.mismatch(f"SOURCE: {path}", f"{name} in one of {', '.join(NAMES.values())}", f"{tensor.dtype}")


def bytes_of(tensor: Tensor) -> Any:
    """Row by row, as a buffer."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy() if flat.numel() else b""


PREFIXES = ("module.", "_orig_mod.")
"""Of DistributedDataParallel and torch.compile, which wrap a model."""
_COMPILED_WITHIN = "._orig_mod."


def without_prefixes(names: list[str], notes: list[str]) -> dict[str, str]:
    """For each name the model's own; a note of what was taken off: a prefix that all names have, or, of a compiled part
    of a model, one within."""
    own = {name: name for name in names}
    while prefix := next((p for p in PREFIXES if own and all(name.startswith(p) for name in own.values())), None):
        own = {name: short.removeprefix(prefix) for name, short in own.items()}
        notes.append(f"took {prefix} off the names of all tensors")
    if any(_COMPILED_WITHIN in name for name in own.values()):
        own = {name: short.replace(_COMPILED_WITHIN, ".") for name, short in own.items()}
        notes.append(f"took {_COMPILED_WITHIN[1:]} out of the names within")
    return own


def tensors_of(held: Mapping[Any, Any]) -> dict[str, Tensor]:
    """The tensors of a mapping by their names."""
    return {name: value for name, value in held.items() if isinstance(name, str) and isinstance(value, Tensor)}
