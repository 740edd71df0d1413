"""What all sections of a configuration share."""

from __future__ import annotations

from typing import Annotated, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=1)]
NonNegativeCount = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=1 << 32)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
OpenFraction = Annotated[float, Field(gt=0, lt=1)]
MomentDecay = Annotated[float, Field(ge=0, lt=1)]
ImportPath = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]
"""`package.module:name`."""


class Contradiction(NamedTuple):
    """Keys that cannot all be right: the key to change, what the others ask of it, and what it is."""

    key: tuple[str, ...]
    expected: str
    found: str


class Contradictions(ValueError):
    """All contradictions of one configuration; the loader gives each its place in the file."""

    def __init__(self, found: list[Contradiction]) -> None:
        super().__init__("; ".join(f"{'.'.join(c.key)}: expected {c.expected}, found {c.found}" for c in found))
        self.found = found


class Section(BaseModel):
    """Base of every section: frozen, no unknown key, no silent conversion ("3" is no integer), no NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
