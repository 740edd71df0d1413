"""Objects that a configuration names."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path

import pytest

from dstrain.runtime.imports import call_object, load_object, optional_module
from dstrain.runtime.spec.errors import UsageError


def test_a_name_of_an_installed_module() -> None:
    assert load_object("math:hypot", "model.factory") is math.hypot


def test_a_module_of_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "of_the_user.py").write_text("def make(width, depth=1):\n    return width * depth\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    assert call_object("of_the_user:make", {"width": 3, "depth": 2}, "model.factory") == 6
    assert sys.path.count(str(tmp_path)) == 1
    with pytest.raises(
        UsageError, match=r"model\.args: expected arguments of of_the_user:make\(width, depth=1\), found wide"
    ):
        call_object("of_the_user:make", {"wide": 3}, "model.factory")


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("no_such_module:x", "No module named 'no_such_module'"),
        ("math:hypott", "math has no 'hypott', did you mean 'hypot'?"),
        ("math.no:x", "No module named 'math.no'; 'math' is not a package"),
    ],
)
def test_what_cannot_be_imported_is_named_with_its_key(path: str, reason: str) -> None:
    line = f"data.factory: expected package.module:name that can be imported, found {path!r} ({reason})"
    with pytest.raises(UsageError, match=re.escape(line)):
        load_object(path, "data.factory")


def test_a_bug_in_the_users_module_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "with_a_bug.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ZeroDivisionError):
        load_object("with_a_bug:make", "model.factory")


def test_what_cannot_be_called() -> None:
    with pytest.raises(UsageError, match=r"model\.factory: expected a function or class, found 'math:pi' \(float\)"):
        call_object("math:pi", {}, "model.factory")


def test_a_package_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"model\.hf: expected the package absent_package, .*'dstrain\[hf\]'"):
        optional_module("absent_package.part", "model.hf", "hf")
    (tmp_path / "broken_package.py").write_text("import absent_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="absent_dependency"):
        optional_module("broken_package", "model.hf", "hf")
