"""What a plan must know of any model, found without its memory: `python -m dstrain.runtime.pipeline.shapes`.

Reads a resolved job on stdin, and prints `ModelShapes` as JSON. The model is made on the meta device, and its forward
runs there on two samples: nothing is computed, but every tensor that autograd would keep is seen, and every product.

[Note: attention]
On the meta device torch would write attention out, scores and all, which no GPU keeps. In its place stands a function
that keeps what the fused kernels keep: queries, keys, values, the result, laid out as the queries are, and a sum for
each row (Dao et al. 2022).
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from dstrain.runtime.activation_checkpointing import blocks_of
from dstrain.runtime.data.datasets import open_factory
from dstrain.runtime.hooks import repeatable
from dstrain.runtime.models.build import build_model, context_of
from dstrain.runtime.pipeline.cuts import Layer, chain_of
from dstrain.runtime.pipeline.rebuilt import note_norms, rebuild_of
from dstrain.runtime.pipeline.split_backward import is_split, is_trained
from dstrain.runtime.precision import cast_parameters, parameter_dtype
from dstrain.runtime.spec.config import JobConfig
from dstrain.runtime.spec.errors import DstrainError, UsageError
from dstrain.runtime.spec.model_config import HFConfig, ModelConfig
from dstrain.runtime.spec.model_shapes import LayerShape, ModelShapes, ParameterShape
from dstrain.runtime.task import task_of
from dstrain.runtime.zero.groups import outermost

SAMPLES = 2
"""Of the forward: a batch norm refuses a single one."""

META = torch.device("meta")


def shapes_of(job: JobConfig) -> ModelShapes:
    """Raises UsageError for a model that cannot be made."""
    assert job.model is not None, "the launcher plans only jobs with a model"
    model = _on_meta(job.model)
    cast_parameters(model, parameter_dtype(job.precision))
    layers, uncut = _layers(model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    modules = dict(model.named_modules())
    records = [_Record() for _ in layers]
    unknown: tuple[str, ...] = ()
    try:
        _run(model, job, layers, records)
    except Exception as error:  # a model may do on the meta device whatever it likes
        first = str(error).strip().split("\n", 1)[0]
        unknown = (f"activations and operations (its forward on the meta device: {type(error).__name__}: {first})",)
        records = [_Record() for _ in layers]
    shapes = [
        LayerShape(
            name=layer.name,
            parameters=tuple(dict.fromkeys(names[p] for module in layer.modules for p in modules[module].parameters())),
            saved_bytes=record.saved / SAMPLES,
            input_bytes=record.input / SAMPLES,
            output_bytes=record.output / SAMPLES,
            weight_flops=record.weight_flops / SAMPLES,
            other_flops=record.other_flops / SAMPLES,
            left_bytes=record.left / SAMPLES,
            ready_bytes=record.ready,
            rebuilt_bytes=record.rebuilt / SAMPLES,
        )
        for layer, record in zip(layers, records, strict=True)
    ]
    parameters = tuple(_parameter(name, parameter) for parameter, name in names.items())
    blocks = tuple(outermost(blocks_of(model)))
    return ModelShapes(_name(job.model, model), parameters, tuple(shapes), blocks, uncut, unknown)


class _Record:
    """Of one layer: bytes and operations."""

    def __init__(self) -> None:
        self.saved = self.input = self.output = 0
        self.weight_flops = self.other_flops = 0
        self.left = self.ready = self.rebuilt = 0


def _name(config: ModelConfig, model: nn.Module) -> str:
    return "gpt" if config.gpt is not None else type(model).__name__


def _parameter(name: str, parameter: nn.Parameter) -> ParameterShape:
    """A parameter that the job's precision has cast is float32 in the model itself."""
    dtype = str(parameter.dtype).removeprefix("torch.")
    return ParameterShape(name, tuple(parameter.shape), dtype, parameter.requires_grad)


