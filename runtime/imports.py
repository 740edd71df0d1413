"""Objects that a configuration names as `package.module:name`, and packages that not everybody has."""

from __future__ import annotations

import difflib
import inspect
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from dstrain.runtime.spec.errors import UsageError


def load_object(path: str, key: str) -> Any:
    """The object that `path`, "package.module:name", stands for.

    key: the configuration's key that holds `path`, for the message. Modules of the working directory can be
    imported, as under `python -m`. Raises UsageError when the module or the name is not there; what a module
    raises while it is imported is its author's bug and comes out with its traceback, a failed import excepted.
    """
    module_name, _, name = path.partition(":")
    if (here := str(Path.cwd())) not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        module = import_module(module_name)
    except ImportError as error:
        raise _cannot_import(path, key, str(error)) from error
    if name not in vars(module):
        near = difflib.get_close_matches(name, list(vars(module)), n=1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise _cannot_import(path, key, f"{module_name} has no {name!r}{hint}")
    return vars(module)[name]


def call_object(path: str, arguments: Mapping[str, Any], key: str) -> Any:
    """What the function or class `path` returns for the keyword `arguments`.

    key: of `path`; the arguments stand beside it as `args`. Raises UsageError when the arguments do not fit.
    """
    function = load_object(path, key)
    if not callable(function):
        raise UsageError.mismatch(key, "a function or class", f"{path!r} ({type(function).__name__})")
    try:
        signature = inspect.signature(function)
    except ValueError:  # some functions in C tell no signature: they check their arguments themselves
        return function(**arguments)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        args_key = f"{key.rpartition('.')[0]}.args"
        given = ", ".join(arguments) or "none"
        raise UsageError.mismatch(args_key, f"arguments of {path}{signature}", f"{given} ({error})") from None
    return function(**arguments)


def optional_module(name: str, key: str, extra: str) -> ModuleType:
    """The module `name`, which only the users of `key` need. Raises UsageError with the command that installs it."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != name.partition(".")[0]:
            raise  # a dependency of that package
        package = f"pip install 'dstrain[{extra}]' on every host"
        raise UsageError.mismatch(key, f"the package {error.name}", "it is not installed", package) from None


def _cannot_import(path: str, key: str, reason: str) -> UsageError:
    expected = "package.module:name that can be imported"
    fix = f"modules are looked for in {Path.cwd()} and among the installed packages"
    return UsageError.mismatch(key, expected, f"{path!r} ({reason})", fix)
