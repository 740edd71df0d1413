"""The strict loader: a table of wrong files and their exact messages."""

from __future__ import annotations

from pathlib import Path

import pytest

from dstrain.runtime.spec.config import JobConfig
from dstrain.runtime.spec.errors import ConfigError
from dstrain.runtime.spec.load import load_job

GOOD = """\
model: {gpt: {layers: 2, width: 32, heads: 4, context: 16}}
batch: {global: 8, micro: 2}
train: {steps: 5}
"""
TOP = "name, run, model, data, batch, zero, precision, optimizer, schedule, train, log"


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file job.yaml, in the working directory."""
    monkeypatch.chdir(tmp_path)
    return Path("job.yaml")


def load(path: Path, text: str, *overrides: str) -> JobConfig:
    path.write_text(text)
    return load_job(path, overrides)


def mistakes(path: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(path, text, *overrides)
    return str(caught.value).splitlines()


def test_numbers_text_and_lists_mean_what_they_look_like(write: Path) -> None:
    text = GOOD + (
        "name: no\n"
        "optimizer: {lr: 1e-3, eps: 1E-8, weight_decay: 0, betas: [.9, 0.95]}\n"
        "run: {env: {DATE: 2024-01-01, TIME: 12:30:00, ON: yes, OCTAL: '010', EMPTY: ''}, pass_env: ['NCCL_*']}\n"
        "data: {seed: 010}\n"
    )
    job = load(write, text)
    assert (job.optimizer.lr, job.optimizer.eps, job.optimizer.betas) == (1e-3, 1e-8, (0.9, 0.95))
    assert job.name == "no"
    assert job.run.env == {"DATE": "2024-01-01", "TIME": "12:30:00", "ON": "yes", "OCTAL": "010", "EMPTY": ""}
    assert job.run.pass_env == ("NCCL_*",)
    assert job.data.seed == 10


def test_overrides_go_over_the_file_in_their_order(write: Path) -> None:
    job = load(
        write,
        GOOD,
        "train.steps=7",
        "train.steps=9",
        "optimizer.lr=3e-4",
        "run.env.A=b=c",
        "run.nproc_per_node=auto",
        "train.clip=null",
        "model.gpt={layers: 1, width: 8, heads: 2, context: 4}",
        "name=a name",
    )
    assert (job.train.steps, job.optimizer.lr, job.train.clip, job.name) == (9, 3e-4, None, "a name")
    assert (job.run.env, job.run.nproc_per_node) == ({"A": "b=c"}, "auto")
    assert job.model.gpt.layers == 1


def test_every_mistake_in_one_go(write: Path) -> None:
    text = """\
nam: a
model:
  gpt: {layers: two, widht: 32, heads: 0, context: 16}
