"""Words of any bytes arrive as they are, and secrets go nowhere but into the job."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

import lab
from dstrain.launcher.request import read_env_file
from dstrain.runtime.spec.errors import UsageError

pytestmark = pytest.mark.lab

CHECK = """
import os, sys
with open(os.environb[b"RESULT"], "wb") as file:
    values = [os.environb[b"V%d" % number] for number in range(int(os.environ["VALUES"]))]
    file.write(b"\\0".join([*map(os.fsencode, sys.argv[1:]), *values]))
"""
HOSTILE = [
    b"",
    b" ",
    b"--",
    b"-",
    b"-H",
    b"--env",
    b"--no-python",
    b"-m",
    b"--hosts=a;b",
    b"$(touch canary)",
    b"`touch canary`",
    b"; touch canary #",
    b"'",
    b'"',
    b"\\",
    b"a'b\"c\\d",
    b"${HOME}",
    b"%s%n",
    b"!!",
    b"*",
    b"~",
    b"\n",
    b"\r\n",
    b"\x1b]0;title\x07",
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b"\xc3",
    "😀 ü\u2028\x85".encode(),
    b"x" * 131_000,
]


def random_words(seed: int, count: int) -> list[bytes]:
    """The hostile ones, then random ones: of all bytes, of the shell's, of Unicode."""
    generator = random.Random(seed)
    shell = b"$`'\"\\;&|<>(){}[]*?!~# \t\n=-%"
    every = bytes(range(1, 256))

    def word() -> bytes:
        length = generator.choice((1, 2, 5, 20, 80))
        kind = generator.randrange(3)
        if kind == 2:
            points = (generator.choice((generator.randrange(1, 0xD800), generator.randrange(0xE000, 0x110000)))
                      for _ in range(length // 2))  # fmt: skip
            return "".join(map(chr, points)).encode()
        return bytes(generator.choices((every, shell)[kind], k=length))

    return [*HOSTILE, *(word() for _ in range(count - len(HOSTILE)))]


@pytest.mark.parametrize("kind", ["preloaded", "program"])
def test_words_of_any_bytes_arrive_identical(light, start, script, tmp_path, kind):
    """10,000 arguments and 10,000 variables: half of them by --env NAME, half by --env-file."""
    arguments, values = random_words(1, 10_000), random_words(2, 10_000)
    assert set(b"".join(arguments)) == set(b"".join(values)) == set(range(1, 256))
    by_name = {f"V{n}": value for n, value in enumerate(values) if n % 2 or b"\n" in value or len(value) > 1000}
    by_file = {f"V{n}": value for n, value in enumerate(values) if f"V{n}" not in by_name}
    assert len(by_file) > 4000
    (tmp_path / "env").write_bytes(b"".join(f"{name}='".encode() + value + b"'\n" for name, value in by_file.items()))
    ours = [word for name in by_name for word in ("--env", name)]
    ours += ["--env-file", tmp_path / "env", "--env", f"RESULT={tmp_path}/result", "--env", f"VALUES={len(values)}"]
    target = [script(CHECK)] if kind == "preloaded" else ["--no-python", sys.executable, script(CHECK)]
    words = ["--hosts", "h1:1", *ours, *target, *map(os.fsdecode, arguments)]
    run = start(*words, env={**light.env, **{name: os.fsdecode(value) for name, value in by_name.items()}})
    assert run.wait(90) == 0, run.err
    result = (tmp_path / "result").read_bytes().split(b"\0")
    wrong = [n for n, (a, b) in enumerate(zip(result, [*arguments, *values], strict=True)) if a != b]
    assert not wrong, f"{len(wrong)} differ, the first is number {wrong[0]}"
    assert not list(tmp_path.rglob("canary"))
    shown = json.loads((run.directory / "plan.json").read_text())
    assert list(map(os.fsencode, shown["target"]["arguments"])) == [*map(os.fsencode, map(str, target[2:])), *arguments]


@pytest.mark.parametrize("kind", ["script", "program"])
def test_target_of_any_name(light, start, tmp_path, kind):
    folder = tmp_path / os.fsdecode(b"we ird'\"$(touch canary)\n\xff")
    folder.mkdir()
    path = folder / os.fsdecode(b"; touch canary\xfe.py")
    path.write_text(f"#!{sys.executable}\nimport sys; print(ascii(sys.argv[0]), sys.argv[1:])\n")
    path.chmod(0o755)
    words = [path] if kind == "script" else ["--no-python", path]
    run = start("--hosts", "h1:1", *words, "--hosts", env=light.env)
    assert run.wait() == 0, run.err
    assert run.log("h1", 0).decode() == f"{str(path)!a} ['--hosts']\n"
    assert not list(tmp_path.rglob("canary"))


def test_plan_of_any_words_can_be_printed(tmp_path):
    (tmp_path / "job.py").touch()
    words = [lab.DSTRAIN, "run", "--dry-run", "job.py", b"\xff\x1b]0;title\x07\n\xc3\xbc"]
    env = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    shown = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, check=True).stdout
    first = next(line for line in shown.splitlines() if line.startswith(b"run "))
    assert first == "run         python job.py '\\udcff\\x1b]0;title\\x07\\nü'".encode()


def test_env_file_takes_any_byte(tmp_path):
    path = tmp_path / "env"
    every = bytes(byte for byte in range(1, 256) if byte != 10)
    path.write_bytes(b"A='" + every + b"'\r\nB=" + "a\u2028b\x85c".encode() + b"\nC=\"'x'\"\n export D = y \n# E=1\n")
    values = {name: os.fsencode(value) for name, value in read_env_file(path).items()}
    assert values == {"A": every, "B": "a\u2028b\x85c".encode(), "C": b"'x'", "D": b" y"}


@pytest.mark.parametrize("line", [b"c2VjcmV0/IG9mIHN+vcnRz==", b"the secret", b"A=sec\0ret", b"se cret=1"])
def test_env_file_error_shows_no_line(tmp_path, line):
    path = tmp_path / "env"
    path.write_bytes(b"A=1\n" + line + b"\n")
    with pytest.raises(UsageError, match="env:2: expected NAME=VALUE") as caught:
        read_env_file(path)
    assert not any(part in str(caught.value) for part in ("c2V", "secret", "sec", "cret"))


# --- secrets --------------------------------------------------------------------------------------------------

KEEP = """
import hashlib, os, time
with open("job-" + os.environ["RANK"], "w") as file:
    file.write(hashlib.sha256(b"".join(os.environb[n] for n in (b"PLAIN_WORD", b"OF_THE_FILE"))).hexdigest())
print(os.environ["PLAIN_WORD"], flush=True)
os.rename("job-" + os.environ["RANK"], os.environ["RANK"] + ".ready")
while not os.path.exists("go"):
    time.sleep(0.02)
"""


class CommandLines(threading.Thread):
    """Reads the words of every process, all the time, and notes who has one of the secrets in them."""

    def __init__(self, secrets: list[bytes]) -> None:
        super().__init__()
        self.found: set[bytes] = set()
        self.seen: set[bytes] = set()
        self.rounds = 0
        self._secrets, self._over = secrets, threading.Event()

    def run(self) -> None:
        while not self._over.wait(0.03):
            self.rounds += 1
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                with contextlib.suppress(OSError):
                    words = path.read_bytes()
                    self.seen.add(words)
                    if any(secret in words for secret in self._secrets):
                        self.found.add(words)

    def __enter__(self) -> CommandLines:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()


class NewFiles:
    """Finds what this test's hosts write into the folders, the temporary folder and the cache."""

    def __init__(self, *folders: Path) -> None:
        self._since, self._temporary = time.time() - 1, Path(tempfile.gettempdir())
        self._known = {path for path in self._temporary.iterdir() if not path.name.startswith("dstrain")}
        self._folders = [*folders, Path("~/.cache/dstrain").expanduser(), Path("/dev/shm")]

    def with_one_of(self, secrets: list[bytes]) -> set[Path]:
        """Files that have changed and hold a secret."""
        fresh = [path for path in self._temporary.iterdir() if path not in self._known]
        return {path for top in [*self._folders, *fresh] for path in self._files(top) if _holds(path, secrets)}

    def _files(self, top: Path) -> Iterator[Path]:
        for path in [top, *top.rglob("*")]:
            with contextlib.suppress(OSError):
                if path.is_file() and path.stat().st_mtime >= self._since:
                    yield path


def _holds(path: Path, secrets: list[bytes]) -> bool:
    with contextlib.suppress(OSError):
        data = path.read_bytes()
        return any(secret in data for secret in secrets)
    return False


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "ssh"), [("preloaded", "paramiko"), ("program", "openssh")])
def test_secret_stays_in_the_job(light, start, script, tmp_path, kind, ssh):
    folder = tmp_path / "work"
    files = NewFiles(folder)
    secrets = [uuid.uuid4().hex.encode() for _ in range(2)]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "env").write_bytes(b"OF_THE_FILE=" + secrets[1] + b"\n")
    path = script(KEEP)
    words = ["-H", light.hostfile(names=["h1", "h2"]), "--ssh", ssh, "--env", "PLAIN_WORD"]
    words += ["--env-file", elsewhere / "env", *([] if kind == "preloaded" else ["--no-python", sys.executable]), path]
    with CommandLines(secrets) as watched:
        run = start(*words, env={**light.env, "PLAIN_WORD": secrets[0].decode()}, folder=folder)
        run.wait_ready(4)
        logs = run.directory / "logs" / "attempt-0"
        printed = {logs / f"h{rank // 2 + 1}" / f"rank-{rank}.out" for rank in range(4)}
        lab.wait_for(lambda: all(path.exists() for path in printed), "the ranks' lines")
        during = files.with_one_of(secrets)
        (folder / "go").touch()
        assert run.wait() == 0, run.err
    assert watched.rounds > 20
    assert any(b"rank 3:" in words or str(path).encode() in words for words in watched.seen)
    assert not watched.found
    allowed = {*printed, folder / "stdout"}
    assert printed <= during <= allowed
    assert printed <= files.with_one_of(secrets) <= allowed
    assert (folder / "3.ready").read_text() == hashlib.sha256(b"".join(secrets)).hexdigest()
    for name in ("job.json", "plan.json"):
        shown = json.loads((run.directory / name).read_text())["environment"]
        assert shown["PLAIN_WORD"] == shown["OF_THE_FILE"] == "***"


def test_dry_run_masks(light, script, tmp_path):
    (tmp_path / "env").write_text("OF_THE_FILE=hidden-1\n")
    words = [lab.DSTRAIN, "run", "--hosts", "h1:1", "--env-file", "env", "--env", "PLAIN_WORD", "--env", "SHOWN=3"]
    env = {**os.environ, **light.env, "PLAIN_WORD": "hidden-2"}
    for more in ([], ["--json"]):
        done = subprocess.run(
            [*words, "--dry-run", *more, script("")], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
        )
        assert "PLAIN_WORD" in done.stdout
        assert "OF_THE_FILE" in done.stdout
        assert "hidden" not in done.stdout + done.stderr
