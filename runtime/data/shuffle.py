"""An order of n things that is computed where it is asked for, so that no epoch is too large to shuffle.

A table drawn by randperm takes 8 bytes for each window on each rank and a pause at each epoch's start. Here the order
is a keyed permutation: a Feistel network over a × b ≥ n with the walk back into 0…n−1 (Black and Rogaway 2002,
"Ciphers with arbitrary finite domains"). It needs no memory, and no version of torch or numpy draws it differently.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]
_Words = npt.NDArray[np.uint64]

_ROUNDS = 6
"""Four make a permutation that cannot be told from a random one (Luby and Rackoff 1988); two more for small n."""


class Order:
    """The order of `size` things in one epoch: a pure function of (seed, epoch)."""

    def __init__(self, seed: int, epoch: int, size: int) -> None:
        """size: at least 1."""
        digest = hashlib.blake2b(f"{seed}/{epoch}".encode()).digest()
        self._words = np.frombuffer(digest, dtype="<u8").astype(np.uint64)
        self._size = size
        rows = math.isqrt(size - 1) + 1
        self._rows, self._columns = np.uint64(rows), np.uint64(-(-size // rows))

    def at(self, places: Indices) -> Indices:
        """Which things stand at those places, each from 0 to size − 1."""
        things = self._mixed(places.astype(np.uint64))
        while (outside := things >= self._size).any():
            things[outside] = self._mixed(things[outside])
        return things.astype(np.int64)

    def offset(self, below: int) -> int:
        """One more number that is drawn from (seed, epoch), from 0 to below − 1."""
        return int(self._words[_ROUNDS]) % below

    def _mixed(self, numbers: _Words) -> _Words:
        row, column = numbers // self._columns, numbers % self._columns
        for turn, key in enumerate(self._words[:_ROUNDS]):
            if turn % 2:
                row = (row + _hashed(column ^ key) % self._rows) % self._rows
            else:
                column = (column + _hashed(row ^ key) % self._columns) % self._columns
        mixed: _Words = row * self._columns + column
        return mixed


def _hashed(words: _Words) -> _Words:
    """The end of SplitMix64 (Steele, Lea and Flood 2014): every bit depends on every bit; modulo 2^64."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
