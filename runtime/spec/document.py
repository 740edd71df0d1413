"""YAML as plain values, with the place of every key: what the strict loader reads from.

The YAML is that of version 1.2's core schema, which holds no surprises: `1e-3` is a number, `no` is text,
`010` is ten, a date is text. A key that stands twice is an error, and so are aliases: one value, one place.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import yaml

KeyPath = tuple[str | int, ...]


def show(value: Any) -> str:
    """A value as a message names it: short, and not to be mistaken for another type."""
    match value:
        case None:
            return "nothing"
        case dict():
            return "a section"
        case list():
            return "a list"
        case bool():
            return str(value).lower()
        case str():
            text = repr(value)
            return text if len(text) <= 40 else f"{text[:37]}…'"
        case _:
            return str(value)


class Place(NamedTuple):
    """Where a key stands. Overrides come behind the file: their line is beyond every file's."""

    line: int
    column: int
    text: str


@dataclass(order=True)
class Problem:
    place: Place
    key: str
    message: str

    def __str__(self) -> str:
        return f"{self.place.text}: " + (f"{self.key}: " if self.key else "") + self.message


class _CoreLoader(yaml.SafeLoader):
    """Resolves plain scalars by YAML 1.2's core schema (section 10.3.2)."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML's own form)


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", [*"~nN", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", [*"-+0123456789"]),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", [*"-+.0123456789"]),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", [*"-+."]),
):
    _CoreLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), _first)


class _CoreDumper(yaml.SafeDumper):
    """Quotes every text that 1.1 or 1.2 would read as something else, and writes each value where it stands."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML's own form)
        first: [*yaml.SafeDumper.yaml_implicit_resolvers.get(first, ()), *ours]
        for first, ours in {
            **dict.fromkeys(yaml.SafeDumper.yaml_implicit_resolvers, ()),
            **_CoreLoader.yaml_implicit_resolvers,
        }.items()
    }

    def ignore_aliases(self, data: Any) -> bool:
        return True


_ODD_LINE_END = re.compile("[\x85\u2028\u2029\ufeff]")


def _list_node(dumper: _CoreDumper, items: list[Any]) -> yaml.Node:
    """A list of plain values stands in one line."""
    plain = not any(isinstance(item, dict | list) for item in items)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=plain)


def _text_node(dumper: _CoreDumper, text: str) -> yaml.Node:
    """Line ends that are no newline must be escaped: PyYAML writes them into plain text as they are."""
    style = '"' if _ODD_LINE_END.search(text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_CoreDumper.add_representer(list, _list_node)
_CoreDumper.add_representer(str, _text_node)


def to_yaml(values: Any) -> str:
    """Plain values as text that `Document.read` reads back as the same."""
    return yaml.dump(values, Dumper=_CoreDumper, sort_keys=False, allow_unicode=True, width=110)


def _scalar(node: yaml.ScalarNode) -> str | int | float | bool | None:
    text = node.value
    match node.tag.rpartition(":")[2]:
        case "null":
            return None
        case "bool":
            return bool(text.lower() == "true")
        case "int":
            return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
        case "float":
            return float(re.sub(r"\.(?=inf|nan)", "", text.lower()))
        case _:
            return str(text)


@dataclass
class Document:
    """The plain values of a file and its overrides, the place of each, and the mistakes seen so far."""

    name: str
    values: Any = None
    places: dict[KeyPath, Place] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def read(self, text: str) -> None:
        """Parse the file. A syntax error leaves no values and one problem."""
        self.places[()] = self._place_of(1, 1)
        node = self._compose(text, at=None)
        if node is not None:
            self.values = self._plain(node, (), at=None)

    def override(self, argument: str) -> None:
        """Put one `key.path=value` over the file's values."""
        at = Place(1 << 60, len(self.places), f"--set {argument}")
        dotted, equals, text = argument.partition("=")
        keys = dotted.split(".")
        if not equals or not all(keys):
            self.problems.append(Problem(at, "", "expected key.path=value"))
            return
        node = self._compose(text, at)
        if self.values is None:
            self.values = {}
        if not isinstance(self.values, dict):
            return  # said once, of the whole file
        inner = self.values
        for depth, key in enumerate(keys[:-1], start=1):
            if inner.get(key) is None:
                inner[key] = {}
                self.places[tuple(keys[:depth])] = at
            if not isinstance(inner[key], dict):
                self._problem(tuple(keys[:depth]), f"expected a section, found {show(inner[key])}", at)
                return
            inner = inner[key]
        path = tuple(keys)
        self.places = {known: place for known, place in self.places.items() if known[: len(path)] != path}
        self.places[path] = at
        inner[keys[-1]] = None if node is None else self._plain(node, path, at)

    def place(self, path: KeyPath) -> Place:
        """The place of the key, or of the nearest section around it that stands somewhere."""
        while path not in self.places:
            path = path[:-1]
        return self.places[path]

    def report(self, path: KeyPath, message: str) -> None:
        """Note a mistake of the key `path`."""
        self._problem(path, message, self.place(path))

    def _problem(self, path: KeyPath, message: str, at: Place) -> None:
        self.problems.append(Problem(at, ".".join(map(str, path)), message))

    def _place_of(self, line: int, column: int) -> Place:
        return Place(line, column, f"{self.name}:{line}:{column}")

    def _compose(self, text: str, at: Place | None) -> yaml.Node | None:
        try:
            for event in yaml.parse(text, _CoreLoader):
                if isinstance(event, yaml.AliasEvent):
                    mark = event.start_mark
                    raise yaml.MarkedYAMLError(None, None, f"the alias *{event.anchor}", mark)  # type: ignore[arg-type] # the stub names both marks
            node: yaml.Node | None = yaml.compose(text, _CoreLoader)
            return node
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark
            where = self._place_of(mark.line + 1, mark.column + 1) if mark else self.places[()]
            self._problem((), f"expected plain YAML, found {error.problem}", at or where)
        except yaml.YAMLError as error:
            self._problem((), f"expected plain YAML, found {str(error).splitlines()[0]}", at or self.places[()])
        return None

    def _plain(self, node: yaml.Node, path: KeyPath, at: Place | None) -> Any:
        """The node's plain value; notes the place of every key below it (or `at`, for an override)."""
        if isinstance(node, yaml.ScalarNode):
            try:
                return _scalar(node)
            except ValueError:
                self._problem(path, f"expected a value that its tag allows, found {show(node.value)}", self.place(path))
                return None
        if isinstance(node, yaml.SequenceNode):
            items = [(index, item, item) for index, item in enumerate(node.value)]
            return [self._child(path, *item, at) for item in items]
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value)
            if key in values:
                first = self.places[*path, key].line
                again = at or self._place_of(key_node.start_mark.line + 1, key_node.start_mark.column + 1)
                self._problem((*path, key), f"expected each key once, found it again (first in line {first})", again)
            values[key] = self._child(path, key, key_node, value_node, at)
        return values

    def _child(self, path: KeyPath, key: str | int, marked: yaml.Node, node: yaml.Node, at: Place | None) -> Any:
        inner = (*path, key)
        self.places[inner] = at or self._place_of(marked.start_mark.line + 1, marked.start_mark.column + 1)
        return self._plain(node, inner, at)
