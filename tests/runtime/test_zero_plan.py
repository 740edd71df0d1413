"""Layouts of units and the grouping of parameters, for any shapes and any number of ranks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dstrain.runtime.zero.grouping import Group, by_module, by_size
from dstrain.runtime.zero.plan import ALIGNMENT, UnitPlan, plan_unit

Shapes = list[tuple[int, ...]]

SHAPES = st.lists(st.lists(st.integers(0, 9), max_size=3).map(tuple), min_size=1, max_size=12)
RANKS = st.integers(1, 9)


def planned(shapes: Shapes, ranks: int, whole_tensors: bool) -> UnitPlan:
    return plan_unit("unit", [(f"p{number}", shape) for number, shape in enumerate(shapes)], ranks, whole_tensors)


@given(SHAPES, RANKS, st.booleans())
def test_every_element_is_owned_exactly_once(shapes: Shapes, ranks: int, whole_tensors: bool) -> None:
    plan = planned(shapes, ranks, whole_tensors)
    owners = {entry.name: [0] * entry.numel for entry in plan.entries}
    for rank in range(ranks):
        for piece in plan.pieces(rank):
            for element in range(piece.start, piece.stop):
                owners[piece.entry.name][element] += 1
    assert [entry.shape for entry in plan.entries] == shapes
    assert all(count == 1 for counts in owners.values() for count in counts)


@given(SHAPES, RANKS, st.booleans())
def test_shards_follow_one_another_and_pieces_lie_in_them(shapes: Shapes, ranks: int, whole_tensors: bool) -> None:
    plan = planned(shapes, ranks, whole_tensors)
    assert plan.bounds[0] == 0
    assert len(plan.bounds) == ranks + 1
    assert list(plan.bounds) == sorted(plan.bounds)
    for rank in range(ranks):
        low, high = plan.interval(rank)
        end = 0
        for piece in plan.pieces(rank):
            assert end <= piece.offset
            end = piece.offset + piece.numel
            assert end <= high - low
            assert low + piece.offset == piece.entry.start + piece.start, "the shard is a part of the whole buffer"
            assert 0 < piece.numel <= piece.entry.numel
            assert piece.is_whole == (piece.numel == math.prod(piece.entry.shape))
            assert piece.is_whole or not whole_tensors


@given(SHAPES, RANKS, st.booleans())
def test_gaps_and_parameters_fill_the_buffer(shapes: Shapes, ranks: int, whole_tensors: bool) -> None:
    plan = planned(shapes, ranks, whole_tensors)
    covered = [0] * plan.size
    for start, stop in [*plan.gaps(), *((entry.start, entry.stop) for entry in plan.entries)]:
        for element in range(start, stop):
            covered[element] += 1
    assert covered == [1] * plan.size
    wasted = plan.size - sum(math.prod(shape) for shape in shapes)
    assert wasted <= ALIGNMENT * (len(shapes) + ranks) if ranks > 1 else wasted == 0


@given(SHAPES, st.integers(2, 9))
def test_even_shards_are_even_and_aligned(shapes: Shapes, ranks: int) -> None:
    plan = planned(shapes, ranks, whole_tensors=False)
    sizes = {stop - start for start, stop in map(plan.interval, range(ranks))}
    assert len(sizes) == 1
    assert all(bound % ALIGNMENT == 0 for bound in plan.bounds)
    assert all(entry.start % ALIGNMENT == 0 for entry in plan.entries)


@given(SHAPES, st.integers(2, 9))
def test_cuts_between_tensors_are_as_near_as_can_be(shapes: Shapes, ranks: int) -> None:
    """No other border is nearer to the even cut than the one that was chosen."""
    plan = planned(shapes, ranks, whole_tensors=True)
    borders = {entry.start for entry in plan.entries} | {plan.size}
    for rank, bound in enumerate(plan.bounds[1:-1], start=1):
        ideal = plan.size * rank // ranks
        assert bound in borders
        assert abs(bound - ideal) == min(abs(border - ideal) for border in borders)


def test_a_plan_shows_where_everything_lies() -> None:
    plan = plan_unit("block", [("weight", (3, 7)), ("bias", (3,))], shards=2)
    assert str(plan).splitlines() == [
        "block: 64 elements, cut at 0, 32, 64",
        "             0  weight [3, 7]",
        "            32  bias [3]",
    ]


class Block(nn.Module):
    def __init__(self, kinds: list[tuple[int, bool, torch.dtype]]) -> None:
        super().__init__()
        self.inner = nn.Linear(1, 1)
        self.own = nn.ParameterList(
            nn.Parameter(torch.zeros(size, dtype=dtype), requires_grad=trained) for size, trained, dtype in kinds
        )


KINDS = st.lists(
    st.tuples(st.integers(0, 40), st.booleans(), st.sampled_from([torch.float32, torch.bfloat16, torch.float64])),
    max_size=6,
)


def model_of(blocks: list[list[tuple[int, bool, torch.dtype]]], tied: bool) -> nn.Module:
    model = nn.Module()
    model.first = nn.Embedding(5, 3)
    model.blocks = nn.ModuleList(Block(kinds) for kinds in blocks)
    model.last = nn.Linear(3, 5)
    if tied:
        model.last.weight = model.first.weight
    return model


def check(model: nn.Module, groups: list[Group]) -> None:
    members = [parameter for group in groups for _, parameter in group.parameters]
    assert len(members) == len(set(members))
    assert len({group.name for group in groups}) == len(groups), "names tell units apart"
    for group in groups:
        assert len({parameter.dtype for _, parameter in group.parameters}) == 1
        assert len({parameter.requires_grad for _, parameter in group.parameters}) == 1
        assert all(model.get_parameter(name) is parameter for name, parameter in group.parameters)


@given(st.lists(KINDS, max_size=3), st.booleans(), st.integers(0, 50))
def test_every_parameter_is_in_one_unit_of_its_kind(
    blocks: list[list[tuple[int, bool, torch.dtype]]], tied: bool, small: int
) -> None:
    model = model_of(blocks, tied)
    groups = by_module(model, small)
    check(model, groups)
    assert {p for group in groups for _, p in group.parameters} == set(model.parameters())
    for group in groups:
        inside = {name.startswith(f"{group.module}.") for name, _ in group.parameters}
        assert not group.module or inside == {True}


@given(st.lists(KINDS, max_size=3), st.integers(1, 60))
def test_neighbours_up_to_a_size_share_a_unit(blocks: list[list[tuple[int, bool, torch.dtype]]], elements: int) -> None:
    model = model_of(blocks, tied=False)
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = by_size(trained, elements)
    check(model, groups)
    assert [name for group in groups for name, _ in group.parameters] == [name for name, _ in reversed(trained)]
    for group in groups:
        assert len(group.parameters) == 1 or sum(p.numel() for _, p in group.parameters) <= elements


@pytest.mark.parametrize("small", [0, 100])
def test_blocks_are_units(small: int) -> None:
    model = nn.Sequential(
        nn.Embedding(50, 4),
        nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3))),
        nn.LayerNorm(4),
    )
    names = [group.name for group in by_module(model, small)]
    assert names == ["0", "1.0", "1.1", "1.2", "2" if small == 0 else "(outside of blocks)"]
