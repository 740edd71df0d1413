"""The documents agree with the code: examples load, links lead somewhere, the reference is the configuration.

`DSTRAIN_WRITE_REFERENCE=1 pytest tests/test_docs.py` writes docs/reference.md anew.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from dstrain.runtime.spec.config import JobConfig
from dstrain.runtime.spec.errors import ConfigError
from dstrain.runtime.spec.load import load_job

ROOT = Path(__file__).parent.parent
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md"]
REFERENCE = ROOT / "docs" / "reference.md"
WRONG = "name: wrong\n"  # the job in training.md that shows what mistakes look like

PREFACE = """# Reference: every key of a job

Written from the configuration itself by `DSTRAIN_WRITE_REFERENCE=1 pytest tests/test_docs.py`. A key without a default
has to be given if its section is. Times are in seconds.
"""


def yaml_blocks() -> list[Any]:
    found = []
    for document in DOCUMENTS:
        for match in re.finditer(r"^```yaml\n(.*?)^```$", document.read_text(), re.DOTALL | re.MULTILINE):
            line = document.read_text()[: match.start()].count("\n") + 1
            found.append(pytest.param(match[1], id=f"{document.relative_to(ROOT)}:{line}"))
    return found


@pytest.mark.parametrize("text", yaml_blocks())
def test_an_example_loads(text: str, tmp_path: Path) -> None:
    """Whole jobs (with `model:`) as the trainer's, others as a part; of several lines for one key, each alone."""
    keys = re.findall(r"^(\w+):", text, re.MULTILINE)
    jobs = [text] if len(set(keys)) == len(keys) else [line for line in text.splitlines() if line]
    for job in jobs:
        file = tmp_path / "job.yaml"
        file.write_text(job)
        if text.startswith(WRONG):
            with pytest.raises(ConfigError):
                load_job(file)
        else:
            load_job(file, for_trainer="model" in keys and "train" in keys)


def test_the_mistakes_of_the_wrong_job_are_those_in_the_document(tmp_path: Path, monkeypatch: Any) -> None:
    document = (ROOT / "docs" / "training.md").read_text()
    job = re.search(rf"^```yaml\n({WRONG}.*?)^```$", document, re.DOTALL | re.MULTILINE)
    assert job
    monkeypatch.chdir(tmp_path)
    Path("wrong.yaml").write_text(job[1])
    with pytest.raises(ConfigError) as error:
        load_job(Path("wrong.yaml"))
    said = [line.removeprefix("    dstrain: ") for line in document.splitlines() if "dstrain: wrong.yaml:" in line]
    assert str(error.value).splitlines() == said


def anchor(heading: str) -> str:
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if re.match(r"https?:", target):
            continue
        name, _, fragment = target.partition("#")
        path = document.parent / name if name else document
        assert path.exists(), f"{document.name}: {target}"
        if fragment:
            headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
            assert fragment in {anchor(heading) for heading in headings}, f"{document.name}: {target}"


def test_the_reference_is_the_configuration() -> None:
    if os.environ.get("DSTRAIN_WRITE_REFERENCE"):
        REFERENCE.write_text(reference())
    assert REFERENCE.read_text() == reference(), "DSTRAIN_WRITE_REFERENCE=1 pytest tests/test_docs.py writes it anew"


def test_the_contracts_list_every_section() -> None:
    contracts = (ROOT / "docs" / "contracts.md").read_text()
    for field, info in JobConfig.model_fields.items():
        assert f"`{info.alias or field}`" in contracts


# --- the reference ---------------------------------------------------------------------------------------------


def reference() -> str:
    schema = JobConfig.model_json_schema()
    return "\n".join([PREFACE, *_sections(schema, "", schema["$defs"])])


def _sections(schema: dict[str, Any], path: str, defs: dict[str, Any]) -> Iterator[str]:
    """One heading and table for each section, those inside behind it."""
    inner = {name: section for name, field in schema["properties"].items() if (section := _section(field, defs))}
    yield f"## {path or 'The job'}\n" + (f"\n{_plain(schema['description'])}\n" if path else "")
    yield "| key | type | default | |\n|---|---|---|---|"
    for name, field in schema["properties"].items():
        if name in inner:
            link = anchor(_join(path, name))
            about = field.get("description") or inner[name]["description"]
            yield f"| [`{name}`](#{link}) | {_kind(field)} | | {_plain(about)} |"
        else:
            yield f"| `{name}` | {_type(field)} | {_default(field)} | {_plain(field['description'])} |"
    yield ""
    for name, section in inner.items():
        yield from _sections(section, _join(path, name), defs)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _section(field: dict[str, Any], defs: dict[str, Any]) -> dict[str, Any] | None:
    """The section that a key holds, one or a list of them."""
    for form in [field, field.get("items", {}), *field.get("anyOf", [])]:
        if "$ref" in form:
            section: dict[str, Any] = defs[form["$ref"].rpartition("/")[2]]
            return section
    return None


def _kind(field: dict[str, Any]) -> str:
    return "list of sections" if field.get("type") == "array" else "section"


def _default(field: dict[str, Any]) -> str:
    if field.get("type") == "object":
        return "`{}`"
    return f"`{json.dumps(field['default'], ensure_ascii=False)}`" if "default" in field else ""


def _type(field: dict[str, Any]) -> str:
    forms = [form for form in field.get("anyOf", [field]) if form.get("type") != "null"]
    return " or ".join(dict.fromkeys(_form(form) for form in forms))


def _form(form: dict[str, Any]) -> str:
    if "enum" in form or "const" in form:
        return ", ".join(f"`{value}`" for value in form.get("enum", [form.get("const")]))
    if form["type"] == "array":
        if "prefixItems" in form:
            return " and ".join(_form(item) for item in form["prefixItems"])
        return f"list of {_form(form['items'])}"
    names = {"integer": "integer", "number": "number", "string": "text", "boolean": "true, false", "object": "mapping"}
    name = "path" if form.get("format") == "path" else names[form["type"]]
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    return " ".join([name, *(f"{sign} {form[key]:.15g}" for key, sign in signs.items() if key in form)])


def _plain(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def test_the_reference_shows_every_default() -> None:
    """What the table says is what a job gets, read back."""
    text = REFERENCE.read_text()
    assert "| `global` | integer ≥ 1 |  | Samples of one optimizer step, over all ranks. |" in text
    for key, value in yaml.safe_load("{clip: 1.0, eval_samples: 256, every: 10, keep_last: 2}").items():
        assert re.search(rf"\| `{key}` \| [^|]+ \| `{value}` \|", text)
