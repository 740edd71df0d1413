"""Optimizers by name and by import path, against torch's own, bit for bit; groups; what a wrong key says."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional as F

from dstrain.runtime.optimizers import make_optimizer, set_learning_rate
from dstrain.runtime.spec.errors import UsageError
from dstrain.runtime.spec.training_config import OptimizerConfig

Optimizer = torch.optim.Optimizer


class Model(nn.Module):
    """What a language model has: an embedding, matrices, biases, a norm and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(11, 8)
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8, bias=False)
        self.norm = nn.LayerNorm(8)
        self.lm_head = nn.Linear(8, 11, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens)
        logits: Tensor = self.lm_head(self.norm(x + self.down(torch.tanh(self.up(x)))))
        return logits


MATRICES = ["up.weight", "down.weight"]
VECTORS = ["up.bias", "norm.weight", "norm.bias"]
TABLES = ["token.weight", "lm_head.weight"]


def new_model() -> Model:
    torch.manual_seed(0)
    return Model()


def config(**keys: Any) -> OptimizerConfig:
    return OptimizerConfig.model_validate_json(json.dumps(keys))  # as from a file: lists, no tuples


def train(model: Model, optimizers: list[Optimizer], steps: range = range(4)) -> list[Tensor]:
    """The parameters after some steps; each step has its own batch."""
    for step in steps:
        tokens = torch.randint(11, (6,), generator=torch.Generator().manual_seed(step))
        F.cross_entropy(model(tokens), tokens.roll(1)).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return [parameter.detach().clone() for parameter in model.parameters()]


def trained(**keys: Any) -> list[Tensor]:
    model = new_model()
    return train(model, [make_optimizer(list(model.named_parameters()), config(**keys))])


def named(model: Model, names: list[str]) -> list[nn.Parameter]:
    parameters = dict(model.named_parameters())
    return [parameters[name] for name in names]


def assert_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


THEIRS: list[tuple[dict[str, Any], Callable[[Any], Optimizer]]] = [
    (
        {"name": "adamw", "lr": 0.01, "betas": [0.8, 0.9], "eps": 1e-6, "weight_decay": 0.2},
        lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.2, fused=True),
    ),
    ({"lr": 0.01}, lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.9, 0.95), weight_decay=0.1, fused=True)),
    (
        {"name": "adam", "lr": 0.01, "args": {"amsgrad": True}},
        lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.9, 0.95), weight_decay=0.1, amsgrad=True, fused=True),
    ),
    (
        {"name": "adamw", "lr": 0.01, "args": {"foreach": True}},
        lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.9, 0.95), weight_decay=0.1, foreach=True),
    ),
    ({"name": "sgd", "lr": 0.1}, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, fused=True)),
    (
        {"name": "sgd", "lr": 0.1, "momentum": 0.5, "weight_decay": 0.0, "args": {"nesterov": True}},
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5, nesterov=True, fused=True),
    ),
    (
        {"name": "adafactor", "lr": 0.1, "args": {"eps": [None, 0.01], "d": 2.0}},
        lambda p: torch.optim.Adafactor(p, lr=0.1, eps=(None, 0.01), d=2.0, weight_decay=0.1),
    ),
    (
        {"factory": "torch.optim:RAdam", "lr": 0.01, "weight_decay": 0.2, "args": {"betas": [0.8, 0.9]}},
        lambda p: torch.optim.RAdam(p, lr=0.01, betas=(0.8, 0.9), weight_decay=0.2),
    ),
]


