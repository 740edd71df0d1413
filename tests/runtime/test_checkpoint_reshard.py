"""Any layout goes on from any other: the state's canonical hash is the same, whoever saved it and whoever loads it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dstrain.runtime.checkpoint.load import _Files, load, read
from dstrain.runtime.checkpoint.manifest import FILE_NAME, Manifest, Piece, TensorEntry
from dstrain.runtime.checkpoint.parts import Part, entries_of, write_file
from dstrain.runtime.checkpoint.save import save
from dstrain.runtime.comm import Communicator
from dstrain.runtime.engine import Engine, EngineConfig, TorchSchedule
from dstrain.runtime.optimizers import make_optimizer
from dstrain.runtime.spec.errors import CheckpointError
from dstrain.runtime.spec.training_config import OptimizerConfig, ParallelConfig, PrecisionConfig, ZeroConfig

from .conftest import RunRanks
from .test_zero_checkpoint import engine_of, train

Layout = tuple[int, int, int | None]
"""World, stage, data_shard."""

LAYOUTS: list[Layout] = [(world, stage, None) for world in (1, 2, 3, 4) for stage in (0, 1, 2, 3)]
HYBRID: list[Layout] = [(4, 1, 2), (4, 3, 2)]
QUICK: list[Layout] = [(1, 0, None), (2, 3, None), (3, 1, None), (4, 2, None), (4, 3, 2)]


def canonical_hash(folder: Path) -> str:
    """Of the global state: every tensor but random numbers by name, shape, dtype and bytes, and what is no tensor."""
    manifest, state = read(folder)
    digest = hashlib.sha256()
    for name in sorted(state.tensors):
        if not name.startswith("rng."):
            tensor = state.tensors[name]
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    digest.update(repr(sorted(manifest.state["engine"].items())).encode())
    digest.update(repr(manifest.state["optimizer"]).encode())
    return digest.hexdigest()


def engine_for(comm: Communicator, layout: Layout, **config: Any) -> Engine:
    _, stage, data_shard = layout
    if data_shard is not None:
        config["parallel"] = ParallelConfig(data_shard=data_shard)
    return engine_of(comm, stage, **config)


def save_each(run_ranks: RunRanks, folder: Path, layouts: Iterable[Layout], **config: Any) -> list[str]:
    """One training, saved by one layout; then loaded and saved by each; returns the hashes."""
    hashes = []
    for source in layouts:
        origin = folder / str(source)

        def begin(rank: int, source: Layout = source, origin: Path = origin) -> None:
            with Communicator.connect() as comm:
                engine = engine_for(comm, source, **config)
                load(engine, folder / "trained") if (folder / "trained").exists() else train(engine, 0)
                save(engine, origin if (folder / "trained").exists() else folder / "trained")

        for _ in range(1 if (folder / "trained").exists() else 2):
            run_ranks(source[0], begin)
        hashes.append(canonical_hash(origin / "step-3"))
    return hashes


def load_by_each(
    run_ranks: RunRanks, folder: Path, sources: Iterable[Layout], layouts: Iterable[Layout], **config: Any
) -> set[str]:
    """Every source loaded by every layout, and saved again."""
    found = set()
    sources = list(sources)
    for layout in layouts:

        def go_on(rank: int, layout: Layout = layout) -> None:
            with Communicator.connect() as comm:
                for source in sources:
                    engine = engine_for(comm, layout, **config)
                    load(engine, folder / str(source))
                    save(engine, folder / "again" / str(layout) / str(source))

        run_ranks(layout[0], go_on, timeout_s=300.0)
        for source in sources:
            found.add(canonical_hash(folder / "again" / str(layout) / str(source) / "step-3"))
    return found


CONFIG: dict[str, Any] = {"ema_decay": 0.9, "precision": PrecisionConfig(dtype="bf16")}


@pytest.mark.parametrize("layouts", [QUICK[::2], pytest.param(QUICK, marks=pytest.mark.slow)], ids=len)
def test_some_layouts_in_every_pair(run_ranks: RunRanks, tmp_path: Path, layouts: list[Layout]) -> None:
    (one,) = set(save_each(run_ranks, tmp_path, layouts, **CONFIG))
    assert load_by_each(run_ranks, tmp_path, layouts, layouts, **CONFIG) == {one}


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adafactor"])
def test_every_layout_in_every_pair(run_ranks: RunRanks, tmp_path: Path, optimizer: str) -> None:
    layouts = LAYOUTS + HYBRID
    words = {"ema_decay": 0.9, "optimizer": optimizer}
    (one,) = set(save_each(run_ranks, tmp_path, layouts, **words))
    assert load_by_each(run_ranks, tmp_path, layouts, layouts, **words) == {one}


def test_no_rank_reads_much_more_than_its_share(
    run_ranks: RunRanks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """About a quarter of the bytes to verify, and a quarter to load; small units are cut less evenly."""
    monkeypatch.setattr("dstrain.runtime.checkpoint.load._TURN_BYTES", 24)
    monkeypatch.setattr("dstrain.runtime.checkpoint.parts.PIECE_BYTES", 8)

    def work(rank: int) -> int:
        with Communicator.connect() as comm:
            engine = engine_of(comm, 3 if comm.world_size > 1 else 0)
            if comm.world_size == 1:
                train(engine, 0)
                save(engine, tmp_path)
                return 0
            count, inner = 0, _Files.read

            def read_and_count(self: _Files, entry: TensorEntry, piece: Piece) -> torch.Tensor:
                nonlocal count
                count += piece.size if not entry.name.startswith("rng.") else 0
                return inner(self, entry, piece)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(_Files, "read", read_and_count)
                load(engine, tmp_path)
            return count

    run_ranks(1, work)
    manifest, _ = read(tmp_path / "step-3")
    size = sum(p.size for entry in manifest.tensors for p in entry.pieces if not entry.name.startswith("rng."))
    counts = run_ranks(4, work)
    assert max(counts) < 0.8 * size, (counts, size)
    assert sum(counts) < 2.5 * size, (counts, size)


def test_a_hash_tells_one_bit(tmp_path: Path) -> None:
    engine = engine_of(Communicator(0, 1, 0, torch.device("cpu")), 0)
    train(engine, 0)
    save(engine, tmp_path / "a")
    with torch.no_grad():
        next(engine.module.parameters()).view(torch.int32).view(-1)[3] ^= 1
    save(engine, tmp_path / "b")
    assert canonical_hash(tmp_path / "a" / "step-3") != canonical_hash(tmp_path / "b" / "step-3")


def test_boxes_of_tensor_and_pipeline_ranks_are_put_together(run_ranks: RunRanks, tmp_path: Path) -> None:
    """Each matrix stored as a box of columns on each of two ranks, in intervals: sharded ranks load it."""
    one = engine_of(Communicator(0, 1, 0, torch.device("cpu")), 0)
    train(one, 0)
    save(one, tmp_path / "whole")
    manifest, state = read(tmp_path / "whole" / "step-3")
    folder = tmp_path / "boxes" / "step-3"
    folder.mkdir(parents=True)
    files = []
    for rank in range(2):
        parts, data = [], []
        for entry in manifest.tensors:
            tensor = state.tensors[entry.name]
            if tensor.dim() != 2:
                if rank == 0:
                    parts.append(Part.whole(entry.name, entry.shape, entry.dtype))
                    data.append(tensor.contiguous())
                continue
            half = tensor.shape[1] // 2
            low, high = ((0, half), (half, tensor.shape[1]))[rank]
            box = tensor[:, low:high].contiguous().view(-1)
            cut = box.numel() // 3
            for start, stop in ((0, cut), (cut, box.numel())):
                place = {"box_start": (0, low), "box_size": (tensor.shape[0], high - low)}
                parts.append(Part(entry.name, entry.shape, entry.dtype, start, stop, **place))
                data.append(box[start:stop])
        buffers = [one.contiguous().view(-1).view(torch.uint8).numpy() for one in data]
        files.append((parts, write_file(folder / f"rank-{rank}.safetensors", parts, buffers)))
    sizes = {written.file: written.size for _, written in files}
    boxed = replace(manifest, tensors=tuple(entries_of(files)), files=sizes, hosts={})
    (folder / FILE_NAME).write_text(boxed.to_text())
    assert canonical_hash(folder) == canonical_hash(tmp_path / "whole" / "step-3")
    assert any(isinstance(p, Piece) and p.box_start != (0,) * len(e.shape) for e in boxed.tensors for p in e.pieces)
    assert Manifest.read(folder) == boxed

    def work(rank: int) -> None:
        with Communicator.connect() as comm:
            for stage in (0, 3):
                engine = engine_of(comm, stage)
                load(engine, tmp_path / "boxes")
                save(engine, tmp_path / str(stage))

    run_ranks(2, work)
    for stage in (0, 3):
        assert canonical_hash(tmp_path / str(stage) / "step-3") == canonical_hash(folder)


# --- the model alone -----------------------------------------------------------------------------------------


class WithHead(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, classes)
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x)) * self.scale  # type: ignore[operator, no-any-return]


def head_engine(comm: Communicator, stage: int, classes: int, dtype: str, name: str = "adamw") -> Engine:
    zero = ZeroConfig(stage=stage, bucket_elements=20, resident_elements=4)  # type: ignore[arg-type]
    precision = PrecisionConfig(dtype=dtype)  # type: ignore[arg-type]
    config = EngineConfig(zero=zero, precision=precision, ema_decay=0.5)
    settings = OptimizerConfig(name=name)  # type: ignore[arg-type]
    return Engine(WithHead(classes), comm, config, lambda p: make_optimizer(p, settings), TorchSchedule(None))


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_only_the_model_in_another_precision_with_another_optimizer(
    run_ranks: RunRanks, tmp_path: Path, stage: int
) -> None:
    def begin(rank: int) -> list[float]:
        with Communicator.connect() as comm:
            engine = head_engine(comm, 1, 3, "fp32")
            for _ in range(2):
                engine.backward(engine(torch.ones(2, 4)).square().sum())
                engine.step()
            save(engine, tmp_path)
            return [p.double().sum().item() for p in engine.module.parameters()]

    run_ranks(2, begin)
    source = read(tmp_path / "step-2")[1].tensors

    def go_on(rank: int) -> dict[str, list[float]]:
        with Communicator.connect() as comm:
            engine = head_engine(comm, stage, 5, "bf16", "sgd")
            fresh = head_engine(comm, stage, 5, "bf16", "sgd")
            with pytest.raises(CheckpointError, match=r"head.weight of shape \(5, 6\), found \(3, 6\).*init_except"):
                engine.load_checkpoint(tmp_path, model_only=True)
            loaded = load(engine, tmp_path, model_only=True, exempt=["head.*"])
            assert set(loaded.missing) == {"model.head.weight", "model.head.bias"}
            assert engine.global_step == 0
            save(engine, tmp_path / "second")
            save(fresh, tmp_path / "fresh")
            engine.backward(engine(torch.ones(2, 4, dtype=torch.bfloat16)).float().square().sum())
            engine.step()
            return {}

    run_ranks(3, go_on)
    second, fresh = (read(tmp_path / name / "step-0")[1].tensors for name in ("second", "fresh"))
    for name in ("body.weight", "body.bias"):
        assert torch.equal(second[f"master.{name}"], source[f"model.{name}"])  # not rounded by bf16
        assert torch.equal(second[f"model.{name}"], source[f"model.{name}"].bfloat16())
        assert torch.equal(second[f"average.{name}"], source[f"model.{name}"])
    for name in ("head.weight", "head.bias"):
        assert torch.equal(second[f"master.{name}"], fresh[f"master.{name}"])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_from_bf16_the_masters_are_taken_but_of_what_differs(tmp_path: Path, dtype: str) -> None:
    comm = Communicator(0, 1, 0, torch.device("cpu"))
    engine = head_engine(comm, 0, 3, "bf16")
    engine.backward(engine(torch.ones(2, 4, dtype=torch.bfloat16)).float().square().sum())
    engine.step()
    save(engine, tmp_path / "first")
    other = head_engine(comm, 0, 5, dtype)
    fresh = {name: p.detach().clone() for name, p in other.trained}
    loaded = load(other, tmp_path / "first", model_only=True, exempt=["head.*"])
    masters = dict(engine.trained)
    for name, found in other.trained:
        expected = fresh[name] if name.startswith("head.") else masters[name]
        assert torch.equal(found, expected), name
    assert set(loaded.missing) == {"model.head.weight", "model.head.bias"}
    assert loaded.foreign == ()


def test_what_is_no_tensor_is_named(tmp_path: Path) -> None:
    class Odd(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"a": 1}

        def set_extra_state(self, state: object) -> None: ...

    comm = Communicator(0, 1, 0, torch.device("cpu"))
    engine = Engine(
        Odd(2, 2), comm, EngineConfig(), lambda p: make_optimizer(p, OptimizerConfig()), TorchSchedule(None)
    )
    with pytest.raises(CheckpointError, match=r"model\._extra_state: expected a tensor in the state_dict, found dict"):
        save(engine, tmp_path)


def test_what_the_model_lacks_or_has_besides_is_named(tmp_path: Path) -> None:
    comm = Communicator(0, 1, 0, torch.device("cpu"))
    save(head_engine(comm, 0, 3, "fp32"), tmp_path)
    other = engine_of(comm, 0)
    with pytest.raises(CheckpointError, match=r"found none of model\.0\.weight, .* and besides .*model\.body\.weight"):
        other.load_checkpoint(tmp_path, model_only=True)
    before = [p.detach().clone() for p in other.module.parameters()]
    assert load(other, tmp_path, model_only=True, exempt=["*"]).missing
    assert all(torch.equal(a, b) for a, b in zip(before, other.module.parameters(), strict=True))
