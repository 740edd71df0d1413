"""The strict loader: a table of wrong files and their exact messages."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest

from dstrain.runtime.spec.config import JobConfig
from dstrain.runtime.spec.errors import ConfigError
from dstrain.runtime.spec.load import load_job, load_resolved
from dstrain.runtime.spec.model_config import GPTConfig
from dstrain.runtime.spec.section import Section
from dstrain.runtime.spec.training_config import (
    CheckpointConfig,
    GroupConfig,
    LossScaleConfig,
    TrainConfig,
    ZeroConfig,
)

GOOD = """\
model: {gpt: {layers: 2, width: 32, heads: 4, context: 16}}
batch: {global: 8, micro: 2}
train: {steps: 5}
"""


def keys(section: type[Section]) -> str:
    """The keys of a section, as a message lists them."""
    return ", ".join(info.alias or name for name, info in section.model_fields.items())


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
optimizer: {lr: -1e-3, betas: [0.9, 1.0], name: adams}
run: {env: {A: 1}, nproc_per_node: lots, pass_env: x}
data: 5
log:
"""
    stages = " or ".join(", ".join(map(str, get_args(ZeroConfig.model_fields["stage"].annotation))).rsplit(", ", 1))
    top, gpt, train = keys(JobConfig), keys(GPTConfig), keys(TrainConfig)
    assert mistakes(write, text, "train.stepz=3", "zero.stage=9", "nonsense") == [
        f"job.yaml:1:1: nam: expected one of {top}, found an unknown key; did you mean name?",
        "job.yaml:3:3: model.gpt.width: expected a value, found none",
        "job.yaml:3:9: model.gpt.layers: expected an integer, found 'two'",
        f"job.yaml:3:22: model.gpt.widht: expected one of {gpt}, found an unknown key; did you mean width?",
        "job.yaml:3:33: model.gpt.heads: expected at least 1, found 0",
        "job.yaml:4:9: batch.global: expected an integer, found 8.5",
        "job.yaml:4:32: batch.micro: expected each key once, found it again (first in line 4)",
        "job.yaml:5:13: optimizer.lr: expected more than 0, found -0.001",
        "job.yaml:5:37: optimizer.betas.1: expected less than 1, found 1.0",
        "job.yaml:5:43: optimizer.name: expected 'adamw', 'adam', 'sgd', 'adafactor' or 'muon', found 'adams'; "
        "did you mean adam?",
        "job.yaml:6:13: run.env.A: expected text (numbers as text stand in quotes), found 1",
        "job.yaml:6:20: run.nproc_per_node: expected an integer or 'auto', found 'lots'",
        "job.yaml:6:42: run.pass_env: expected a list, found 'x'",
        "job.yaml:7:1: data: expected a section of keys, found 5",
        "job.yaml:8:1: log: expected a section of keys, found nothing",
        f"--set train.stepz=3: train.stepz: expected one of {train}, found an unknown key; did you mean steps?",
        f"--set zero.stage=9: zero.stage: expected {stages}, found 9",
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
        ("optimizer.betas=[0.9, 0.9, 0.9]", "optimizer.betas: expected 2 items, found 3"),
    ],
)
def test_overrides_that_are_wrong(write: Path, override: str, message: str) -> None:
    assert mistakes(write, GOOD, override)[0].startswith(f"--set {override}: {message}")


TEXT = "text (numbers as text stand in quotes)"
SIZES = "'tiny', 'mini', '124m', '350m', '760m', '1.3b', '2.7b' or '6.7b'"


