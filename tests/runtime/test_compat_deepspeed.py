"""Scripts written for DeepSpeed, with one import changed."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from dstrain.runtime.compat import deepspeed
from dstrain.runtime.compat.deepspeed_schedules import schedule_of
from dstrain.runtime.spec.errors import CheckpointError, ConfigError, UsageError

RunRanks = Callable[..., list[Any]]

ADAM = {"type": "Adam", "params": {"lr": 0.01, "betas": [0.8, 0.999], "eps": 1e-8, "weight_decay": 3e-2}}
WARMUP = {"type": "WarmupLR", "params": {"warmup_min_lr": 0, "warmup_max_lr": 0.01, "warmup_num_steps": 5}}
CONFIG: dict[str, Any] = {
    "train_batch_size": 16,
    "train_micro_batch_size_per_gpu": 4,
    "steps_per_print": 2,
    "optimizer": ADAM,
    "scheduler": WARMUP,
    "gradient_clipping": 0.5,
    "wall_clock_breakdown": False,
}


@pytest.fixture(autouse=True)
def _no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "DSTRAIN_JOB", "DSTRAIN_ATTEMPT"):
        monkeypatch.delenv(name, raising=False)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
        self.kind = "net"

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.mse_loss(self.body(x), y)


def dataset() -> TensorDataset:
    x = torch.randn(32, 3, generator=torch.Generator().manual_seed(5))
    return TensorDataset(x, x.sum(1, keepdim=True))


def as_a_rank() -> None:
    """What the fork has inherited of another job is not this rank's."""
    import dstrain.runtime.initialization as module

    module._joined.clear()


def script(config_file: Path, stage: int) -> tuple[list[float], list[list[float]], list[bool], int]:
    """As "Getting Started" teaches. Losses, learning rates, boundaries, steps."""
    parser = argparse.ArgumentParser(description="My training script.")
    parser.add_argument("--local_rank", type=int, default=-1)
    parser = deepspeed.add_config_arguments(parser)
    cmd_args = parser.parse_args(["--deepspeed", "--deepspeed_config", str(config_file)])
    deepspeed.init_distributed()
    net = Net()
    parameters = filter(lambda p: p.requires_grad, net.parameters())
    model_engine, optimizer, trainloader, _ = deepspeed.initialize(
        args=cmd_args, model=net, model_parameters=parameters, training_data=dataset()
    )
    assert cmd_args.local_rank == model_engine.local_rank
    assert model_engine.zero_optimization_stage() == stage
    assert optimizer is model_engine.optimizer
    losses, rates, boundaries = [], [], []
    for _ in range(2):
        for data in trainloader:
            inputs, labels = data[0].to(model_engine.device), data[1].to(model_engine.device)
            loss = model_engine(inputs, labels)
            model_engine.backward(loss)
            boundaries.append(model_engine.is_gradient_accumulation_boundary())
            rates.append(model_engine.get_lr())
            model_engine.step()
            assert model_engine.was_step_applied() == boundaries[-1]
            losses.append(loss.item())
    return losses, rates, boundaries, model_engine.global_steps


