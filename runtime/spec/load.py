"""Reads a job.yaml strictly: every mistake in one go, with its place, what was expected and what found."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from dstrain.runtime.spec.config import JobConfig, what_a_trainer_lacks
from dstrain.runtime.spec.document import Document, KeyPath, Place, show
from dstrain.runtime.spec.errors import ConfigError
from dstrain.runtime.spec.section import Contradictions


def load_job(path: Path, overrides: Sequence[str] = (), *, for_trainer: bool = True) -> JobConfig:
    """The job in the file `path`, with `overrides` (each `key.path=value`, the value as YAML) put over it.

    for_trainer: it must have what our trainer needs; the job of a user's own script may leave out what it likes.
    Raises ConfigError, a line per mistake: `file:line:column: key.path: expected …, found …; did you mean …`.
    An override's place is `--set …`. Rules between keys are looked at once every key alone is right.
    """
    document = Document(str(path))
    try:
        document.read(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: expected a readable job file, found: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: expected text in UTF-8, found byte {error.start} that is not") from None
    if document.problems and document.values is None:
        raise ConfigError(str(document.problems[0]))
    for override in overrides:
        document.override(override)
    job = _validated(document)
    for lack in what_a_trainer_lacks(job) if job and for_trainer else ():
        document.report(lack.key, f"expected {lack.expected}, found {lack.found}")
    if document.problems or job is None:
        raise ConfigError("\n".join(str(problem) for problem in sorted(document.problems)))
    return job


def job_of(values: Mapping[str, Any], name: str = "config") -> JobConfig:
    """The job of a mapping with the keys of a job.yaml, such as a script's own. Raises ConfigError as `load_job`."""
    document = Document(name, dict(values), {(): Place(1, 1, name)})
    job = _validated(document)
    if job is None:
        raise ConfigError("\n".join(str(problem) for problem in sorted(document.problems)))
    return job


def load_resolved(path: Path) -> JobConfig:
    """The job that a launcher has resolved and stored: `JobConfig.model_dump_json(by_alias=True)`."""
    try:
        return JobConfig.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: expected the resolved job, found: {error.strerror}") from None
    except ValidationError as error:
        raise ConfigError(f"{path}: expected a job resolved by this version of dstrain, found {error}") from None


def _validated(document: Document) -> JobConfig | None:
    """The job, or None with every mistake noted in the document."""
    if not isinstance(document.values, dict):
        if not document.problems:
            document.report((), f"expected the sections of a job, found {show(document.values)}")
        return None
    try:
        return JobConfig.model_validate_json(json.dumps(document.values, default=str))
    except ValidationError as error:
        for path, message in _messages(error.errors(), document.values):
            document.report(path, message)
        return None


def _messages(errors: Sequence[ErrorDetails], values: Mapping[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    """Our messages for pydantic's, which has several for a key that may be this or that: we have one.

    Where one of the alternatives came as far as to a key or item inside, its mistake there is told, not the others'.
    """
    alternatives: dict[KeyPath, tuple[list[str], str]] = {}
    unknown: list[KeyPath] = []
    for error in errors:
        path, found = _locate(error, values)
        cause = error.get("ctx", {}).get("error")
        if isinstance(cause, Contradictions):
            yield from ((clash.key, f"expected {clash.expected}, found {clash.found}") for clash in cause.found)
        elif error["type"] == "extra_forbidden":
            unknown.append(path)
            yield path, _unknown_key(path)
        else:
            alternatives.setdefault(path, ([], found))[0].append(_expected(error))
    for path, (expected, found) in alternatives.items():
        if not any(path == deeper[: len(path)] for deeper in (*alternatives, *unknown) if len(deeper) > len(path)):
            yield path, f"expected {' or '.join(dict.fromkeys(expected))}, found {found}"


def _locate(error: ErrorDetails, values: Mapping[str, Any]) -> tuple[KeyPath, str]:
    """The error's key, and its value as a message names it.

    pydantic's `loc` has, between the keys, the name of the alternative that it tried; those are no keys.
    """
    path: KeyPath = ()
    value: Any = values
    for part in error["loc"]:
        if part in (value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()):
            path, value = (*path, part), value[part]
    match error["type"]:
        case "missing":
            return (*path, error["loc"][-1]), "none"
        case "too_long" | "too_short":
            return path, str(error["ctx"]["actual_length"])
        case "literal_error" if isinstance(value, str):
            close = difflib.get_close_matches(value, re.findall("'([^']*)'", error["ctx"]["expected"]), n=1)
            return path, show(value) + (f"; did you mean {close[0]}?" if close else "")
        case _:
            return path, show(value)


def _unknown_key(path: KeyPath) -> str:
    section: type[BaseModel] = JobConfig
    for part in path[:-1]:
        if isinstance(part, str):
            section = next(_section_in(info.annotation) for name, info in _fields(section) if name == part)
    known = [name for name, _ in _fields(section)]
    close = difflib.get_close_matches(str(path[-1]), known, n=1)
    return f"expected one of {', '.join(known)}, found an unknown key" + (
        f"; did you mean {close[0]}?" if close else ""
    )


def _section_in(annotation: Any) -> type[BaseModel]:
    """The section in `Section | None` or `tuple[Section, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(_section_in(inner) for inner in get_args(annotation) if inner not in (type(None), ...))


def _expected(error: ErrorDetails) -> str:
    """What pydantic's error expected, in words."""
    limits = error.get("ctx", {})
    match error["type"]:
        case "missing":
            return "a value"
        case "int_type" | "int_parsing" | "int_from_float":
            return "an integer"
        case "float_type" | "float_parsing" | "finite_number":
            return "a finite number"
        case "bool_type" | "bool_parsing":
            return "true or false"
        case "string_type" | "path_type":
            return "text (numbers as text stand in quotes)"
        case "string_too_short":
            return "a text that is not empty"
        case "tuple_type" | "list_type":
            return "a list"
        case "too_short":
            return f"at least {limits['min_length']} item{'' if limits['min_length'] == 1 else 's'}"
        case "too_long":
            return f"{limits['max_length']} items"
        case "model_type" | "dict_type" | "model_attributes_type":
            return "a section of keys"
        case "string_pattern_mismatch":
            return "package.module:name"
        case "literal_error":
            return str(limits["expected"])
        case "greater_than":
            return f"more than {limits['gt']:.15g}"
        case "greater_than_equal":
            return f"at least {limits['ge']:.15g}"
        case "less_than":
            return f"less than {limits['lt']:.15g}"
        case "less_than_equal":
            return f"at most {limits['le']:.15g}"
        case _:
            return error["msg"]


def _fields(section: type[BaseModel]) -> Iterator[tuple[str, Any]]:
    """The fields of a section by the names that a file gives them."""
    return ((info.alias or name, info) for name, info in section.model_fields.items())
