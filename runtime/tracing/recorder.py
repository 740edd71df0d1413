"""What happens between two moments, kept until somebody asks. Off, a span costs a look at one attribute.

Without torch: what a moment is, the clock says (`clocks.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import TracebackType
from typing import Any, NamedTuple

from dstrain.runtime.spec.trace import Category

NOTHING: AbstractContextManager[None] = nullcontext()
"""What is not recorded."""


class Recorded(NamedTuple):
    """begin, end: moments of the clock. name: a text, or what is one by `str`."""

    step: int
    category: Category
    name: object
    begin: Any
    end: Any
    peer: int | None


class Recorder:
    """Of one rank. step: the one under way, while spans are recorded."""

    def __init__(self) -> None:
        self.spans: list[Recorded] = []
        self.step = 0
        self._moment: Callable[[], Any] | None = None
        self._is_waiting = False

    @property
    def is_on(self) -> bool:
        return self._moment is not None

    def start(self, moment: Callable[[], Any]) -> None:
        """From here on spans are kept. moment: asked at both ends of each."""
        self._moment = moment

    def stop(self) -> None:
        """From here on they are not, but for those that have begun."""
        self._moment = None

    def span(self, category: Category, name: object, peer: int | None = None) -> AbstractContextManager[None]:
        """What happens inside. peer: the rank at the other end of a message. A wait within a wait is the outer one."""
        if self._moment is None or (self._is_waiting and category.is_communication):
            return NOTHING
        return _Open(self, self._moment, category, name, peer)

    @contextmanager
    def whole(self, category: Category, name: str) -> Iterator[None]:
        """As `span`, of something whose parts are not recorded."""
        moment = self._moment
        with self.span(category, name):
            self._moment = None
            try:
                yield
            finally:
                self._moment = moment


class _Open:
    def __init__(
        self, recorder: Recorder, moment: Callable[[], Any], category: Category, name: object, peer: int | None
    ) -> None:
        self._recorder, self._moment = recorder, moment
        self._category, self._name, self._peer = category, name, peer

    def __enter__(self) -> None:
        if self._category.is_communication:
            self._recorder._is_waiting = True
        self._begin = self._moment()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        end, recorder = self._moment(), self._recorder
        if self._category.is_communication:
            recorder._is_waiting = False
        recorder.spans.append(Recorded(recorder.step, self._category, self._name, self._begin, end, self._peer))
