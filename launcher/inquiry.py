"""The ranks are asked where they are: one question to all hosts, and their answers."""

from __future__ import annotations

import time
from collections.abc import Sequence

from dstrain.launcher.node import Node
from dstrain.runtime.spec import frames

ANSWER_S = 4.0  # more than the agents wait for their ranks


class Inquiry:
    """The last question. answers: by host. is_open: nobody has drawn a conclusion yet."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.answers: dict[int, frames.Stacks] = {}
        self.is_open = False
        self._nodes = nodes
        self._asked_at = 0.0

    def ask(self, all_threads: bool = False) -> None:
        """Answers to an earlier question are forgotten."""
        self.answers, self.is_open, self._asked_at = {}, True, time.monotonic()
        for node in self._nodes:
            node.session.send(frames.DumpStacks(all_threads))

    def take(self, node: Node, answer: frames.Stacks) -> None:
        self.answers[node.session.index] = answer

    def is_complete(self) -> bool:
        """Have all hosts answered, or had the time to?"""
        there = {node.session.index for node in self._nodes if node.gone is None}
        return there <= self.answers.keys() or time.monotonic() - self._asked_at > ANSWER_S
