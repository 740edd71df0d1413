"""Ranks on one host: words between them, and each other's memory without a connection in between.

[Note: direct]
Linux lets a process of the same user read another's memory by one system call, process_vm_readv(2) (cross-memory
attach, CMA): one copy by the reader's core, where a local TCP connection costs two copies, at both ends. Where Yama
restricts that to a process's own children (kernel.yama.ptrace_scope = 1), each rank allows it to its launcher's
children by PR_SET_PTRACER. Whether it works is tried at the start, on real memory.

Reading needs no answer of the other side, but its word that the memory is ready, and later the reader's that it is
done. Those words go over Unix sockets, one for each pair of ranks and *lane*; each lane is one thread's.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import socket
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

LANES = ("gather", "reduce")
_PR_SET_PTRACER = 0x59616D61
_WORD = struct.Struct("qq")
_MEETING_S = 60.0


class _Interval(ctypes.Structure):
    """struct iovec"""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class _Card(NamedTuple):
    """What a rank tells the others of itself. host: where its process number and door are known. address: of a number
    to try, `value`. door: an abstract Unix socket where it can be met."""

    host: tuple[str, ...]
    pid: int
    address: int
    value: int
    door: str


class Neighbours:
    """The other ranks of a group on this host, by their numbers in it."""

    def __init__(self, cards: Sequence[_Card], sockets: dict[tuple[str, int], socket.socket]) -> None:
        self._pids = [card.pid for card in cards]
        self._sockets = sockets
        self._early: dict[tuple[str, int, int], list[int]] = {}

    def read(self, index: int, address: int, into: Tensor) -> None:
        """Fill the contiguous `into` from rank `index`'s memory. RuntimeError where that process has gone."""
        _read(self._pids[index], address, into)

    def tell(self, index: int, lane: str, tag: int, word: int) -> None:
        """Send a number to rank `index`. RuntimeError where it has gone."""
        try:
            self._sockets[lane, index].send(_WORD.pack(tag, word))
        except OSError as error:
            raise self._gone(index, str(error)) from None

    def hear(self, index: int, lane: str, tag: int) -> int:
        """The next number of rank `index` under `tag`; others are kept. RuntimeError where it has gone or is silent."""
        early = self._early.setdefault((lane, index, tag), [])
        while not early:
            try:
                said = self._sockets[lane, index].recv(_WORD.size)
            except OSError as error:
                raise self._gone(index, str(error)) from None
            if not said:
                raise self._gone(index, "the end of its connection")
            other, word = _WORD.unpack(said)
            self._early.setdefault((lane, index, other), []).append(word)
        return early.pop(0)

    def _gone(self, index: int, found: str) -> RuntimeError:
        return RuntimeError(f"process {self._pids[index]}: expected a word of this rank's neighbour, found {found}")


def meet(index: int, everyone: Callable[[Any], list[Any]], timeout_s: float) -> Neighbours | None:
    """The others if all ranks of a group share this host and may read each other, else None; the same verdict on all.

    index: this rank's number. everyone: gathers each rank's object; every rank calls it alike. timeout_s: the longest
    silence.
    """
    number = torch.tensor([index + 1], dtype=torch.int64)
    _allow()
    door = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with door:
        name = f"dstrain-{secrets.token_hex(16)}"
        door.bind(f"\0{name}")
        door.listen(4096)
        door.settimeout(_MEETING_S)
        cards = [_Card(*card) for card in everyone((_host(), os.getpid(), number.data_ptr(), index + 1, name))]
        works = len({card.host for card in cards}) == 1 and _can_read(cards)
        if not all(everyone(works)):
            return None
        sockets: dict[tuple[str, int], socket.socket] = {}
        try:
            _connect(index, cards, door, timeout_s, sockets)
            works = True
        except OSError:
            works = False
        if all(everyone(works)):
            return Neighbours(cards, sockets)
        for made in sockets.values():
            made.close()
        return None


def _connect(
    index: int,
    cards: Sequence[_Card],
    door: socket.socket,
    timeout_s: float,
    sockets: dict[tuple[str, int], socket.socket],
) -> None:
    """Every rank calls at those before it, and opens to those behind it. Raises OSError."""
    for other in range(index):
        for lane in LANES:
            made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            made.settimeout(timeout_s)
            made.connect(f"\0{cards[other].door}")
            made.send(_WORD.pack(index, LANES.index(lane)))
            sockets[lane, other] = made
    for _ in range(len(LANES) * (len(cards) - index - 1)):
        made, _address = door.accept()
        made.settimeout(timeout_s)
        other, lane_number = _WORD.unpack(made.recv(_WORD.size))
        sockets[LANES[lane_number], other] = made


def _can_read(cards: Sequence[_Card]) -> bool:
    try:
        for card in cards:
            found = torch.zeros(1, dtype=torch.int64)
            _read(card.pid, card.address, found)
            if int(found) != card.value:
                return False
    except (AttributeError, RuntimeError):  # no such call here, or not allowed
        return False
    return True


def _host() -> tuple[str, ...]:
    """Processes with the same see each other under the same numbers, and meet at abstract sockets."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return boot, *(str(Path("/proc/self/ns", kind).readlink()) for kind in ("pid", "net"))
    except OSError:
        return "", str(os.getpid())  # no other's


def _allow() -> None:
    """Yama: the launcher's children may read this process. Fails, harmlessly, where there is no Yama."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(_PR_SET_PTRACER, ctypes.c_ulong(os.getppid()), 0, 0, 0)


def _read(pid: int, address: int, into: Tensor) -> None:
    """By process_vm_readv, which does not hold the interpreter's lock. AttributeError where the C library has none."""
    if not _calls:
        call = ctypes.CDLL(None, use_errno=True).process_vm_readv
        call.restype = ctypes.c_ssize_t
        interval = ctypes.POINTER(_Interval)
        call.argtypes = [ctypes.c_int, interval, ctypes.c_ulong, interval, ctypes.c_ulong, ctypes.c_ulong]
        _calls.append(call)
    done = 0
    while done < into.nbytes:
        here = _Interval(into.data_ptr() + done, into.nbytes - done)
        there = _Interval(address + done, into.nbytes - done)
        count = _calls[0](pid, ctypes.byref(here), 1, ctypes.byref(there), 1, 0)
        if count <= 0:
            found = os.strerror(ctypes.get_errno()) if count < 0 else "nothing"
            raise RuntimeError(f"process {pid}: expected to read the memory of a rank on this host, found: {found}")
        done += count


_calls: list[Any] = []
"""process_vm_readv, once it has been looked up."""
