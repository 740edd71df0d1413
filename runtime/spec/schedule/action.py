"""One thing that a pipeline rank does for one micro-batch, and its text form."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import NamedTuple

from dstrain.runtime.spec.errors import UsageError


class Kind(StrEnum):
    """What is computed; the letters are those of torch.distributed.pipelining."""

    FORWARD = "F"
    BACKWARD = "B"
    """Both gradients at once: that of the stage's input and those of its weights."""
    INPUT_GRADIENT = "I"
    """Only what the stage before waits for."""
    WEIGHT_GRADIENT = "W"
    """Only what the optimizer waits for: may come any time after the input's gradient."""


_NUMBER = "(0|[1-9][0-9]{0,8})"
_TEXT = re.compile(f"{_NUMBER}([FBIW]){_NUMBER}")


class Action(NamedTuple):
    """`kind` of work of `stage` for `micro_batch`, both counted from 0. `str` and `parse` are inverses: 0F3."""

    kind: Kind
    stage: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.micro_batch}"

    @classmethod
    def parse(cls, text: str, where: str = "action") -> Action:
        """The action that `text` names; where: what stands first in the message of the `UsageError`."""
        match = _TEXT.fullmatch(text)
        if not match:
            form = "stage, one of F B I W, micro-batch, like 0F3"
            raise UsageError.mismatch(where, form, repr(text), "actions of communication are not written")
        stage, kind, micro_batch = match.groups()
        return cls(Kind(kind), int(stage), int(micro_batch))