@pytest.mark.parametrize(("keys", "theirs"), THEIRS)
def test_it_is_torchs_bit_for_bit(keys: dict[str, Any], theirs: Callable[[Any], Optimizer]) -> None:
    model = new_model()
    assert_equal(trained(**keys), train(model, [theirs(model.parameters())]))


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_it_is_fused_where_it_can_be(name: str) -> None:
    parameter = ("x", nn.Parameter(torch.zeros(2, 2)))
    assert make_optimizer([parameter], config(name=name)).param_groups[0]["fused"] is True
    chosen = make_optimizer([parameter], config(name=name, args={"foreach": True}))
    assert (chosen.param_groups[0]["fused"], chosen.param_groups[0]["foreach"]) == (None, True)
    on_meta = ("x", nn.Parameter(torch.zeros(2, 2, device="meta")))
    assert make_optimizer([on_meta], config(name=name)).param_groups[0]["fused"] is None


@pytest.mark.parametrize("adjust", ["match_rms_adamw", "original"])
def test_muon_moves_hidden_matrices_and_adamw_the_rest(adjust: str) -> None:
    model = new_model()
    muon = torch.optim.Muon(named(model, MATRICES), lr=0.02, momentum=0.95, weight_decay=0.1, adjust_lr_fn=adjust)
    rest = [parameter for name, parameter in model.named_parameters() if name not in MATRICES]
    adamw = torch.optim.AdamW(rest, lr=0.02, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    args = {} if adjust == "match_rms_adamw" else {"args": {"adjust_lr_fn": adjust}}
    assert_equal(trained(name="muon", lr=0.02, **args), train(model, [muon, adamw]))


@pytest.mark.parametrize(
    ("name", "shape", "by_muon"),
    [
        ("blocks.0.attention.query_key_value.weight", (6, 2), True),
        ("model.layers.0.self_attn.q_proj.weight", (2, 2), True),
        ("bert.encoder.layer.0.output.dense.weight", (2, 2), True),
        ("encoder.multihead_attn.in_proj_weight", (6, 2), True),
        ("token.weight", (11, 2), False),
        ("model.embed_tokens.weight", (11, 2), False),
        ("bert.embeddings.position_embeddings.weight", (11, 2), False),
        ("transformer.wte.weight", (11, 2), False),
        ("attn.relative_position_bias_table", (9, 2), False),
        ("lm_head.weight", (11, 2), False),
        ("head.weight", (11, 2), False),
        ("conv.weight", (2, 2, 3, 3), False),
        ("up.bias", (2,), False),
    ],
)
def test_names_say_what_is_muons(name: str, shape: tuple[int, ...], by_muon: bool) -> None:
    parameters = [("hidden.weight", nn.Parameter(torch.zeros(2, 2))), (name, nn.Parameter(torch.zeros(shape)))]
    groups = make_optimizer(parameters, config(name="muon")).param_groups
    assert [group["names"] for group in groups] == (
        [["hidden.weight", name]] if by_muon else [["hidden.weight"], [name]]
    )
    assert ["ns_steps" in group for group in groups] == ([True] if by_muon else [True, False])


def test_muons_share_can_be_said() -> None:
    parameters = list(new_model().named_parameters())
    optimizer = make_optimizer(parameters, config(name="muon", args={"adamw": ["down.*"], "ns_steps": 3}))
    muon, adamw = optimizer.param_groups
    assert muon["names"] == ["token.weight", "up.weight", "lm_head.weight"]
    assert muon["ns_steps"] == 3
    assert adamw["names"] == ["up.bias", "down.weight", "norm.weight", "norm.bias"]


def test_the_first_group_that_matches_has_the_parameter() -> None:
    parameters = list(new_model().named_parameters())
    keys = config(
        lr=0.5,
        weight_decay=0.2,
        no_decay=["1d", "token.*"],
        groups=[{"match": ["lm_head.*", "norm.*"], "lr_ratio": 2.0, "weight_decay": 0.4}, {"match": ["*.weight"]}],
    )
    optimizer = make_optimizer(parameters, keys)
    assert [
        (group["names"], group["lr"], group["lr_ratio"], group["weight_decay"]) for group in optimizer.param_groups
    ] == [
        (["up.bias"], 0.5, 1.0, 0.0),
        (["lm_head.weight"], 1.0, 2.0, 0.4),
        (["norm.weight", "norm.bias"], 1.0, 2.0, 0.0),
        (["up.weight", "down.weight"], 0.5, 1.0, 0.2),
        (["token.weight"], 0.5, 1.0, 0.0),
    ]
    of = dict(parameters)
    for group in optimizer.param_groups:
        assert all(p is of[name] for name, p in zip(group["names"], group["params"], strict=True))
    set_learning_rate(optimizer, 0.1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2, 0.2, 0.1, 0.1]


def test_groups_train_as_torchs_do() -> None:
    model = new_model()
    theirs = torch.optim.AdamW(
        [
            {"params": named(model, ["token.weight", *MATRICES]), "weight_decay": 0.1},
            {"params": named(model, VECTORS), "weight_decay": 0.0},
            {"params": named(model, ["lm_head.weight"]), "lr": 0.03, "weight_decay": 0.5},
        ],
        lr=0.01,
        betas=(0.9, 0.95),
    )
    group = {"match": ["lm_head.*"], "lr_ratio": 3.0, "weight_decay": 0.5}
    ours = trained(lr=0.01, no_decay=["1d"], groups=[group], args={"fused": False})
    assert_equal(ours, train(model, [theirs]))


def test_muon_has_groups_too() -> None:
    model = new_model()
    muon = torch.optim.Muon(
        [{"params": named(model, ["down.weight"])}, {"params": named(model, ["up.weight"]), "lr": 0.04}],
        lr=0.02,
        adjust_lr_fn="match_rms_adamw",
    )
    adamw = torch.optim.AdamW(
        [
            {"params": named(model, TABLES), "weight_decay": 0.1},
            {"params": named(model, VECTORS[1:]), "weight_decay": 0.0},
            {"params": named(model, ["up.bias"]), "lr": 0.04, "weight_decay": 0.0},
        ],
        lr=0.02,
        betas=(0.9, 0.95),
        fused=True,
    )
    ours = trained(name="muon", lr=0.02, no_decay=["1d"], groups=[{"match": ["up.*"], "lr_ratio": 2.0}])
    assert_equal(ours, train(model, [muon, adamw]))


@pytest.mark.parametrize(
    "keys",
    [{"name": name} for name in ("adamw", "adam", "sgd", "adafactor", "muon")] + [{"factory": "torch.optim:RAdam"}],
)
def test_it_goes_on_from_its_state_as_json_and_safetensors(keys: dict[str, Any]) -> None:
    settings = config(lr=0.01, no_decay=["1d"], groups=[{"match": ["up.*"], "lr_ratio": 2.0}], **keys)
    model, again = new_model(), new_model()
    optimizer = make_optimizer(list(model.named_parameters()), settings)
    set_learning_rate(optimizer, 0.02)
    train(model, [optimizer])
    state = optimizer.state_dict()
    groups = json.dumps(state["param_groups"])
    tensors = save({f"{index}/{key}": value for index, of in state["state"].items() for key, value in of.items()})

    resumed = make_optimizer(list(again.named_parameters()), settings)
    loaded: dict[int, dict[str, Tensor]] = {}
    for place, tensor in load(tensors).items():
        index, key = place.split("/")
        loaded.setdefault(int(index), {})[key] = tensor
    resumed.load_state_dict({"state": loaded, "param_groups": json.loads(groups)})
    again.load_state_dict(model.state_dict())
    assert_equal(train(again, [resumed], range(4, 7)), train(model, [optimizer], range(4, 7)))
    assert json.dumps(resumed.state_dict()["param_groups"]) == groups
    assert len(resumed.state) == len(list(again.parameters()))


def test_muons_step_calls_its_closure_once() -> None:
    model = new_model()
    optimizer = make_optimizer(list(model.named_parameters()), config(name="muon"))
    calls = []

    def closure() -> float:
        assert torch.is_grad_enabled()
        calls.append(1)
        return 2.5

    assert optimizer.step(closure) == 2.5
    assert calls == [1]


ADVICE = "; parameters are named as in token.weight, up.weight, up.bias"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"no_decay": ["1d", "nrom.*"]},
            "optimizer.no_decay: expected patterns that each match a trained parameter, found 'nrom.*'; "
            "did you mean 'norm.*'?",
        ),
        (
            {"groups": [{"match": ["up.*"]}, {"match": ["down.*", "lm_haed.weight"]}]},
            "optimizer.groups.1.match: expected patterns that each match a trained parameter, found 'lm_haed.weight'; "
            "did you mean 'lm_head.weight'?",
        ),
        (
            {"no_decay": ["*.wieght"]},
            "optimizer.no_decay: expected patterns that each match a trained parameter, found '*.wieght'; "
            "did you mean '*.weight'?",
        ),
        (
            {"no_decay": ["zzz"]},
            "optimizer.no_decay: expected patterns that each match a trained parameter, found 'zzz'" + ADVICE,
        ),
        (
            {"name": "muon", "args": {"adamw": ["zzz"]}},
            "optimizer.args.adamw: expected patterns that each match a trained parameter, found 'zzz'" + ADVICE,
        ),
        (
            {"name": "muon", "args": {"adamw": "up.*"}},
            "optimizer.args.adamw: expected a list of patterns of parameters' names, found 'up.*'",
        ),
        (
            {"name": "muon", "args": {"adamw": ["*"]}},
            "optimizer.name: expected a model with hidden matrices for muon, found none; "
            "name: adamw trains all the rest",
        ),
        (
            {"name": "sgd", "args": {"nestorov": True}},
            "optimizer.args: expected arguments that torch.optim.SGD takes, found {'nestorov': True} "
            "(SGD.__init__() got an unexpected keyword argument 'nestorov')",
        ),
        (
            {"name": "sgd", "args": {"nesterov": True, "dampening": 0.5}},
            "optimizer.args: expected arguments that torch.optim.SGD takes, found "
            "{'nesterov': True, 'dampening': 0.5} (Nesterov momentum requires a momentum and zero dampening)",
        ),
        (
            {"name": "muon", "args": {"adjust_lr_fn": "none"}},
            "optimizer.args: expected arguments that torch.optim.Muon takes, found {'adjust_lr_fn': 'none'} "
            "(Adjust learning rate function none is not supported)",
        ),
        (
            {"args": {"betas": [0.9, 0.99]}},
            "optimizer.args.betas: expected no such key: it is optimizer.betas, found [0.9, 0.99]",
        ),
        (
            {"factory": "torch.optim:RAdam", "args": {"lr": 0.1}},
            "optimizer.args.lr: expected no such key: it is optimizer.lr, found 0.1",
        ),
        (
            {"factory": "torch.optim:RAdam", "args": {"beta": 0.1}},
            "optimizer.args: expected arguments that torch.optim:RAdam takes, found {'beta': 0.1} "
            "(RAdam.__init__() got an unexpected keyword argument 'beta')",
        ),
    ],
)
def test_what_a_wrong_key_says(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as error:
        make_optimizer(list(new_model().named_parameters()), config(**keys))
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "def make(groups, lr): return 3",
            "optimizer.factory: expected a function that returns a torch.optim.Optimizer, found int",
        ),
        (
            "import torch\ndef make(groups, lr): return torch.optim.SGD([p for g in groups for p in g['params']], lr)",
            "optimizer.factory: expected an optimizer that keeps the keys of the groups it is given, "
            "found made_here:make that drops lr_ratio",
        ),
    ],
)
def test_what_a_wrong_factory_says(source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "made_here.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "made_here", raising=False)
    with pytest.raises(UsageError) as error:
        make_optimizer(list(new_model().named_parameters()), config(factory="made_here:make"))
    assert str(error.value) == message
