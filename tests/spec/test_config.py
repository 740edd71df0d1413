"""What a JobConfig allows."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from pydantic import ValidationError

from dstrain.runtime.spec.config import JobConfig, RunConfig
from dstrain.runtime.spec.data_config import BatchConfig
from dstrain.runtime.spec.errors import ConfigError
from dstrain.runtime.spec.load import load_job, load_resolved
from dstrain.runtime.spec.section import Section

EXAMPLES = sorted(Path(__file__).parents[2].glob("examples/*.yaml"))


def sections(section: type[Section] = JobConfig) -> Iterator[type[Section]]:
    yield section
    for info in section.model_fields.values():
        for kind in (info.annotation, *get_args(info.annotation)):
            if isinstance(kind, type) and issubclass(kind, Section):
                yield from sections(kind)


def test_every_key_says_what_it_is() -> None:
    found = list(sections())
    assert len(found) == 19
    for section in found:
        for name, info in section.model_fields.items():
            assert info.description, f"{section.__name__}.{name}"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_load_and_survive_the_way_to_a_worker(path: Path, tmp_path: Path) -> None:
    job = load_job(path)
    resolved = tmp_path / "job.json"
    resolved.write_text(job.model_dump_json(by_alias=True))
    assert load_resolved(resolved) == job


def test_configuration_is_frozen() -> None:
    run = RunConfig()
    with pytest.raises(ValidationError, match="frozen"):
        run.max_restarts = 3


@pytest.mark.parametrize(("ranks", "accumulation"), [(1, 12), (2, 6), (3, 4), (12, 1)])
def test_accumulation(ranks: int, accumulation: int) -> None:
    assert BatchConfig.model_validate({"global": 24, "micro": 2}).accumulation(ranks) == accumulation


@pytest.mark.parametrize(("ranks", "product", "nearest"), [(5, 10, 20), (13, 26, 26), (100, 200, 200)])
def test_accumulation_is_never_rounded(ranks: int, product: int, nearest: int) -> None:
    batch = BatchConfig.model_validate({"global": 24, "micro": 2})
    with pytest.raises(ConfigError) as caught:
        batch.accumulation(ranks)
    assert str(caught.value) == (
        f"batch.global: expected a multiple of batch.micro × data ranks = 2 × {ranks} = {product}, found 24; "
        f"the nearest is {nearest}"
    )


def test_a_resolved_job_of_another_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text('{"name": "x", "later": 1}')
    with pytest.raises(ConfigError, match=r"job\.json: expected a job resolved by this version of dstrain"):
        load_resolved(tmp_path / "job.json")
    with pytest.raises(ConfigError, match=r"nowhere: expected the resolved job, found: No such file"):
        load_resolved(tmp_path / "nowhere")


def test_reading_a_configuration_loads_no_torch() -> None:
    code = "import sys, dstrain.runtime.spec.load; assert not {'torch', 'numpy', 'paramiko'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    code = "import sys, dstrain.runtime as r; r.load_job; dir(r); assert 'torch' not in sys.modules; r.Communicator"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