def _on_meta(config: ModelConfig) -> nn.Module:
    """Pretrained weights are not read. A factory that cannot do without memory gets it."""
    hf = config.hf
    if hf is not None and hf.path is not None:
        config = config.model_copy(update={"hf": HFConfig(config=hf.path, auto_class=hf.auto_class)})
    try:
        with META:
            return build_model(config)
    except DstrainError:
        raise
    except Exception:
        return build_model(config).to(META)


def _layers(model: nn.Module) -> tuple[list[Layer], str]:
    """The layers of a chain, or all as one, and why."""
    try:
        return list(chain_of(model).layers), ""
    except UsageError as error:
        return [Layer("model", ("",))], str(error).partition("found ")[2] or str(error)


def _run(model: nn.Module, job: JobConfig, layers: Sequence[Layer], records: Sequence[_Record]) -> None:
    """One forward and its loss on the meta device, noted in `records`."""
    batch = _batch(model, job)
    own = {_storage(tensor) for tensor in (*model.parameters(), *model.buffers())}
    given = {_storage(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)}
    watch = _Watch(records, {_storage(parameter) for parameter in model.parameters()})
    modules = dict(model.named_modules())
    for number, layer in enumerate(layers):
        first, last = modules[layer.modules[0]], modules[layer.modules[-1]]
        for name in layer.modules:
            modules[name].register_forward_pre_hook(lambda *_, number=number: watch.enter(number))
        first.register_forward_pre_hook(lambda _, args, record=records[number]: _note(record, "input", args, own))
        last.register_forward_hook(lambda _, __, output, record=records[number]: _note(record, "output", output))
    rebuilt = _note_split(model, layers, records, watch)
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        place = _storage(tensor)
        rebuilt.saves[place] += 1
        if place not in own and place not in given and place not in kept:
            kept[place] = tensor
            rebuilt.record_of[place] = watch.record
            watch.record.saved += tensor.untyped_storage().nbytes()
        return tensor

    with (
        _fused_attention(watch),
        _no_packing(),
        watch,
        torch.autograd.graph.saved_tensors_hooks(keep, _kept),
    ):
        task_of(batch, job.train.loss).loss(model, batch)
    rebuilt.finish(kept)


@repeatable
def _kept(tensor: Tensor) -> Tensor:
    return tensor


def _note(record: _Record, key: str, tensors: Any, own: Set[int] = frozenset()) -> None:
    """The bytes of what goes into a layer, and comes out of it; without the model's `own`, such as tables."""
    found = [leaf for leaf in tree_leaves(tensors) if isinstance(leaf, Tensor) and _storage(leaf) not in own]
    size = sum(tensor.numel() * tensor.element_size() for tensor in found)
    setattr(record, key, getattr(record, key) or size)


def _note_split(model: nn.Module, layers: Sequence[Layer], records: Sequence[_Record], watch: _Watch) -> _Rebuilt:
    """What a split backward leaves (runtime/pipeline/split_backward.py), from the forwards on; gives what need not be
    kept for it."""
    modules = dict(model.named_modules())
    seen: dict[int, Tensor] = {}
    rebuilt = _Rebuilt(model)

    def note(module: nn.Module, args: tuple[Tensor, ...], named: Mapping[str, Tensor], output: Tensor) -> None:
        watch.record.left += output.numel() * output.element_size()
        if isinstance(module, nn.Linear):
            given = args[0] if args else named["input"]
            rebuilt.note(module, given)
            if _storage(given) not in seen:  # which several layers may share
                seen[_storage(given)] = given
                watch.record.left += given.numel() * given.element_size()

    taken = [module for module in modules.values() if is_split(module) and is_trained(module)]
    for module in taken:
        module.register_forward_hook(note, with_kwargs=True)
    for layer, record in zip(layers, records, strict=True):
        inside = [module for name in layer.modules for module in modules[name].modules()]
        others = {p for one in inside if one not in taken for p in one.parameters(recurse=False)}
        record.ready = sum(p.numel() * p.element_size() for p in others if p.requires_grad)
    return rebuilt


