"""What a host entry may say: the strict grammar of names and of each `key=value`.

Names are hostile until parsed: what passes here reaches ssh's argv, so no word may start with `-`, and no
shell metacharacter, control character or non-ASCII look-alike gets through. Every reader returns the value or
raises `Problem`: what was expected, what was found, and the fix; the caller knows file and line.

    name    labels of letters, digits, `-`, `_`, joined by `.`, at most 253 in all, 63 a label; or an address
    slots   1 to 4096          port   1 to 65535          gpus   numbers 0 to 4095, comma-separated, each once
    user    letters, digits, `.`, `_`, `-`, at most 64    transport   local or ssh
    python, key    an absolute path, or one from ~/, of letters, digits and `. _ + @ , = - /`; no spaces
    spare   true or false; the word alone is true
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NoReturn

Transport = Literal["local", "ssh"]

MAX_NAME_LENGTH = 253
MAX_LABEL_LENGTH = 63
MAX_USER_LENGTH = 64
MAX_PATH_LENGTH = 1024
MAX_SLOTS = 4096
MAX_PORT = 65535

_LABEL = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_-]*[A-Za-z0-9_])?")
_NAME_CHARACTER = re.compile(r"[A-Za-z0-9._-]")
_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_PATH = re.compile(r"(?:~/|/)[A-Za-z0-9._+@,=/-]+")
_DIGITS = re.compile(r"[0-9]+")
_NUMERIC_LABEL = re.compile(r"[0-9]+|0[xX][0-9A-Fa-f]*")  # libc reads a name that ends in one as an address


_FIX_FOR_CHARACTER = {
    "@": "write `host user=NAME`",
    ":": "write `host slots=N` or `host port=P`; an IPv6 address goes in brackets",
    "=": "the host's name comes first, then key=value",
    "#": "put a space before the comment",
    ",": "one host a line; a range is gpu[1,3-4]",
    "[": "a range is gpu[1-4]",
    "]": "a range is gpu[1-4]",
}


class Problem(Exception):
    """One thing that is wrong in a word. `offset` counts characters from the start of that word."""

    def __init__(self, expected: str, found: str, fix: str, offset: int = 0) -> None:
        super().__init__(expected, found, fix, offset)
        self.expected, self.found, self.fix, self.offset = expected, found, fix, offset

    def shifted(self, offset: int) -> Problem:
        """The same problem, seen from a word that starts `offset` characters earlier."""
        return Problem(self.expected, self.found, self.fix, self.offset + offset)


class Conflict(Problem):
    """Options of one entry that contradict each other; `key` is the one to point at."""

    def __init__(self, key: str, expected: str, found: str, fix: str) -> None:
        super().__init__(expected, found, fix)
        self.key = key


@dataclass(frozen=True)
class Host:
    """One machine that ranks can run on. Every field has passed the strict grammar of this module.

    name: as the user wrote it (an IPv6 address without brackets); ssh_config aliases are names too.
    slots: how many ranks it takes; None means that the agent there counts the GPUs.
    user, port, key, python: for the login; None leaves it to ssh_config or to the default. `~/` is the head's
        home in `key` and the host's in `python`.
    addr: the name or address to dial instead of `name`.
    gpus: the GPU numbers to use, in the order of the local ranks; None means all.
    transport: `local` starts processes directly, `ssh` through SSH.
    spare: waits, connected, until another host is lost; see --max-restarts.
    """

    name: str
    slots: int | None = None
    user: str | None = None
    port: int | None = None
    addr: str | None = None
    python: str | None = None
    key: str | None = None
    gpus: tuple[int, ...] | None = None
    transport: Transport = "ssh"
    spare: bool = False

    @property
    def address(self) -> str:
        """What to dial: `addr` where given, else the name."""
        return self.addr or self.name

    @property
    def written_name(self) -> str:
        """The name as hostfiles and options write it: an IPv6 address in brackets."""
        return f"[{self.name}]" if ":" in self.name else self.name


def quoted(text: str) -> str:
    """`text` for a message: short, ASCII, nothing in it that a terminal would obey."""
    return ascii(text if len(text) <= 60 else text[:57] + "...")


def nearest(word: str, known: tuple[str, ...]) -> str | None:
    """The known word that `word` most likely meant."""
    from difflib import get_close_matches  # only an error needs it

    return next(iter(get_close_matches(word.lower().replace("-", "_"), known, n=1, cutoff=0.5)), None)


def parse_name(text: str) -> str:
    """A host's name, an IPv4 address, or an IPv6 address in brackets (returned without them, shortened)."""
    if text.startswith("["):
        return _parse_bracketed(text)
    check_characters(text)
    if len(text) > MAX_NAME_LENGTH:
        raise Problem(f"a host name of at most {MAX_NAME_LENGTH} characters", f"{len(text)}", "shorten it")
    labels = text.split(".")
    offset = 0
    for label in labels:
        _check_label(label, text, offset)
        offset += len(label) + 1
    if _NUMERIC_LABEL.fullmatch(labels[-1]):
        _check_ipv4(text)
    return text