def plain(ranks: int) -> list[float]:
    """The same by torch alone, in one process: the mean over micro-batches and ranks, clipped, AdamW."""
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, betas=(0.8, 0.999), eps=1e-8, weight_decay=3e-2)
    scheduler = schedule_of(WARMUP)(optimizer)
    loaders = [DataLoader(dataset(), 4, sampler=DistributedSampler(dataset(), ranks, rank)) for rank in range(ranks)]
    losses: list[float] = []
    for _ in range(2):
        for number, batches in enumerate(zip(*loaders, strict=True)):
            for rank, (x, y) in enumerate(batches):
                loss = net(x, y)
                (loss / ranks / 2).backward()
                losses += [loss.item()] if rank == 0 else []
            if number % 2:
                nn.utils.clip_grad_norm_(net.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
    return losses


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_script_of_getting_started_trains_as_torch_does(stage: int, tmp_path: Path, run_ranks: RunRanks) -> None:
    file = tmp_path / "ds_config.json"
    file.write_text(json.dumps(CONFIG | {"zero_optimization": {"stage": stage, "overlap_comm": True}}))

    def work(rank: int) -> Any:
        as_a_rank()
        return script(file, stage)

    replies = run_ranks(2, work)
    losses, rates, boundaries, steps = replies[0]
    assert losses == pytest.approx(plain(2), rel=1e-5)
    assert boundaries == [False, True] * 4
    assert steps == 4
    assert [rate[0] for rate in rates][::2] == pytest.approx([0, 0, 0.004307, 0.006826], abs=1e-6)
    assert replies[1][3] == 4


def one_engine(config: dict[str, Any] | None = None, **arguments: Any) -> Any:
    return deepspeed.initialize(model=Net(), config=CONFIG if config is None else config, **arguments)


def test_a_step_within_accumulation_changes_nothing_and_the_loss_comes_back_divided() -> None:
    linear = {"type": "WarmupLR", "params": {"warmup_min_lr": 0.001, "warmup_type": "linear"}}
    engine, _, loader, scheduler = one_engine(CONFIG | {"scheduler": linear}, training_data=dataset())
    assert (engine.train_batch_size(), engine.train_micro_batch_size_per_gpu()) == (16, 4)
    assert engine.gradient_accumulation_steps() == 4
    before = [p.detach().clone() for p in engine.module.parameters()]
    for number, (x, y) in enumerate(loader):
        loss = engine(x, y)
        assert engine.backward(loss).item() == pytest.approx(loss.item() / 4)
        assert engine.step() is None
        moved = any(not torch.equal(a, b) for a, b in zip(before, engine.parameters(), strict=True))
        assert moved == (number >= 3)
    assert (engine.global_steps, engine.micro_steps, engine.global_samples) == (2, 8, 32)
    assert engine.get_global_grad_norm() > 0
    assert scheduler.get_last_lr() == engine.get_lr()


def test_the_rest_of_the_face(capsys: pytest.CaptureFixture[str]) -> None:
    engine, *_ = one_engine({"train_batch_size": 1, "steps_per_print": 1, "optimizer": {"type": "SGD"}})
    engine.eval()
    assert not engine.module.training
    engine.train()
    assert engine.module.training
    assert engine.kind == "net"
    with pytest.raises(AttributeError, match=r"engine\.flops: neither the model nor our form"):
        _ = engine.flops
    engine.backward(engine(torch.ones(1, 3), torch.ones(1, 1)))
    engine.step()
    assert capsys.readouterr().out == "step=1, skipped=0, lr=[0.001]\n"
    assert (engine.fp16_enabled(), engine.bfloat16_enabled(), engine.zero_optimization()) == (False, False, False)
    assert (engine.gradient_clipping(), engine.loss_scale()) == (1.0, 1.0)


def test_groups_and_the_users_own_optimizer() -> None:
    net = Net()
    decay, rest = [net.body[0].weight, net.body[2].weight], [net.body[0].bias, net.body[2].bias]
    groups = [{"params": decay}, {"params": rest, "weight_decay": 0.0, "lr": 0.001}]
    config = {key: value for key, value in CONFIG.items() if key != "scheduler"}
    _, optimizer, _, scheduler = deepspeed.initialize(model=net, config=config, model_parameters=groups)
    assert [(g["weight_decay"], g["lr"]) for g in optimizer.param_groups] == [(3e-2, 0.01), (0.0, 0.001)]
    assert scheduler is None
    with pytest.raises(
        UsageError, match=r"model_parameters: expected all .*, found 2 without \(body.0.bias, body.2.bias"
    ):
        deepspeed.initialize(model=net, config=config, model_parameters=decay)

    own = torch.optim.SGD(net.parameters(), lr=0.1)
    decays = torch.optim.lr_scheduler.StepLR(own, 1)
    made = deepspeed.initialize(model=net, config=CONFIG, optimizer=own, lr_scheduler=decays)
    assert made[1] is own
    assert made[3] is decays


@pytest.mark.parametrize("stage", [0, 3])
def test_a_factory_gets_the_groups_of_model_parameters(stage: int) -> None:
    net = Net()
    net.body[0].bias.requires_grad_(False)
    groups = [
        {"params": [net.body[2].weight, net.body[0].weight], "weight_decay": 0.25, "momentum": 0.5},
        {"params": [net.body[0].bias, net.body[2].bias], "lr": 1.0},
    ]
    config = {"train_batch_size": 1, "bf16": {"enabled": True}, "zero_optimization": {"stage": stage}}
    factory = lambda given: torch.optim.SGD(given, lr=0.5)  # noqa: E731
    engine, optimizer, *_ = deepspeed.initialize(
        model=net, config=config, optimizer=factory, model_parameters=iter(groups)
    )
    found = [(g["lr"], g["weight_decay"], g["momentum"], len(g["params"])) for g in optimizer.param_groups]
    assert found == [(0.5, 0.25, 0.5, 2), (1.0, 0, 0, 1)]
    own = dict(engine._engine.trained)
    members = [p for group in optimizer.param_groups for p in group["params"]]
    assert all(
        member is own[name]
        for member, name in zip(members, ["body.2.weight", "body.0.weight", "body.2.bias"], strict=True)
    )


def test_model_parameters_of_another_model_are_refused() -> None:
    config = {key: value for key, value in CONFIG.items() if key != "scheduler"}
    own = r"model_parameters: expected parameters of the model, found 1 that are not its own, .* \(7,\)"
    for optimizer in (None, torch.optim.SGD):
        net = Net()
        for extra in ([nn.Parameter(torch.zeros(7))], [{"params": nn.Parameter(torch.zeros(7))}]):
            with pytest.raises(UsageError, match=own):
                deepspeed.initialize(
                    model=net, config=config, optimizer=optimizer, model_parameters=[*net.parameters(), *extra]
                )
        with pytest.raises(UsageError, match=r"expected parameters or groups of them, found a tuple"):
            deepspeed.initialize(model=net, config=config, optimizer=optimizer, model_parameters=net.named_parameters())
        with pytest.raises(UsageError, match="expected all parameters that require a gradient, found 2 without"):
            deepspeed.initialize(
                model=net, config=config, optimizer=optimizer, model_parameters=net.body[0].parameters()
            )


def test_a_checkpoint_by_tag_with_the_clients_state(tmp_path: Path) -> None:
    engine, _, loader, _ = one_engine(training_data=dataset())
    assert engine.load_checkpoint(tmp_path) == (None, None)
    for number, (x, y) in enumerate(loader):
        engine.backward(engine(x, y))
        engine.step()
        if number == 3:
            assert engine.save_checkpoint(tmp_path, client_state={"step": number})
        if number == 4:
            with pytest.raises(UsageError, match="between two steps, found micro-batch 1 of 4"):
                engine.save_checkpoint(tmp_path)
    engine.save_checkpoint(tmp_path, "last")
    after = [p.detach().clone() for p in engine.module.parameters()]

    again, *_ = one_engine()
    path, state = again.load_checkpoint(tmp_path, "global_step1")
    assert (path, state) == (str(tmp_path / "global_step1"), {"step": 3})
    assert (again.global_steps, again.micro_steps) == (1, 4)
    assert again.get_lr() == [0.0]
    assert again.load_checkpoint(tmp_path) == (str(tmp_path / "last"), {})
    assert all(torch.equal(a, b) for a, b in zip(after, again.module.parameters(), strict=True))


def test_a_tag_that_is_saved_again_is_the_newest_alone(tmp_path: Path) -> None:
    engine, *_ = one_engine({"train_batch_size": 1, "optimizer": {"type": "SGD"}})
    for number in range(3):
        engine.backward(engine(torch.ones(1, 3), torch.ones(1, 1)))
        engine.step()
        engine.save_checkpoint(tmp_path, "last", client_state={"epoch": number})
    assert [path.name.partition(".")[0] for path in (tmp_path / "last").iterdir()] == ["step-3"]

    engine.backward(engine(torch.ones(1, 3), torch.ones(1, 1)))
    engine.step()
    with pytest.MonkeyPatch.context() as patch:  # a save that fails leaves the one before, with its own client_state
        patch.setattr("dstrain.runtime.checkpoint.commit.sync", failing)
        with pytest.raises(CheckpointError, match="expected to save step 4"):
            engine.save_checkpoint(tmp_path, "last", client_state={"epoch": 3})
    assert engine.load_checkpoint(tmp_path)[1] == {"epoch": 2}
    assert engine.global_steps == 3


def test_the_module_alone(tmp_path: Path) -> None:
    engine, *_ = one_engine({"train_batch_size": 1, "optimizer": {"type": "Adam"}})
    engine.backward(engine(torch.ones(1, 3), torch.ones(1, 1)))
    engine.step()
    engine.save_checkpoint(tmp_path)
    again, *_ = one_engine({"train_batch_size": 1, "optimizer": {"type": "SGD"}})
    path, _ = again.load_checkpoint(tmp_path, load_module_only=True, load_optimizer_states=False)
    assert path is not None
    assert again.global_steps == 0
    assert all(torch.equal(a, b) for a, b in zip(engine.module.parameters(), again.module.parameters(), strict=True))


def failing(path: Path) -> None:
    raise OSError(28, "No space left on device", str(path))


def test_a_checkpoint_and_the_model_of_stage_3(tmp_path: Path, run_ranks: RunRanks) -> None:
    config = CONFIG | {"train_micro_batch_size_per_gpu": 8, "bf16": {"enabled": True}}
    config["zero_optimization"] = {"stage": 3, "stage3_param_persistence_threshold": 0}

    def work(rank: int) -> Any:
        as_a_rank()
        engine, *_ = one_engine(config)
        for number in range(4):
            x = torch.full((8, 3), number + rank, dtype=torch.bfloat16)
            engine.backward(engine(x, x[:, :1]))
            engine.step()
        engine.save_checkpoint(tmp_path)
        assert engine.save_16bit_model(tmp_path)
        again, *_ = one_engine(config)
        again.load_checkpoint(tmp_path)
        x = torch.ones(8, 3, dtype=torch.bfloat16)
        return engine(x, x[:, :1]).item(), again(x, x[:, :1]).item(), again.global_steps

    for trained, loaded, steps in run_ranks(2, work):
        assert (loaded, steps) == (trained, 4)
    weights = load_file(tmp_path / "model.safetensors")
    assert {(name, tensor.dtype) for name, tensor in weights.items()} == {
        (f"body.{place}.{part}", torch.bfloat16) for place in (0, 2) for part in ("weight", "bias")
    }


def test_what_it_does_not_do_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    engine, *_ = one_engine()
    loss = engine(torch.ones(1, 3), torch.ones(1, 1))
    for call, words in (
        (lambda: engine.backward(loss, retain_graph=True), "add up the losses before it"),
        (lambda: engine.backward(loss, scale_wrt_gas=False), "mean over a step's micro-batches"),
        (lambda: engine.step({"epoch": 1}), "without passing it to initialize"),
        (lambda: engine.set_gradient_accumulation_boundary(True), "gradient_accumulation_steps says"),
        (lambda: engine.save_16bit_model("x", "pytorch_model.bin"), "read the model by safetensors"),
        (lambda: engine.load_checkpoint("x", load_optimizer_states=False), "a checkpoint is loaded as a whole"),
        (lambda: engine.save_checkpoint("x", client_state={"a": torch.ones(1)}), "client_state: expected JSON"),
        (lambda: deepspeed.initialize(config=CONFIG), "expected a model, found none"),
        (lambda: one_engine({"train_batch_size": 4}), "expected an optimizer, found none"),
        (lambda: one_engine(mpu=object()), "mpu: expected none, found object"),
        (lambda: deepspeed.init_distributed("mpi"), "expected gloo on cpu, found 'mpi'"),
        (lambda: one_engine(CONFIG | {"scheduler": {"type": "OneCycle"}}), "pass deepspeed.initialize an lr_scheduler"),
    ):
        with pytest.raises(UsageError) as caught:
            call()
        assert words in str(caught.value)
    with deepspeed.zero.Init(config_dict_or_path=CONFIG):
        Net()
    with deepspeed.zero.Init(enabled=False):
        Net()
    assert capsys.readouterr().err.count("deepspeed.zero.Init: the model is made whole on every rank") == 1


def test_parts_that_are_not_here_say_what_to_write() -> None:
    with pytest.raises(AttributeError, match=r"^deepspeed.init_inference: .*; write the model by engine.save_16bit"):
        deepspeed.init_inference(Net())
    assert not hasattr(deepspeed, "ops")
    with pytest.raises(AttributeError, match=r"has no attribute 'initialise'; see docs/deepspeed.md"):
        _ = deepspeed.initialise
    package = deepspeed.__name__
    for line, words in (
        (f"from {package} import ops", r"^deepspeed.ops: .*; write the section optimizer"),
        (f"from {package}.ops.adam import FusedAdam", r"^deepspeed.ops: .*torch.optim.AdamW"),
        (f"import {package}.comm", r"^deepspeed.comm: .*; write torch.distributed"),
        (
            f"from {package} import PipelineModule",
            r"^deepspeed.PipelineModule: .*; write a job.yaml with parallel.pipeline",
        ),
        (f"from {package} import initialise", r"cannot import name 'initialise'"),
        (f"import {package}.initialise", r"No module named"),
    ):
        with pytest.raises(ImportError, match=words):
            exec(line, {})


def test_keys_that_change_no_number_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    zero = {"stage": 2, "sub_group_size": 1e9}
    one_engine(CONFIG | {"zero_optimization": zero, "tensorboard": {"enabled": True}}, optimizer=torch.optim.SGD)
    err = capsys.readouterr().err
    assert "dstrain: deepspeed config: zero_optimization.sub_group_size: not used, and no number changes" in err
    assert "dstrain: deepspeed config: optimizer: not used: the script has passed its own" in err
    assert "tensorboard: our trainer logs there by itself" in err


class Hparams:
    """As a tutorial has it."""

    def __init__(self, **keywords: Any) -> None:
        self.__dict__.update(keywords)


def test_an_object_with_keywords_is_told_what_to_write() -> None:
    with pytest.raises(UsageError) as caught:
        deepspeed.initialize(model=Net(), config=Hparams(train_batch_size=8, fp16=Hparams(enabled=True)))  # type: ignore[arg-type] # on purpose
    assert str(caught.value) == (
        "deepspeed.initialize: config: expected a path or a mapping, found an object of Hparams; "
        "write config=dict(…) with the same keywords, also for sections, or config=vars(…) of the Hparams"
    )
    with pytest.raises(UsageError, match=r"fp16: .*expected a section of keys, found"):
        deepspeed.initialize(model=Net(), config=CONFIG | {"fp16": Hparams(enabled=True)})


def test_keys_that_never_existed_are_each_named() -> None:
    never = {
        "stage": 3,
        "min_num_size": 1e8,
        "stage3_gather_fp16_weights_during_training": True,
        "reduce_buckt_size": 5,
    }
    with pytest.raises(UsageError) as caught:
        one_engine(CONFIG | {"zero_optimization": never, "sync_bn_in_backward": True})
    first, *lines = str(caught.value).splitlines()
    assert first.endswith("expected keys that can be kept, found")
    assert [line.split(":")[0].strip() for line in lines] == [
        *[f"zero_optimization.{key}" for key in list(never)[1:]],
        "sync_bn_in_backward",
    ]
    assert "here zero.resident_elements" in lines[0]
    assert "did you mean zero_optimization.reduce_bucket_size, here zero.bucket_elements" in lines[2]
    assert "convert_sync_batchnorm(model)" in lines[3]


def test_two_configurations_or_none_and_batches_that_do_not_fit() -> None:
    args = argparse.Namespace(deepspeed_config="ds.json")
    with pytest.raises(UsageError, match=r"expected args\.deepspeed_config or config, found both"):
        one_engine(args=args)
    with pytest.raises(UsageError, match="start the script with --deepspeed_config"):
        deepspeed.initialize(model=Net())
    with pytest.raises(ConfigError, match=r"= 4 × 2 × 1 = 8, found 16"):
        one_engine(CONFIG | {"gradient_accumulation_steps": 2})


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        (
            {"type": "WarmupLR", "params": {"warmup_num_steps": 4, "warmup_type": "linear"}},
            [0, 0, 0.25, 0.5, 0.75, 1, 1],
        ),
        (
            {
                "type": "WarmupDecayLR",
                "params": {"total_num_steps": 6, "warmup_num_steps": 2, "warmup_type": "linear", "warmup_max_lr": 1.0},
            },
            [0, 0, 0.5, 1, 0.75, 0.5, 0.25],
        ),
        (
            {
                "type": "WarmupCosineLR",
                "params": {"total_num_steps": 4, "warmup_num_steps": 2, "warmup_type": "linear", "cos_min_ratio": 0},
            },
            [0, 0, 0.5, 0.5, 0, 0, 0],
        ),
    ],
    ids=lambda value: value["type"] if isinstance(value, dict) else "",
)
def test_deepspeeds_schedules(section: dict[str, Any], expected: list[float]) -> None:
    """By hand from the formulas of its lr_schedules.py: step k has the rate of iteration k − 2."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule, rates = schedule_of(section)(optimizer), []
    for _ in expected:
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx(expected)


def test_a_warm_up_without_a_peak_takes_the_first_groups_for_all() -> None:
    """DeepSpeed's WarmupLR: `warmup_max_lr = [group['lr'] for group in optimizer.param_groups][0]`."""
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (1.0, 0.25)]
    optimizer = torch.optim.SGD(groups)
    schedule = schedule_of({"type": "WarmupLR", "params": {"warmup_num_steps": 2, "warmup_type": "linear"}})(optimizer)
    rates = []
    for _ in range(4):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    assert rates == [[0, 0], [0, 0], [0.5, 0.5], [1, 1]]