class _Rebuilt:
    """Storages that only linear layers would keep, who can do without (runtime/pipeline/rebuilt.py)."""

    def __init__(self, model: nn.Module) -> None:
        note_norms(model)
        everywhere = (module for _, module in model.named_modules(remove_duplicate=False))
        self._holders = Counter(p for module in everywhere for p in module._parameters.values() if p is not None)
        self._uses: Counter[int] = Counter()
        self.saves: Counter[int] = Counter()  # by storage
        self.record_of: dict[int, _Record] = {}  # who counts it as kept

    def note(self, layer: nn.Linear, given: Tensor) -> None:
        """A linear layer runs."""
        if self._holders[layer.weight] == 1 and rebuild_of(given) is not None:
            self._uses[_storage(given)] += 1

    def finish(self, kept: Mapping[int, Tensor]) -> None:
        """Behind the forward, tell the records. kept: by storage."""
        for place, uses in self._uses.items():
            if place in kept and self.saves[place] == uses:
                self.record_of[place].rebuilt += kept[place].untyped_storage().nbytes()


def _batch(model: nn.Module, job: JobConfig) -> Any:
    """As the trainer gives it, on the meta device."""
    assert job.model is not None
    if job.data.factory is not None:
        samples = open_factory(job.data).training.batch(range(SAMPLES))
        return tree_map(lambda leaf: leaf.to(META) if isinstance(leaf, Tensor) else leaf, samples)
    length = job.data.sequence_length or context_of(model, job.model)
    if length is None:
        raise UsageError("data.sequence_length: expected tokens of one sample, found none, nor a model that says it")
    return torch.zeros(SAMPLES, length + 1, dtype=torch.int64, device=META)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch's
    """Counts products, as of the layer that the forward is in."""

    def __init__(self, records: Sequence[_Record], parameters: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # torch's
        self._records, self._parameters = records, parameters
        self.record = records[0]

    def enter(self, number: int) -> None:
        self.record = self._records[number]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            flops = count(*args, **(kwargs or {}), out_val=output)
            if any(isinstance(arg, Tensor) and _storage(arg) in self._parameters for arg in args):
                self.record.weight_flops += flops
            else:
                self.record.other_flops += flops
        return output


class _Attention(torch.autograd.Function):
    """[Note: attention]"""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        like = query if value.shape[-1] == query.shape[-1] else query.new_empty(*query.shape[:-1], value.shape[-1])
        output = torch.empty_like(like)
        ctx.save_for_backward(query, key, value, output, query.new_empty(*query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise AssertionError("only forwards run on the meta device")


@contextmanager
def _fused_attention(watch: _Watch) -> Iterator[None]:
    """[Note: attention]"""
    real = F.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        pairs = query.numel() // query.shape[-1] * key.shape[-2]
        watch.record.other_flops += 2 * pairs * (query.shape[-1] + value.shape[-1])
        mixed: Tensor = _Attention.apply(query, key, value)  # type: ignore[no-untyped-call] # torch's
        return mixed

    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = real


@contextmanager
def _no_packing() -> Iterator[None]:
    """transformers looks at positions for samples that are packed into one; on the meta device there is nothing to see,
    and ours never are."""
    masking = sys.modules.get("transformers.masking_utils")
    real = vars(masking).get("find_packed_sequence_indices") if masking is not None else None
    if masking is None or real is None:
        yield
        return
    vars(masking)["find_packed_sequence_indices"] = lambda *_, **__: None
    try:
        yield
    finally:
        vars(masking)["find_packed_sequence_indices"] = real


def main() -> None:
    """See the module."""
    try:
        found = shapes_of(JobConfig.model_validate_json(sys.stdin.read()))
    except DstrainError as error:
        print(error, file=sys.stderr)
        sys.exit(int(error.exit_code))
    print(json.dumps(found.to_json()))


if __name__ == "__main__":
    main()