@pytest.mark.parametrize(
    ("override", "messages"),
    [
        ("model.gpt.size=huge", [f"model.gpt.size: expected {SIZES}, found 'huge'"]),
        ("model.gpt={size: 5}", [f"model.gpt.size: expected {SIZES}, found 5"]),
        ("model.gpt={size: 124M}", [f"model.gpt.size: expected {SIZES}, found '124M'; did you mean 124m?"]),
        (
            "model.gpt={}",
            [f"model.gpt.{key}: expected a value, found none" for key in ("context", "heads", "layers", "width")],
        ),
        ("model.hf.path=5", [f"model.hf.path: expected {TEXT}, found 5"]),
        ("model.hf.config=5", [f"model.hf.config: expected {TEXT} or a section of keys, found 5"]),
        ("model.factory=a b", ["model.factory: expected package.module:name, found 'a b'"]),
        ("model.args=5", ["model.args: expected a section of keys, found 5"]),
        ("data.format=byte", ["data.format: expected 'bytes', 'tokens' or 'text', found 'byte'; did you mean bytes?"]),
        ("data.sources={path: a}", ["data.sources: expected a list, found a section"]),
        (
            "data.sources=[{path: a, weight: 0}, {pth: b}, c]",
            [
                "data.sources.0.weight: expected more than 0, found 0",
                "data.sources.1.path: expected a value, found none",
                "data.sources.1.pth: expected one of path, weight, found an unknown key; did you mean path?",
                "data.sources.2: expected a section of keys, found 'c'",
            ],
        ),
        ("data.token_type=u2", ["data.token_type: expected 'uint16' or 'uint32', found 'u2'"]),
        ("data.validation_fraction=1", ["data.validation_fraction: expected less than 1, found 1"]),
        ("data.shuffle=0", ["data.shuffle: expected true or false, found 0"]),
        ("data.prefetch=-1", ["data.prefetch: expected at least 0, found -1"]),
        ("precision.dtype=float16", ["precision.dtype: expected 'fp32', 'bf16' or 'fp16', found 'float16'"]),
        ("precision.reduce_dtype=fp8", ["precision.reduce_dtype: expected 'fp32', 'bf16' or 'fp16', found 'fp8'"]),
        (
            "precision.loss_scale={initial_pwer: 3, window: 0}",
            [
                f"precision.loss_scale.initial_pwer: expected one of {keys(LossScaleConfig)}, found an unknown key; "
                "did you mean initial_power?",
                "precision.loss_scale.window: expected at least 1, found 0",
            ],
        ),
        ("optimizer.no_decay=1d", ["optimizer.no_decay: expected a list, found '1d'"]),
        ("optimizer.groups=5", ["optimizer.groups: expected a list, found 5"]),
        (
            "optimizer.groups=[{match: [], lr_ratio: 0}, {match: [1], decay: 3}, {match: head}]",
            [
                "optimizer.groups.0.lr_ratio: expected more than 0, found 0",
                "optimizer.groups.0.match: expected at least 1 item, found 0",
                f"optimizer.groups.1.decay: expected one of {keys(GroupConfig)}, found an unknown key",
                f"optimizer.groups.1.match.0: expected {TEXT}, found 1",
                "optimizer.groups.2.match: expected a list, found 'head'",
            ],
        ),
        (
            "schedule.name=cosin",
            [
                "schedule.name: expected 'cosine', 'constant', 'linear', 'step', 'one_cycle' or 'plateau', "
                "found 'cosin'; did you mean cosine?"
            ],
        ),
        ("schedule.factor=1", ["schedule.factor: expected less than 1, found 1"]),
        ("schedule.minimum_ratio=1.5", ["schedule.minimum_ratio: expected at most 1, found 1.5"]),
        (
            "train.activation_checkpointing=every",
            ["train.activation_checkpointing: expected 'all' or an integer or a list, found 'every'"],
        ),
        (
            "train.activation_checkpointing=0",
            ["train.activation_checkpointing: expected 'all' or at least 1 or a list, found 0"],
        ),
        ("train.activation_checkpointing=[a, 3]", [f"train.activation_checkpointing.1: expected {TEXT}, found 3"]),
        ("train.loss=mse", ["train.loss: expected package.module:name, found 'mse'"]),
        ("train.ema_decay=1", ["train.ema_decay: expected less than 1, found 1"]),
        ("checkpoint=true", ["checkpoint: expected a section of keys, found true"]),
        ("checkpoint.every_steps=0", ["checkpoint.every_steps: expected at least 1, found 0"]),
        ("checkpoint.resume=5", [f"checkpoint.resume: expected {TEXT}, found 5"]),
        (
            "checkpoint.directory=x",
            [f"checkpoint.directory: expected one of {keys(CheckpointConfig)}, found an unknown key"],
        ),
        ("log.trackers=wandb", ["log.trackers: expected a list, found 'wandb'"]),
        (
            "log.trackers=[wandb, tensorbord]",
            ["log.trackers.1: expected 'tensorboard' or 'wandb', found 'tensorbord'; did you mean tensorboard?"],
        ),
        ("log.project=''", ["log.project: expected a text that is not empty, found ''"]),
        ("log.peak_tflops=0", ["log.peak_tflops: expected more than 0, found 0"]),
        ("run.nproc_per_node=0", ["run.nproc_per_node: expected at least 1 or 'auto', found 0"]),
    ],
)
def test_every_key_says_what_it_expects(write: Path, override: str, messages: list[str]) -> None:
    assert mistakes(write, GOOD, override) == [f"--set {override}: {message}" for message in messages]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model={}", "model: expected one of gpt, hf, factory, found none"),
        ("model.factory=a:b", "model: expected one of gpt, hf, factory, found gpt, factory"),
        ("model.args={a: 1}", "model.args: expected no such key without model.factory, found {'a': 1}"),
        ("model={hf: {}}", "model.hf: expected path (pretrained) or config (random weights), found none"),
        (
            "model={hf: {path: a, config: {}}}",
            "model.hf: expected path (pretrained) or config (random weights), found both",
        ),
        (
            "model.gpt.heads=5",
            "model.gpt.width: expected a multiple of 2 × heads = 10 (a head's width is even), found 32",
        ),
        (
            "model.gpt.vocabulary=100",
            "model.gpt.vocabulary: expected at least 256 for data.format bytes, found 100",
        ),
        ("data.sequence_length=17", "data.sequence_length: expected at most model.gpt.context = 16, found 17"),
        ("data={path: a, factory: a:b}", "data.factory: expected no such key beside data.path, found both"),
        ("data={path: a, sources: [{path: b}]}", "data.sources: expected no such key beside data.path, found both"),
        ("data.args={a: 1}", "data.args: expected no such key without data.factory, found {'a': 1}"),
        (
            "data={path: a, format: text}",
            "data.tokenizer: expected a tokenizer.json for data.format text, found none",
        ),
        ("data.tokenizer=a", "data.tokenizer: expected none without format: text, found a"),
        ("data.format=tokens", "data.path: expected a file or folder for data.format tokens, found none"),
        ("batch.micro=3", "batch.global: expected a multiple of batch.micro = 3, found 8"),
        (
            "schedule={name: constant, minimum_ratio: 0}",
            "schedule.minimum_ratio: expected no such key with name: constant, found 0.0",
        ),
        (
            "schedule={name: step, every: 5, minimum_ratio: 0.1}",
            "schedule.minimum_ratio: expected no such key with name: step, found 0.1",
        ),
        ("schedule.name=step", "schedule.every: expected a number of steps for name: step, found none"),
        ("schedule.every=5", "schedule.every: expected none for name: cosine, found 5"),
        (
            "schedule={name: one_cycle, warmup_steps: 5}",
            "schedule.warmup_steps: expected 0: one_cycle has its own rise, found 5",
        ),
        ("precision.autocast=true", "precision.dtype: expected bf16 or fp16 for precision.autocast, found fp32"),
        ("optimizer.momentum=0.9", "optimizer.momentum: expected no such key with name: adamw, found 0.9"),
        (
            "optimizer={name: sgd, betas: [0.9, 0.99]}",
            "optimizer.betas: expected no such key with name: sgd, found [0.9, 0.99]",
        ),
        (
            "optimizer={name: adafactor, eps: 1e-6}",
            "optimizer.eps: expected no such key with name: adafactor, found 1e-06",
        ),
        (
            "optimizer={factory: 'a:b', momentum: 0.9}",
            "optimizer.momentum: expected no such key beside optimizer.factory, found 0.9; its own arguments stand in "
            "optimizer.args",
        ),
        (
            "optimizer={factory: 'a:b', betas: [0.5, 0.5]}",
            "optimizer.betas: expected no such key beside optimizer.factory, found [0.5, 0.5]; its own arguments stand "
            "in optimizer.args",
        ),
        (
            "optimizer={factory: 'a:b', name: sgd}",
            "optimizer.name: expected no such key beside optimizer.factory, found sgd",
        ),
        (
            "schedule.name=plateau",
            "train.eval_every: expected steps between validations, whose loss schedule.name: plateau looks at, "
            "found none",
        ),
        ("schedule.patience=5", "schedule.patience: expected no such key with name: cosine, found 5"),
        ("schedule={name: linear, factor: 0.5}", "schedule.factor: expected no such key with name: linear, found 0.5"),
        (
            "schedule={name: constant, start_ratio: 0}",
            "schedule.start_ratio: expected no such key with name: constant, found 0.0",
        ),
        (
            "data={factory: 'a:b', validation_path: c}",
            "data.validation_path: expected no such key beside data.factory, found c",
        ),
        (
            "data={factory: 'a:b', validation_fraction: 0.1}",
            "data.validation_fraction: expected no such key beside data.factory, found 0.1",
        ),
        (
            "data={factory: 'a:b', format: tokens}",
            "data.format: expected no such key beside data.factory, found tokens",
        ),
        (
            "data={path: a, validation_path: c, validation_fraction: 0.1}",
            "data.validation_fraction: expected no such key beside data.validation_path, found 0.1",
        ),
        (
            "data={path: a, token_type: uint32}",
            "data.token_type: expected no such key with format: bytes, found uint32",
        ),
        ("log.trackers=[wandb, wandb]", "log.trackers: expected each tracker once, found wandb, wandb"),
        ("run={hosts: a, hostfile: b}", "run.hosts: expected no such key beside run.hostfile, found 'a'"),
        ("model=null", "model: expected a section with gpt, hf or factory, found none"),
        ("batch=null", "batch: expected a section with global and micro, found none"),
        ("train={}", "train.steps: expected a value, found none"),
    ],
)
def test_every_contradiction(write: Path, override: str, message: str) -> None:
    """Told at the key to change, which may be one that the file has."""
    (found,) = mistakes(write, GOOD, override)
    assert re.fullmatch(rf"(--set {re.escape(override)}|job\.yaml:\d+:\d+): {re.escape(message)}", found), found


@pytest.mark.parametrize(
    "overrides",
    [
        ["optimizer.name=sgd"],
        ["optimizer.name=adafactor"],
        ["optimizer={factory: 'a:b', args: {betas: [0.5, 0.5]}}"],
        ["data={factory: 'a:b', seed: 3}"],
        ["schedule.name=plateau", "train.eval_every=2"],
    ],
)
def test_defaults_contradict_nothing_even_written_out(write: Path, overrides: list[str]) -> None:
    """A resolved job, and one that `dstrain config show` has printed, have every key."""
    job = load(write, GOOD, *overrides)
    resolved = write.with_name("job.json")
    resolved.write_text(job.model_dump_json(by_alias=True))
    assert load_resolved(resolved) == load_job(resolved) == job


def test_a_script_tells_plateau_its_losses_itself(write: Path) -> None:
    write.write_text(GOOD + "schedule: {name: plateau}\n")
    assert load_job(write, for_trainer=False).schedule.name == "plateau"
