"""A model larger than one rank's memory is built, and each of its parameters computed again when it is its turn.

[Note: deferred]
Inside `Deferred` every operation runs as ever, with the same random numbers in the same order; so the model is the
one that would have been built without it. But of each large tensor that is written to, the operations that made it
are kept, with the state of the random numbers before each, and when the next tensor's turn comes its pages are given
back to the system: memory that nobody writes to costs nothing. `fill` runs its operations again. So a rank holds one
large tensor at a time, whatever the size of the model, for twice the arithmetic of its initialisation. A tensor that
is read again while the model is built is filled first. At the end is filled what stays: buffers, and whatever else
somebody still has (a mask as a plain attribute, a teacher in a list). What an operation is kept with are tensors of our
own, so that Python's garbage collector tells them from everybody else's: aliases of large tensors, whose later changes
are noted, and copies of small ones, whose changes are not.

What is not seen here (memory of numpy or of files) is left as it is.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

SMALLEST_BYTES = 1 << 20
"""Tensors below stay as they are: all norms and biases of a model are nothing beside its matrices."""

_MADV_DONTNEED = 4
_libc = ctypes.CDLL(None, use_errno=True)

_OVERWRITES = {"normal_", "uniform_", "zero_", "fill_", "copy_", "exponential_", "log_normal_", "cauchy_", "random_"}
"""Operations after which nothing of what was there before counts, where they write to all of a tensor."""


@dataclass
class _Operation:
    """run: does it again. reads: tensors that it needs. holds: all that it refers to, aliases and copies of our own."""

    run: Callable[[], object]
    reads: list[Tensor]
    holds: list[Tensor]


@dataclass
class _Call:
    """An operation and its arguments."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self) -> object:
        return self.func(*self.args, **self.kwargs)

    def tensors(self) -> list[Tensor]:
        return [tensor for tensor in tree_leaves((self.args, self.kwargs)) if isinstance(tensor, Tensor)]


