"""A job with a pipeline, started by the launcher."""

from __future__ import annotations

import os
import signal

import pytest

import lab

pytestmark = pytest.mark.lab

JOB = """
model: {gpt: {layers: 2, width: 16, heads: 2, context: 16}}
batch: {global: 8, micro: 1}
parallel: {pipeline: 2, schedule: zb_h1}
train: {steps: 100000}
log: {every: 1}
"""


def test_a_killed_stage_is_the_root_cause(start, tmp_path):
    """The other stage loses its peer in a message, and is a victim."""
    (tmp_path / "job.yaml").write_text(JOB)
    run = start("-n", "2", "job.yaml")
    lab.wait_for(lambda: " loss " in run.out, "the first steps", 60)
    os.kill(run.rank_pid(1), signal.SIGKILL)
    assert run.wait(60) == 137, run.err
    assert run.report["cause"]["rank"] == 1
    assert "1 other rank followed it" in run.err
