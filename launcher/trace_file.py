"""trace.json: the timelines that ranks have sent as events, in one file."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from dstrain.launcher.event_log import Event
from dstrain.launcher.run_dir import RunDir
from dstrain.runtime.spec.errors import UsageError
from dstrain.runtime.spec.trace import Collected, read_trace, write_trace


class TraceFile:
    """Of one run; of several attempts the newest that was traced."""

    def __init__(self, run: RunDir, job: str | None, note: Callable[[str], None]) -> None:
        """job: the resolved one, as the workers get it."""
        self._path, self._note = run.trace, note
        self._asked = json.loads(job).get("log", {}).get("trace") if job else None
        self._collected = Collected()

    def take(self, event: Event) -> None:
        """An event of any kind."""
        self._collected.take(event)

    def write(self) -> dict[str, Any] | None:
        """Write the file; what report.json says of it. None: nothing was traced, which is noted where it was asked."""
        traces = self._collected.traces
        steps = {span.step for trace in traces for span in trace.spans}
        if not steps:
            if self._asked is not None:
                self._note(f"no timeline: dstrain's engine did none of the steps {self._asked} (log.trace)")
            return None
        try:
            write_trace(self._path, traces)
            measured = read_trace(self._path)
        except (OSError, UsageError) as error:
            self._note(f"the timeline cannot be written: {error}")
            return None
        bubble = measured.bubble if measured.stages > 1 else None
        return {
            "file": self._path.name,
            "steps": len(steps),
            "bubble": None if bubble is None else round(bubble, 5),
            "uncertainty_us": round(1e6 * measured.uncertainty_s, 3),
        }
