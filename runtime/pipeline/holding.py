"""Which stages and ranks hold a parameter, by names alone. Pure: the planner asks the same functions as the runtime."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence


def tied_ranks(stages_of: Mapping[str, Collection[int]], rank_of: Sequence[int]) -> dict[str, list[int]]:
    """Names of parameters that stages of several pipeline ranks have, each with those ranks.

    stages_of: for each name its stages. rank_of: for each stage its pipeline rank."""
    ranks_of = {name: sorted({rank_of[stage] for stage in stages}) for name, stages in stages_of.items()}
    return {name: ranks for name, ranks in ranks_of.items() if len(ranks) > 1}


def ending_stage(stages: Collection[int], ended: Sequence[int]) -> int:
    """Of the stages that have a parameter, the one that gives the last part of its gradient in a step.

    ended: this rank's stages in the order in which they end (`schedule.endings`)."""
    return next(stage for stage in reversed(ended) if stage in stages)


def sections_of(
    names: Iterable[str], own: Sequence[int], tied: Collection[str], stage_of: Callable[[str], int]
) -> list[frozenset[str]]:
    """Names that share no bucket with others: those of each stage of a rank, and each that is tied.

    names: of all parameters of the rank. own: its stages. stage_of: see `ending_stage`."""
    known = list(names)
    stages = [frozenset(name for name in known if name not in tied and stage_of(name) == stage) for stage in own]
    return [section for section in [*stages, *(frozenset([name]) for name in known if name in tied)] if section]
