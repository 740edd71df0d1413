"""Optimizers without torch.compile's machinery: what they import, and that they are torch's own."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from dstrain.runtime.without_dynamo import without_dynamo

TRAIN = """
import sys, torch
from torch import nn
from dstrain.runtime import initialize
model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
engine = initialize(model, {"optimizer": {"name": NAME}, "train": {"steps": 5}})
for _ in range(2):
    engine.backward(engine(torch.ones(2, 4)).sum())
    engine.step()
engine.optimizer.state_dict()
print("torch._dynamo" in sys.modules)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "adafactor", "muon"])
def test_training_does_not_import_dynamo(name):
    done = subprocess.run(
        [sys.executable, "-c", TRAIN.replace("NAME", repr(name))], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"


KINDS = [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD, torch.optim.Adafactor, torch.optim.Muon]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("used_before", [False, True])
def test_steps_are_torchs(kind, used_before):
    """used_before: torch has wrapped the class's step for its profiler, as the first instance of a class does."""
    if used_before:
        kind([nn.Parameter(torch.ones(3, 3))], lr=0.1)
    ours, theirs = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3, 3))
    light = without_dynamo(kind)
    assert (light.__name__, issubclass(light, kind)) == (kind.__name__, True)
    optimizers = [light([ours], lr=0.1), kind([theirs], lr=0.1)]
    calls = []
    optimizers[0].register_step_pre_hook(lambda *_: calls.append(1))
    for step in range(3):
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            parameter.grad = torch.arange(9.0).view(3, 3) + step
            optimizer.step()
    assert torch.equal(ours, theirs)
    assert len(calls) == 3
    optimizers[1].load_state_dict(optimizers[0].state_dict())