def check_characters(text: str) -> None:
    """Raise Problem for what no name may contain or start with."""
    if text.startswith("-"):
        fix = "a name starts with a letter or a digit (ssh would take this for an option)"
        raise Problem("a host name", quoted(text), fix)
    for offset, character in enumerate(text):
        if not _NAME_CHARACTER.fullmatch(character):
            fix = _FIX_FOR_CHARACTER.get(character, "use letters, digits, '.', '_' and '-' only")
            raise Problem("a host name", f"{quoted(character)} in {quoted(text)}", fix, offset)


def _check_label(label: str, text: str, offset: int) -> None:
    if not label:
        raise Problem("a host name", f"an empty part in {quoted(text)}", "put one '.' between two parts", offset)
    if len(label) > MAX_LABEL_LENGTH:
        expected = f"at most {MAX_LABEL_LENGTH} characters between two dots"
        raise Problem(expected, f"{len(label)}", "shorten the name", offset)
    if not _LABEL.fullmatch(label):
        fix = "each part starts with a letter or a digit and ends with one or with '_'"
        raise Problem("a host name", quoted(text), fix, offset)


def _check_ipv4(text: str) -> None:
    from ipaddress import IPv4Address  # only addresses need it

    try:
        IPv4Address(text)
    except ValueError:
        fix = "write all four numbers in decimal, 0 to 255, without leading zeros"
        raise Problem("an IPv4 address or a name that does not end in a number", quoted(text), fix) from None


def _parse_bracketed(text: str) -> str:
    from ipaddress import IPv6Address

    fix = "write it like [fd00::1], without a zone"
    if not text.endswith("]") or "%" in text:
        raise Problem("an IPv6 address in brackets", quoted(text), fix)
    try:
        return str(IPv6Address(text[1:-1]))
    except ValueError:
        raise Problem("an IPv6 address in brackets", quoted(text), fix) from None


def parse_number(text: str, what: str, low: int, high: int) -> int:
    """A decimal number between `low` and `high`, both included. `what` names it in the message."""
    expected = f"{what} from {low} to {high}"
    digits = _DIGITS.match(text)
    if digits is None:
        raise Problem(expected, quoted(text), "write a decimal number")
    if digits.end() < len(text):
        fix = f"remove {quoted(text[digits.end() :])}"
        raise Problem(expected, quoted(text), fix, digits.end())
    if len(text) > 12 or not low <= int(text) <= high:
        raise Problem(expected, quoted(text), f"write a number from {low} to {high}")
    return int(text)


def _parse_slots(text: str) -> int:
    if text == "auto":
        raise Problem("slots from 1", quoted(text), "leave slots out, and the host's GPUs are counted")
    if _DIGITS.fullmatch(text) and not text.strip("0"):
        fix = "remove the line (or use --exclude) to leave the host out; leave slots out to count its GPUs"
        raise Problem("slots from 1", quoted(text), fix)
    return parse_number(text, "slots", 1, MAX_SLOTS)


def _parse_user(text: str) -> str:
    if not _USER.fullmatch(text) or len(text) > MAX_USER_LENGTH:
        fix = f"use letters, digits, '.', '_', '-', at most {MAX_USER_LENGTH}; ssh_config can set any other"
        raise Problem("a user name", quoted(text), fix)
    return text


