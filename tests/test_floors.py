"""The floors: who may import whom. One walk over all imports, and what a wheel really holds."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PLAIN_SPEC = {"errors", "event", "exit_codes", "file_frames", "frames", "linux"}  # for agent and warden: no pydantic
PLAIN_CHECKPOINT = {  # for `dstrain ckpt`: no torch
    *("manifest", "parts", "verify", "assembly", "casts", "export", "transformers_layout", "commit"),
    *("foreign", "foreign_safetensors"),
}
PLAIN_RUNTIME = {  # for `dstrain plan`: pure, no torch
    *("dstrain.runtime.pipeline.holding", "dstrain.runtime.pipeline.partition"),
    *("dstrain.runtime.zero.groups", "dstrain.runtime.zero.plan"),
}
FOREIGN_TORCH = {"foreign_torch", "foreign_deepspeed"}  # for `dstrain ckpt import` alone
STANDARD = set(sys.stdlib_module_names)


def files(folder: str) -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / name for name in listed.stdout.split() if name.startswith(f"{folder}/")]


def imports(path: Path) -> Iterator[str]:
    """Dotted names that a module imports, those inside functions too, but not those for type checkers only."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for statement in block.body
        for node in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{name.name}" for name in node.names)


ALL = files("launcher") + files("runtime")


@pytest.mark.parametrize("path", ALL, ids=lambda path: str(path.relative_to(ROOT)))
def test_floor(path: Path) -> None:
    room = path.relative_to(ROOT).as_posix()
    for name in imports(path):
        top = name.split(".")[0]
        assert top not in ("launcher", "runtime"), f"{room}: a second identity of {name}"
        if room.startswith("launcher/"):
            assert top != "torch", f"{room}: the launcher never imports torch"
            if name.startswith("dstrain.runtime.checkpoint."):
                allowed = PLAIN_CHECKPOINT | (FOREIGN_TORCH if room == "launcher/cli/ckpt.py" else set())
                assert {*name.split(".")[3:4]} <= allowed, f"{room}: {name}"
            elif name.startswith("dstrain.runtime.") and name.rpartition(".")[0] in PLAIN_RUNTIME:
                assert room.startswith("launcher/planning/"), f"{room}: {name}"
            elif name.startswith("dstrain.runtime."):
                assert name.startswith("dstrain.runtime.spec."), f"{room}: {name}"
            if top == "paramiko":
                assert room.startswith("launcher/transport/"), f"{room}: paramiko"
            if top in ("plotly", "numpy"):
                assert room.startswith("launcher/report/"), f"{room}: {top}"
        else:
            assert not name.startswith("dstrain.launcher"), f"{room}: the runtime knows no launcher"
        if room.startswith("launcher/agent/") or room.removeprefix("runtime/spec/").removesuffix(".py") in PLAIN_SPEC:
            ours = name.startswith("dstrain.launcher.agent") or (
                name.startswith("dstrain.runtime.spec") and {*name.split(".")[3:4]} <= PLAIN_SPEC
            )
            assert ours or top in STANDARD, f"{room}: {name} is not on a bare Python"
        elif room.startswith("runtime/spec/"):
            assert top in STANDARD | {"pydantic", "pydantic_core", "yaml", "dstrain"}, f"{room}: {name}"
        elif room.removeprefix("runtime/checkpoint/").removesuffix(".py") in PLAIN_CHECKPOINT:
            ours = {*name.split(".")[3:4]} <= PLAIN_CHECKPOINT or name.startswith("dstrain.runtime.spec.")
            assert (top == "dstrain" and ours) or top in STANDARD | {"numpy"}, f"{room}: {name} is not without torch"
        if f"dstrain.{room.removesuffix('.py').replace('/', '.')}" in PLAIN_RUNTIME:
            assert top in STANDARD or name.startswith("dstrain.runtime.spec."), f"{room}: {name} is not without torch"
        if name.startswith("torch.distributed"):
            rooms = ("comm", "comm_edge", "comm_group", "last_words", "zygote")  # the last two: only a store
            assert room in {f"runtime/{each}.py" for each in rooms}, f"{room}: torch.distributed"


def modules_after(statement: str, *options: str) -> set[str]:
    code = f"import sys; {statement}; print(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_command_line_imports_neither_torch_nor_paramiko() -> None:
    loaded = modules_after("import dstrain.launcher.cli")
    assert not loaded & {"torch", "paramiko", "pydantic", "ClusterShell", "numpy", "rich", "plotly", "yaml"}


def test_commands_of_checkpoints_import_no_torch() -> None:
    loaded = modules_after(
        "import dstrain.launcher.checkpoint_views, dstrain.launcher.cli.ckpt, dstrain.runtime.checkpoint.export"
    )
    assert not loaded & {"torch", "pydantic", "rich"}


def test_plans_import_no_torch() -> None:
    assert not modules_after("import dstrain.launcher.planning.command") & {"torch", "paramiko", "numpy", "rich"}


def test_spec_pulls_in_no_torch() -> None:
    assert "torch" not in modules_after("import dstrain.runtime.spec.load, dstrain.runtime")


def test_warden_and_agent_start_on_a_bare_python(tmp_path: Path) -> None:
    (tmp_path / "dstrain").mkdir()
    for name in ("launcher", "runtime"):
        (tmp_path / "dstrain" / name).symlink_to(ROOT / name)
    rooms = "dstrain.launcher.agent.agent, dstrain.launcher.agent.warden"
    statement = f"sys.path.insert(0, {str(tmp_path)!r}); import {rooms}"
    loaded = modules_after(statement, "-I", "-S")
    assert not {name.split(".")[0] for name in loaded} - STANDARD - {"dstrain", "__main__", "_distutils_hack"}


def test_wheel_has_all_of_gits_files(tmp_path: Path) -> None:
    command = [
        sys.executable,
        *["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w"],
        str(tmp_path),
    ]
    source = tmp_path / "source"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(source)], check=True)
    subprocess.run([*command, str(source)], check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        held = {name for name in wheel.namelist() if name.startswith("dstrain/")}
    command = ["git", "ls-files", "launcher", "runtime"]
    listed = subprocess.run(command, cwd=source, capture_output=True, text=True, check=True)
    assert held == {f"dstrain/{name}" for name in listed.stdout.split()}
