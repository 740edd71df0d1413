"""Messages between stages: their order, and what a rank keeps of them, as little as its neighbours' let it know."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from dstrain.runtime.comm import Communicator
from dstrain.runtime.comm_edge import Edge
from dstrain.runtime.pipeline.arrivals import arrivals, given, taken
from dstrain.runtime.pipeline.messages import Mailbox
from dstrain.runtime.spec.schedule import SCHEDULE_NAMES, make_schedule

from .test_pipeline import MICRO_BATCHES, Training, engine_of

RunRanks = Callable[..., list[Any]]


@pytest.mark.parametrize("name", SCHEDULE_NAMES)
@pytest.mark.parametrize(("ranks", "micro_batches"), [(2, 8), (4, 12), (3, 5)])
def test_what_is_known_to_have_come_had_been_taken(name: str, ranks: int, micro_batches: int) -> None:
    """By replaying all rows: whatever is said to have gone was taken before the message that told it was sent."""
    plan = make_schedule(name, ranks, micro_batches)
    known = [arrivals(plan.ranks, plan.rank_of, rank) for rank in range(ranks)]
    places, sent_when_taken = [0] * ranks, {}
    seen, sent = set(), set()
    while any(place < len(row) for place, row in zip(places, plan.ranks, strict=True)):
        for rank, row in enumerate(plan.ranks):
            while places[rank] < len(row):
                action = row[places[rank]]
                needs = taken(action, plan.stages)
                if needs is not None and needs not in sent:
                    break
                if needs is not None:
                    seen.add(needs)
                    told_at = sent_when_taken[needs]
                    for message in known[rank].get(action, ()):
                        assert plan.rank_of[message.sender] == rank
                        assert message in told_at, f"{name}: {action} cannot know of {message}"
                makes = given(action, plan.stages)
                if makes is not None:
                    sent.add(makes)
                    sent_when_taken[makes] = set(seen)
                places[rank] += 1
    said = [message for each in known for messages in each.values() for message in messages]
    assert len(said) == len(set(said))
    if name != "gpipe":
        assert said


def test_a_step_keeps_few_messages(run_ranks: RunRanks, monkeypatch: pytest.MonkeyPatch) -> None:
    """1F1B: as many outputs as micro-batches in flight, whatever the number of micro-batches."""
    most = [0]
    send = Mailbox.send

    def counted(self: Mailbox, *args: Any) -> None:
        send(self, *args)
        most[0] = max(most[0], len(self._sent))

    monkeypatch.setattr(Mailbox, "send", counted)

    def work(_: int) -> int:
        with Communicator.connect() as comm:
            training = Training()
            engine = engine_of(comm, training, "1f1b", 2, 0, None, micro_batches=24)
            engine.train_batch(training.task(), 6 * training.batches(0, engine.data.rank))
            return most[0]

    assert max(run_ranks(2, work)) <= 3


@pytest.mark.parametrize("schedule", ["1f1b", "zb_v"])
def test_both_ends_go_in_one_order(run_ranks: RunRanks, monkeypatch: pytest.MonkeyPatch, schedule: str) -> None:
    """NCCL matches messages by their order alone, Gloo by their tags. So no receive is posted ahead of one whose shapes
    are not known yet: micro-batch 1 is the first of its shapes, 2 has those of 0."""
    passed: defaultdict[Edge | None, list[int]] = defaultdict(list)
    send, receive = Edge.send, Edge.receive

    def sent(self: Edge, tensor: Tensor, tag: int) -> Any:
        passed[self].append(tag)
        return send(self, tensor, tag)

    def received(self: Edge, into: Tensor, tag: int) -> Any:
        passed[self].append(tag)
        return receive(self, into, tag)

    monkeypatch.setattr(Edge, "send", sent)
    monkeypatch.setattr(Edge, "receive", received)

    def work(_: int) -> dict[str, list[int]]:
        with Communicator.connect() as comm:
            training = Training()
            engine = engine_of(comm, training, schedule, 2, 0, None)
            engine.train_batch(training.task(), training.batches(0, 0))
            assert engine.pipeline is not None
            mailboxes = [box for boundary in engine.pipeline._boundaries if boundary is not None for box in boundary]
            return {box._where: passed[box._edge] for box in mailboxes if box._edge is not None}

    one, other = run_ranks(2, work)
    assert one == other
    assert min(map(len, one.values())) > MICRO_BATCHES