def _parse_port(text: str) -> int:
    return parse_number(text, "a port", 1, MAX_PORT)


def _parse_addr(text: str) -> str:
    return parse_name(f"[{text}]" if ":" in text and not text.startswith("[") else text)


def _parse_path(text: str) -> str:
    if not _PATH.fullmatch(text) or len(text) > MAX_PATH_LENGTH:
        fix = "start with / or ~/; letters, digits and . _ + @ , = - / are allowed, at most 1024; no spaces"
        raise Problem("a path", quoted(text), fix)
    return text


def _parse_gpus(text: str) -> tuple[int, ...]:
    numbers: list[int] = []
    offset = 0
    for part in text.split(","):
        try:
            number = parse_number(part, "GPU numbers", 0, MAX_SLOTS - 1)
        except Problem as problem:
            raise problem.shifted(offset) from None
        if number in numbers:
            raise Problem("each GPU once", f"{number} again", "remove one of the two", offset)
        numbers.append(number)
        offset += len(part) + 1
    return tuple(numbers)


def _parse_transport(text: str) -> Transport:
    if text == "local":
        return "local"
    if text == "ssh":
        return "ssh"
    raise Problem("local or ssh", quoted(text), "write transport=local or transport=ssh")


def _parse_spare(text: str) -> bool:
    if text in ("true", "false"):
        return text == "true"
    raise Problem("true or false", quoted(text), "write spare alone, or leave it out")


_READERS: dict[str, Callable[[str], object]] = {
    "slots": _parse_slots,
    "user": _parse_user,
    "port": _parse_port,
    "addr": _parse_addr,
    "python": _parse_path,
    "key": _parse_path,
    "gpus": _parse_gpus,
    "transport": _parse_transport,
    "spare": _parse_spare,
}
KEYS = tuple(_READERS)
FLAGS = ("spare",)  # a word alone means true


def split_option(text: str) -> tuple[str, str]:
    """`key=value`, or a flag alone, as (key, value). Raises Problem for an unknown key, with the nearest known one."""
    key, equals, value = text.partition("=")
    if not equals and key in FLAGS:
        return key, "true"
    if not equals:
        _refuse_bare_word(text)
    if key not in _READERS:
        close = nearest(key, KEYS)
        known = f"known keys: {', '.join(KEYS)}"
        raise Problem("a known key", quoted(key), f"did you mean {close}=? {known}" if close else known)
    return key, value


def _refuse_bare_word(text: str) -> NoReturn:
    fix = "one host a line, then key=value"
    if _DIGITS.fullmatch(text):
        fix = f"write slots={text}" if len(text) < 5 else fix
    elif text in KEYS:
        fix = f"write {text}=VALUE without spaces around '='"
    raise Problem("key=value", quoted(text), fix)


def read_option(host: Host, key: str, value: str) -> Host:
    """`host` with one option more. Raises Problem; its offset is inside `value`."""
    if not value:
        raise Problem(f"a value for {key}=", "nothing", f"write one, or remove {key}=")
    # The key names a field of Host, and its reader returns that field's type.
    return replace(host, **{key: _READERS[key](value)})  # type: ignore[arg-type]


def settle(host: Host, transport_given: bool) -> Host:
    """Check the options of one entry together and fill in what follows from them.

    GPUs that are listed count as slots. A plain `localhost`, with no sign of a login, is this machine.
    Raises Conflict.
    """
    if host.gpus is not None:
        if host.slots not in (None, len(host.gpus)):
            fix = "make the two agree, or leave slots out"
            raise Conflict("slots", f"slots={len(host.gpus)}, one for each of gpus=", f"slots={host.slots}", fix)
        host = replace(host, slots=len(host.gpus))
    login = {"user": host.user, "port": host.port, "addr": host.addr, "key": host.key}
    given = [key for key, value in login.items() if value is not None]
    if not transport_given:
        plain = host.name.lower() == "localhost" and not given
        return replace(host, transport="local" if plain else "ssh")
    if host.transport == "local" and given:
        fix = f"remove {given[0]}= or transport=local"
        raise Conflict(given[0], "no login for transport=local", f"{given[0]}=", fix)
    return host