batch: {global: 8.5, micro: 2, micro: 3}
optimizer: {lr: -1e-3, betas: [0.9, 1.0], name: adam}
run: {env: {A: 1}, nproc_per_node: lots, pass_env: x}
data: 5
log:
"""
    gpt = "layers, width, heads, context, vocabulary"
    train = "steps, clip, eval_every, eval_samples, seed, sample_bytes"
    assert mistakes(write, text, "train.stepz=3", "zero.stage=4", "nonsense") == [
        f"job.yaml:1:1: nam: expected one of {TOP}, found an unknown key; did you mean name?",
        "job.yaml:3:3: model.gpt.width: expected a value, found none",
        "job.yaml:3:9: model.gpt.layers: expected an integer, found 'two'",
        f"job.yaml:3:22: model.gpt.widht: expected one of {gpt}, found an unknown key; did you mean width?",
        "job.yaml:3:33: model.gpt.heads: expected at least 1, found 0",
        "job.yaml:4:9: batch.global: expected an integer, found 8.5",
        "job.yaml:4:32: batch.micro: expected each key once, found it again (first in line 4)",
        "job.yaml:5:13: optimizer.lr: expected more than 0, found -0.001",
        "job.yaml:5:37: optimizer.betas.1: expected less than 1, found 1.0",
        "job.yaml:5:43: optimizer.name: expected 'adamw', found 'adam'",
        "job.yaml:6:13: run.env.A: expected text (numbers as text stand in quotes), found 1",
        "job.yaml:6:20: run.nproc_per_node: expected an integer or 'auto', found 'lots'",
        "job.yaml:6:42: run.pass_env: expected a list, found 'x'",
        "job.yaml:7:1: data: expected a section of keys, found 5",
        "job.yaml:8:1: log: expected a section of keys, found nothing",
        "--set train.stepz=3: train.steps: expected a value, found none",
        f"--set train.stepz=3: train.stepz: expected one of {train}, found an unknown key; did you mean steps?",
        "--set zero.stage=4: zero.stage: expected 0, found 4",
        "--set nonsense: expected key.path=value",
    ]


def test_keys_that_contradict_each_other(write: Path) -> None:
    text = GOOD + "schedule: {name: constant, warmup_steps: 9, minimum_ratio: 0.1}\nrun: {hosts: 'a', hostfile: b}\n"
    found = mistakes(write, text, "model.gpt.heads=5", "batch.micro=3", "data.sequence_length=17")
    assert found == [
        "job.yaml:1:26: model.gpt.width: expected a multiple of 2 × heads = 10 (a head's width is even), found 32",
        "job.yaml:2:9: batch.global: expected a multiple of batch.micro = 3, found 8",
        "job.yaml:4:45: schedule.minimum_ratio: expected no such key with name: constant, found 0.1",
        "job.yaml:5:7: run.hosts: expected no such key beside run.hostfile, found 'a'",
        "--set data.sequence_length=17: data.sequence_length: expected at most model.gpt.context = 16, found 17",
    ]
    assert mistakes(write, GOOD, "model.gpt.vocabulary=100") == [
        "--set model.gpt.vocabulary=100: model.gpt.vocabulary: expected at least 256 for data.format bytes, found 100"
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "job.yaml:1:1: expected the sections of a job, found nothing"),
        ("- a\n", "job.yaml:1:1: expected the sections of a job, found a list"),
        ("a: [1\n", "job.yaml:2:1: expected plain YAML, found expected ',' or ']', but got '<stream end>'"),
        ("a: b: c\n", "job.yaml:1:5: expected plain YAML, found mapping values are not allowed here"),
        ("a: &x {b: *x}\n", "job.yaml:1:11: expected plain YAML, found the alias *x"),
        ("a: 1\n---\nb: 2\n", "job.yaml:2:1: expected plain YAML, found but found another document"),
        ("a: \x01\n", "job.yaml:1:1: expected plain YAML, found unacceptable character #x0001: "),
    ],
)
def test_a_file_that_is_no_job(write: Path, text: str, message: str) -> None:
    (found,) = mistakes(write, text, "train.steps=3") if text != "" else mistakes(write, text)
    assert found.startswith(message)


def test_a_file_that_cannot_be_read(write: Path) -> None:
    with pytest.raises(ConfigError, match=r"^nowhere\.yaml: expected a readable job file, found: No such file"):
        load_job(Path("nowhere.yaml"))
    write.write_bytes(b"name: \xff\n")
    with pytest.raises(ConfigError, match=r"^job\.yaml: expected text in UTF-8, found byte 6 that is not$"):
        load_job(write)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps.more=1", "train.steps: expected a section, found 5"),
        ("=1", "expected key.path=value"),
        ("train..steps=1", "expected key.path=value"),
        ("train.steps=[", "expected plain YAML, found "),
        ("train.clip=.nan", "train.clip: expected a finite number, found nan"),
        ("train.clip=.INF", "train.clip: expected a finite number, found inf"),
        ("data.seed=4294967296", "data.seed: expected less than 4294967296, found 4294967296"),
        ("train.steps=!!int x", "train.steps: expected a value that its tag allows, found 'x'"),
        ("optimizer.betas=[0.9]", "optimizer.betas.1: expected a value, found none"),
        ("optimizer.betas=[0.9, 0.9, 0.9]", "optimizer.betas: expected 2 items, found a list"),
    ],
)
def test_overrides_that_are_wrong(write: Path, override: str, message: str) -> None:
    assert mistakes(write, GOOD, override)[0].startswith(f"--set {override}: {message}")