class Deferred(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch's
    """Around the construction of a model. [Note: deferred]"""

    def __init__(self, smallest_bytes: int = SMALLEST_BYTES) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # torch's
        self._smallest = smallest_bytes
        self._made_by: dict[int, list[_Operation]] = {}  # by the address of the storage
        self._made_of: dict[int, list[Tensor]] = {}
        self._dropped: set[int] = set()
        self._last: Tensor | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        written = list(_written(func, args, kwargs))
        overwritten = {_key(tensor) for tensor in written if _overwrites(func, tensor)}
        reads = [tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)]
        for tensor in reads:
            if _key(tensor) not in overwritten:
                self.fill(tensor)
        for tensor in written:
            self._settle_what_was_made_of(tensor)
        random = _random_state(func, kwargs)
        tracked = [tensor for tensor in written if _key(tensor) in self._made_by]
        call = self._call(func, args, kwargs) if tracked else None  # with what there is before it writes
        made = func(*args, **kwargs)
        for tensor in tracked:
            assert call is not None
            self._note(tensor, overwritten, random, call)
        if not written:
            self._note_new(func, args, kwargs, made, random, reads)
        return made

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call] # torch's
        self._drop_last(None)

    @torch.no_grad()
    def fill(self, tensor: Tensor) -> None:
        """Give a tensor that was made here its numbers."""
        key = _key(tensor)
        if key not in self._dropped:
            return
        self._dropped.remove(key)
        state = torch.get_rng_state()
        for operation in self._made_by[key]:
            for other in operation.reads:
                self.fill(other)
            operation.run()
        torch.set_rng_state(state)

    def keep(self, tensors: Iterable[Tensor]) -> None:
        """Fill tensors that stay."""
        for tensor in tensors:
            self.fill(tensor)
            self._made_by.pop(_key(tensor), None)

    def keep_all_but(self, parameters: Iterable[Tensor]) -> None:
        """Fill every tensor that somebody still has, but for those that share memory with parameters."""
        ours = {id(tensor) for made_of in self._made_of.values() for tensor in made_of}
        ours |= {id(held) for made_by in self._made_by.values() for operation in made_by for held in operation.holds}
        apart = {_key(parameter) for parameter in parameters}
        gc.collect()
        for found in gc.get_objects():
            if type(found) in (Tensor, nn.Parameter) and id(found) not in ours and _key(found) not in apart:
                self.keep([found])

    def refill_by(self, tensor: Tensor, run: Callable[[], object]) -> bool:
        """From now on `run` makes the tensor's numbers (reads them from a file), all of them, when they are asked for.

        Returns False for a tensor that is not deferred: its numbers are to be made at once.
        """
        key = _key(tensor)
        if key not in self._made_by:
            return False
        self._settle_what_was_made_of(tensor)
        self._made_by[key] = [_Operation(run, [], [])]
        _give_back(tensor)
        self._dropped.add(key)
        return True

    def _settle_what_was_made_of(self, tensor: Tensor) -> None:
        """A tensor is about to change: what was made of it as it is now could not be made again."""
        for other in self._made_of.pop(_key(tensor), ()):
            self.keep([other])

    def _call(self, func: Any, args: Any, kwargs: Any) -> _Call:
        return _Call(func, *tree_map_only(Tensor, self._own, (args, kwargs)))

    def _own(self, tensor: Tensor) -> Tensor:
        if _key(tensor) in self._made_by or tensor.nbytes >= self._smallest:
            return tensor.detach()
        return tensor.detach().clone()

    def _note(self, tensor: Tensor, overwritten: set[int], random: Callable[[], None] | None, call: _Call) -> None:
        key = _key(tensor)
        if key in overwritten:
            self._made_by[key].clear()
            self._dropped.discard(key)
        others = [read for read in call.tensors() if _key(read) != key]
        self._add(tensor, _Operation(_behind(random, call), others, call.tensors()))

    def _note_new(
        self, func: Any, args: Any, kwargs: Any, made: Any, random: Callable[[], None] | None, reads: list[Tensor]
    ) -> None:
        known = {_key(read) for read in reads}
        for number, tensor in enumerate(tree_leaves(made)):
            if not isinstance(tensor, Tensor) or tensor.device.type != "cpu" or _key(tensor) in known:
                continue
            if tensor.untyped_storage().nbytes() < self._smallest:
                continue
            self._made_by[_key(tensor)] = []
            self._dropped.discard(_key(tensor))
            if func.overloadpacket is not torch.ops.aten.empty:
                call, own = self._call(func, args, kwargs), tensor.detach()
                again = partial(_make_again, own, number, call)
                self._add(tensor, _Operation(_behind(random, again), call.tensors(), [own, *call.tensors()]))

    def _add(self, tensor: Tensor, operation: _Operation) -> None:
        self._made_by[_key(tensor)].append(operation)
        for read in operation.reads:
            if _key(read) in self._made_by:
                self._made_of.setdefault(_key(read), []).append(tensor.detach())
        self._drop_last(tensor)

    def _drop_last(self, tensor: Tensor | None) -> None:
        """It is `tensor`'s turn: the pages of the one before are given back."""
        last = self._last
        if last is not None and _key(last) in self._made_by and (tensor is None or _key(last) != _key(tensor)):
            _give_back(last)
            self._dropped.add(_key(last))
        self._last = None if tensor is None else tensor.detach()


def build_deferred(
    build: Callable[[Deferred], nn.Module], smallest_bytes: int = SMALLEST_BYTES
) -> tuple[nn.Module, Deferred]:
    """A model whose large parameters are unfilled, and what fills them; all else is whole."""
    deferred = Deferred(smallest_bytes)
    with deferred:
        model = build(deferred)
    deferred.keep(model.buffers())
    deferred.keep_all_but(model.parameters())
    return model, deferred


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    for number, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[number] if number < len(args) else kwargs.get(argument.name)
            yield from (tensor for tensor in tree_leaves(given) if isinstance(tensor, Tensor))


def _overwrites(func: Any, tensor: Tensor) -> bool:
    name = func.overloadpacket.__name__
    return name in _OVERWRITES and tensor.nbytes == tensor.untyped_storage().nbytes()


def _random_state(func: Any, kwargs: dict[str, Any]) -> Callable[[], None] | None:
    """How to set the random numbers back to where they are; None: the operation draws none."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return None
    generator = kwargs.get("generator") or torch.default_generator
    state = generator.get_state()
    return partial(_set_state, generator, state)


def _set_state(generator: torch.Generator, state: Tensor) -> None:
    generator.set_state(state)


def _make_again(tensor: Tensor, number: int, call: _Call) -> None:
    tensor.copy_(tree_leaves(call())[number])


def _behind(random: Callable[[], None] | None, run: Callable[[], object]) -> Callable[[], object]:
    def both() -> None:
        if random is not None:
            random()
        run()

    return both


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else 0


def _give_back(tensor: Tensor) -> None:
    """Its whole pages read as zeros from now on, and take no memory until somebody writes to them."""
    storage = tensor.untyped_storage()
    start = -(-storage.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    stop = (storage.data_ptr() + storage.nbytes()) // mmap.PAGESIZE * mmap.PAGESIZE
    if stop > start:
        _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), _MADV_DONTNEED)
