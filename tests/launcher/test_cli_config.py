"""`dstrain config`: schema, validate, show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from dstrain.launcher.cli import app
from dstrain.runtime.spec.document import Document, to_yaml
from dstrain.runtime.spec.errors import ConfigError, UsageError
from dstrain.runtime.spec.load import load_job

EXAMPLES = sorted(Path(__file__).parents[2].glob("examples/*.yaml"))
GOOD = "model: {gpt: {size: tiny, heads: 4}}\nbatch: {global: 8, micro: 2}\ntrain: {steps: 5}\n"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("good.yaml").write_text(GOOD)
    return tmp_path


def config(*words: str) -> str:
    result = CliRunner().invoke(app, ["config", *words])
    if isinstance(result.exception, Exception):
        raise result.exception
    return result.stdout


@pytest.fixture(scope="module")
def schema() -> Any:
    return json.loads(config("schema"))


# --- schema --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_keep_to_the_schema(path: Path, schema: Any) -> None:
    jsonschema.Draft202012Validator.check_schema(schema)
    document = Document(str(path))
    document.read(path.read_text())
    jsonschema.validate(document.values, schema)


@pytest.mark.parametrize(
    "job",
    [
        {"train": {"stepz": 1}},
        {"train": {"steps": "5"}},
        {"train": {"steps": 0}},
        {"batch": {"micro": 2}},
        {"model": {"gpt": {"layers": 1}}},
        {"model": {"gpt": {"size": "huge"}}},
        {"optimizer": {"name": "adma"}},
        {"log": {"trackers": ["wand"]}},
    ],
    ids=str,
)
def test_the_schema_refuses(job: Any, schema: Any) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(job, schema)


@pytest.mark.parametrize("gpt", [{"size": "tiny"}, {"layers": 1, "width": 8, "heads": 2, "context": 4}], ids=str)
def test_the_schema_allows_a_size_or_a_shape(gpt: Any, schema: Any) -> None:
    jsonschema.validate({"model": {"gpt": gpt}, "batch": {"global": 2, "micro": 1}}, schema)


# --- validate ------------------------------------------------------------------------------------------------


def test_a_valid_file_is_one_line() -> None:
    assert config("validate", "good.yaml") == "good.yaml: valid\n"
    assert config("validate", "good.yaml", "good.yaml", "--set", "train.steps=1") == "good.yaml: valid\n" * 2


def test_every_mistake_of_every_file_has_its_place() -> None:
    Path("bad.yaml").write_text("batch: {global: 8, micro: two}\ntrain:\n  stepz: 5\n")
    with pytest.raises(ConfigError) as caught:
        config("validate", "bad.yaml", "good.yaml", "nowhere.yaml")
    assert caught.value.exit_code == 2
    lines = str(caught.value).splitlines()
    assert lines[0] == "bad.yaml:1:20: batch.micro: expected an integer, found 'two'"
    assert lines[1].startswith("bad.yaml:3:3: train.stepz: expected one of steps, ")
    assert lines[1].endswith(", found an unknown key; did you mean steps?")
    assert lines[2:] == ["nowhere.yaml: expected a readable job file, found: No such file or directory"]


def test_a_job_of_a_script_may_lack_what_a_trainer_needs() -> None:
    Path("script.yaml").write_text("run: {env: {A: b}}\n")
    assert config("validate", "--script", "script.yaml") == "script.yaml: valid\n"
    with pytest.raises(ConfigError, match=r"model: expected a section with gpt, hf or factory, found none"):
        config("validate", "script.yaml")
    assert "A: b" in config("show", "--script", "script.yaml")


# --- show ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_what_is_shown_is_the_same_job(path: Path) -> None:
    overrides = [
        "optimizer.eps=1e-9",
        "run.env={A: '1e3', B: 'no', C: '0o17', D: '2024-01-01', E: \"x\\ty: #\\u2028\"}",
    ]
    shown = config("show", str(path), "--set", overrides[0], "--set", overrides[1])
    Path("shown.yaml").write_text(shown)
    assert load_job(Path("shown.yaml")) == load_job(path, overrides)
    assert config("show", "shown.yaml") == shown


def test_defaults_and_sizes_are_filled_in() -> None:
    shown = yaml.safe_load(config("show", "good.yaml", "--set", "train.steps=7"))
    assert shown["model"]["gpt"] == {
        "size": "tiny",
        "layers": 3,
        "width": 160,
        "heads": 4,
        "context": 128,
        "vocabulary": 256,
    }
    assert (shown["train"]["steps"], shown["checkpoint"], shown["batch"]["global"]) == (7, None, 8)
    assert "  betas: [0.9, 0.95]\n" in config("show", "good.yaml")


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.text(), plain, max_size=3))
def test_plain_values_survive_the_way_through_yaml(values: Any) -> None:
    document = Document("x")
    document.read(to_yaml(values))
    assert document.problems == []
    assert document.values == values


# --- import-deepspeed ----------------------------------------------------------------------------------------


def test_a_deepspeed_configuration_becomes_a_job() -> None:
    Path("ds.json").write_text('{"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 2}, "bf_16": 1}')
    result = CliRunner().invoke(app, ["config", "import-deepspeed", "ds.json", "--ranks", "2", "-o", "job.yaml"])
    assert (result.exit_code, result.stdout) == (0, "")
    assert "refused   bf_16: 1 (DeepSpeed has no such key; did you mean bf16, here precision?)\n" in result.stderr
    assert result.stderr.endswith("4 keys: 0 honoured, 3 mapped, 1 refused (1 of them may change the training)\n")
    job = load_job(Path("job.yaml"), for_trainer=False)
    assert job.batch is not None
    assert (job.batch.global_, job.batch.micro, job.zero.stage) == (8, 4, 2)
    assert config("import-deepspeed", "ds.json", "--ranks", "2") == Path("job.yaml").read_text()

    with pytest.raises(UsageError, match=r"--output: expected no file of that name, found job.yaml; .*--force"):
        config("import-deepspeed", "ds.json", "-o", "job.yaml")
    config("import-deepspeed", "ds.json", "-o", "job.yaml", "--force")
    assert "batch" not in Path("job.yaml").read_text()
