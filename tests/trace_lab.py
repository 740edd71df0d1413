"""What every trace's file keeps."""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from dstrain.runtime.spec.trace import Category


def check_file(path: Path, ranks: int, steps: list[int]) -> dict[tuple[int, int], list[Any]]:
    """All ranks, all steps, nothing beside a step, no two spans of a row at once. Returns the rows, in order."""
    rows = defaultdict(list)
    for event in json.loads(path.read_text())["traceEvents"]:
        if event["ph"] == "X":
            rows[event["pid"], event["tid"]].append(event)
    assert {rank for rank, _ in rows} == set(range(ranks))
    for (rank, number), row in rows.items():
        row.sort(key=lambda event: (event["ts"], event["dur"]))
        for one, other in pairwise(row):
            assert one["ts"] + one["dur"] <= other["ts"] + 2e-3, (rank, number, one, other)
        inside = {step["args"]["step"]: step for step in rows[rank, 0]}
        assert list(inside) == steps
        for event in row:
            step = inside[event["args"]["step"]]
            assert step["ts"] <= event["ts"] + 2e-3
            assert event["ts"] + event["dur"] <= step["ts"] + step["dur"] + 2e-3
    return rows


def names(row: list[Any], step: int, *categories: Category) -> list[str]:
    return [event["name"] for event in row if event["args"]["step"] == step and event["cat"] in categories]
