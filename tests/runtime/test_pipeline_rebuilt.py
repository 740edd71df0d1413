"""What linear layers behind cheap operations do not keep, and compute again."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dstrain.runtime.gradients import GradientBucket, ReplicatedGradients
from dstrain.runtime.pipeline.split_backward import Splitter
from dstrain.runtime.zero.plan import plan_unit

WIDTH = 16


class Alone:
    """A group of one rank."""

    size = 1

    def start_all_reduce(self, _: Tensor) -> Alone:
        return self

    def wait(self) -> None:
        pass


class Scaled(nn.Module):
    """As transformers' RMSNorm ends."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH))

    def forward(self, given: Tensor) -> Tensor:
        return self.weight * (given * given.pow(2).mean(-1, keepdim=True).add(1e-6).rsqrt())


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, given: Tensor) -> Tensor:
        return F.silu(self.gate(given)) * self.up(given)


class Behind(nn.Module):
    """Two linear layers behind `maker`; `seen`: what it has given, if that is still there."""

    def __init__(self, maker: nn.Module) -> None:
        super().__init__()
        self.before, self.maker = nn.Linear(WIDTH, WIDTH), maker
        self.left, self.right = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.seen: weakref.ref[Tensor] | None = None
        self.kept = False

    def forward(self, given: Tensor) -> Tensor:
        made = self.maker(self.before(given))
        self.seen = weakref.ref(made)
        both: Tensor = self.left(made) + self.right(made)
        return both


def reducer_of(model: nn.Module) -> ReplicatedGradients:
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    plan = plan_unit("all", [(name, tuple(p.shape)) for name, p in trained], shards=1)
    return ReplicatedGradients([GradientBucket(plan, [p for _, p in trained], torch.float32)], Alone())  # type: ignore[arg-type]


def gradients_of(model: Behind, given: Tensor, splits: bool, forward: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """By the splitter; `model.seen` is looked at between forward and backward."""
    splitter, reducer = Splitter(model), reducer_of(model)
    with splitter.forward(splits):
        output = forward(given)
    model.kept = model.seen is not None and model.seen() is not None
    reducer.begin_step()
    reducer.begin_backward(last=True)
    if splits:
        parameters = list(model.parameters())
        with splitter.input_gradients(parameters) as left:
            output.square().sum().backward()
        with torch.no_grad():
            for parameter, lazy in left.compute(parameters):
                reducer.take(parameter, lazy)
    else:
        with splitter.backward(reducer):
            output.square().sum().backward()
    reducer.end_backward()
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[parameter]: gradient.clone() for parameter, gradient in reducer.of_parameters()}


def of_autograd(model: nn.Module, given: Tensor) -> dict[str, Tensor]:
    model(given).square().sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


MAKERS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "tanh gelu": lambda: nn.GELU("tanh"),
    "silu": nn.SiLU,
    "layer norm": lambda: nn.LayerNorm(WIDTH, eps=0.1),
    "layer norm without bias": lambda: nn.LayerNorm(WIDTH, bias=False),
    "scaled": Scaled,
    "gated": Gated,
}


@pytest.mark.parametrize("splits", [False, True])
@pytest.mark.parametrize("name", MAKERS)
def test_what_is_rebuilt_is_not_kept(name: str, splits: bool) -> None:
    torch.manual_seed(0)
    model, given = Behind(MAKERS[name]()), torch.randn(12, WIDTH)
    expected = of_autograd(model, given)
    found = gradients_of(model, given, splits, model)
    assert not model.kept
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient)


class Doubled(nn.Module):
    """In place, behind its operation."""

    def forward(self, given: Tensor) -> Tensor:
        return F.gelu(given).mul_(2)


@contextmanager
def on_host() -> Iterator[None]:
    with torch.autograd.graph.save_on_cpu():
        yield


@pytest.mark.parametrize(
    ("maker", "around"),
    [
        (nn.ReLU, nullcontext),  # keeps its output itself
        (Doubled, nullcontext),
        (nn.Identity, nullcontext),
        (lambda: nn.LayerNorm(WIDTH).requires_grad_(False), nullcontext),
        (nn.GELU, on_host),  # hooks of others
    ],
)
def test_other_inputs_are_kept(
    maker: Callable[[], nn.Module], around: Callable[[], AbstractContextManager[None]]
) -> None:
    torch.manual_seed(0)
    model, given = Behind(maker()), torch.randn(12, WIDTH)
    expected = of_autograd(model, given)

    def forward(given: Tensor) -> Tensor:
        with around():
            return model(given)  # type: ignore[no-any-return]

    found = gradients_of(model, given, False, forward)
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("splits", [False, True])
def test_within_checkpoints(splits: bool, reentrant: bool) -> None:
    torch.manual_seed(0)
    model, given = Behind(nn.GELU()), torch.randn(12, WIDTH, requires_grad=True)
    expected = of_autograd(model, given)
    found = gradients_of(model, given, splits, lambda given: checkpoint(model, given, use_reentrant=reentrant))
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient)


class Shifted(nn.Module):
    """Keeps nothing for its backward."""

    def forward(self, given: Tensor) -> Tensor:
        return given + 1


@pytest.mark.parametrize("is_frozen", [False, True])
def test_frozen_layers_keep_nothing_for_their_weights(is_frozen: bool) -> None:
    """As autograd: adapters are trained beside large frozen layers."""
    torch.manual_seed(0)
    model, given = Behind(Shifted()), torch.randn(12, WIDTH)
    for layer in (model.left, model.right):
        layer.weight.requires_grad_(not is_frozen)
    expected = of_autograd(model, given)
    found = gradients_of(model, given, False, model)
    assert model.kept != is_frozen
    assert found.keys() == expected.keys()


class Words(nn.Module):
    def __init__(self, **more: object) -> None:
        super().__init__()
        self.words, self.seen, self.kept = nn.Embedding(9, WIDTH, **more), None, False  # type: ignore[arg-type]

    def forward(self, given: Tensor) -> Tensor:
        """Twice, some words more than once."""
        twice: Tensor = self.words(given) * self.words(given.flip(-1)).tanh()
        return twice


@pytest.mark.parametrize("splits", [False, True])
@pytest.mark.parametrize("more", [{}, {"padding_idx": 3}, {"scale_grad_by_freq": True}])
def test_rows_of_an_embedding(more: dict[str, object], splits: bool) -> None:
    torch.manual_seed(0)
    model, given = Words(**more), torch.tensor([[1, 3, 3], [0, 1, 8]])
    expected = of_autograd(model, given)
    found = gradients_of(model, given, splits, model)  # type: ignore[arg-type]
    torch.testing.assert_close(found["words.weight"], expected["words.weight"])
