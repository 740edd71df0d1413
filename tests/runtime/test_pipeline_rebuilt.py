"""What linear layers behind cheap operations do not keep, and compute again."""

from __future__ import annotations

import weakref
from collections.abc import Callable

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


def gradients_of(
    model: Behind,
    given: Tensor,
    splits: bool,
    forward: Callable[[Tensor], Tensor],
    between: Callable[[Splitter], None] = lambda _: None,
) -> dict[str, Tensor]:
    """By the splitter; `model.seen` is looked at between forward and backward."""
    splitter, reducer = Splitter(model), reducer_of(model)
    with splitter.forward(splits):
        output = forward(given)
    model.kept = model.seen is not None and model.seen() is not None
    between(splitter)
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


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=tolerance, atol=tolerance)


MAKERS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "tanh gelu": lambda: nn.GELU("tanh"),
    "silu": nn.SiLU,
    "layer norm": lambda: nn.LayerNorm(WIDTH, eps=0.1),
    "layer norm without bias": lambda: nn.LayerNorm(WIDTH, bias=False),
    "frozen layer norm": lambda: nn.LayerNorm(WIDTH).requires_grad_(False),
    "layer norm alone": lambda: nn.LayerNorm(WIDTH, elementwise_affine=False),
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
    assert_same(found, expected)


class Changed(nn.Module):
    """In place, where autograd does not look."""

    def forward(self, given: Tensor) -> Tensor:
        made = F.gelu(given)
        with torch.no_grad():
            return made.mul_(2)


class Recomputed(nn.Module):
    """Gives its saved tensors once."""

    def __init__(self, maker: nn.Module) -> None:
        super().__init__()
        self.maker = maker

    def forward(self, given: Tensor) -> Tensor:
        made: Tensor = checkpoint(self.maker, given, use_reentrant=False)
        return made


class Lent(nn.Module):
    """Scaled, but nobody has the scale's values when the linear layers run: as a sharded parameter's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH))
        self.slot, self.whole = self.weight.data, self.weight.data.clone()

    def lend(self, *_: Tensor) -> None:
        self.weight.data = self.slot.copy_(self.whole)

    def take_back(self) -> None:
        self.weight.data = torch.full((1,), float("nan")).expand(WIDTH)
        self.slot.fill_(float("nan"))

    def forward(self, given: Tensor) -> Tensor:
        self.lend()
        made = self.weight * given.tanh()
        made.register_hook(self.lend)
        self.take_back()
        return made


class LentLonger(Lent):
    """The linear layers still see the values in the forward, but not in the backward."""

    def forward(self, given: Tensor) -> Tensor:
        self.lend()
        made = self.weight * given.tanh()
        made.register_hook(self.lend)
        return made


@pytest.mark.parametrize("splits", [False, True])
@pytest.mark.parametrize("maker", [nn.ReLU, nn.Identity, Changed, Lent])
def test_other_inputs_are_kept(maker: Callable[[], nn.Module], splits: bool) -> None:
    torch.manual_seed(0)
    model, given = Behind(maker()), torch.randn(12, WIDTH)
    expected = of_autograd(model, given)
    found = gradients_of(model, given, splits, model)
    assert model.kept
    assert_same(found, expected)


class ChangedBetween(Behind):
    """In place, where autograd does not look, when one linear layer has had it."""

    def forward(self, given: Tensor) -> Tensor:
        made = self.maker(self.before(given))
        left = self.left(made)
        with torch.no_grad():
            made.mul_(2)
        both: Tensor = left + self.right(made)
        return both


class Doubled(Behind):
    """The same for plain autograd."""

    def forward(self, given: Tensor) -> Tensor:
        made = self.maker(self.before(given))
        both: Tensor = self.left(made) + self.right(made + made.detach())
        return both


def test_an_input_that_is_changed_between_two_layers() -> None:
    model, given = ChangedBetween(nn.GELU()), torch.randn(12, WIDTH)
    plain = Doubled(nn.GELU())
    plain.load_state_dict(model.state_dict())
    assert_same(gradients_of(model, given, False, model), of_autograd(plain, given))


@pytest.mark.parametrize("name", MAKERS)
def test_what_a_checkpoint_makes_again_is_kept(name: str) -> None:
    torch.manual_seed(0)
    model, given = Behind(Recomputed(MAKERS[name]())), torch.randn(12, WIDTH)
    expected = of_autograd(model, given)
    found = gradients_of(model, given, False, model)
    assert model.kept
    assert_same(found, expected)


@pytest.mark.parametrize("name", MAKERS)
def test_under_hooks_of_others(name: str) -> None:
    torch.manual_seed(0)
    model, given = Behind(MAKERS[name]()), torch.randn(12, WIDTH)
    expected = of_autograd(model, given)

    def forward(given: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return model(given)  # type: ignore[no-any-return]

    assert_same(gradients_of(model, given, False, forward), expected)


@pytest.mark.parametrize("name", ["layer norm", "scaled"])
def test_where_parameters_are_larger_than_what_they_make_it_is_kept(name: str) -> None:
    torch.manual_seed(0)
    model, given = Behind(MAKERS[name]()), torch.randn(1, WIDTH)
    expected = of_autograd(model, given)
    found = gradients_of(model, given, False, model)
    assert model.kept
    assert_same(found, expected)


def test_a_scale_that_is_taken_away_before_the_backward() -> None:
    """As ZeRO's stage 3 does, and uses its memory for others."""
    torch.manual_seed(0)
    lent = LentLonger()
    model, given = Behind(lent), torch.randn(12, WIDTH)
    expected = of_autograd(model, given)

    def forward(given: Tensor) -> Tensor:
        output: Tensor = model(given)
        lent.take_back()
        return output

    found = gradients_of(model, given, False, forward)
    assert not model.kept
    assert_same(found, expected)


@pytest.mark.parametrize("splits", [False, True])
def test_a_norm_whose_parameters_change_before_the_backward(splits: bool) -> None:
    """As ZeRO's stage 3 takes them away: their values of the forward count, and its eps."""
    torch.manual_seed(0)
    norm = nn.LayerNorm(WIDTH, eps=1e-5)
    model, given = Behind(norm), torch.randn(12, WIDTH)
    norm.eps = 0.5  # since the splitter has seen it, in the second case
    expected = of_autograd(model, given)
    norm.eps = 1e-5

    def forward(given: Tensor) -> Tensor:
        norm.eps = 0.5
        output: Tensor = model(given)
        norm.eps = 1e-5
        norm.weight.data = torch.full((1,), float("nan")).expand(WIDTH)
        norm.bias.data = torch.full((1,), float("nan")).expand(WIDTH)
        return output

    found = gradients_of(model, given, splits, forward)
    assert not model.kept
    for name in ("left.weight", "right.weight", "left.bias"):
        torch.testing.assert_close(found[name], expected[name])


class Penalized(nn.Module):
    """Asks for gradients itself, of its input and of weights, and differentiates them again."""

    def __init__(self, maker: nn.Module) -> None:
        super().__init__()
        self.inner, self.maker, self.outer = nn.Linear(WIDTH, WIDTH), maker, nn.Linear(WIDTH, WIDTH)

    def forward(self, given: Tensor) -> Tensor:
        made = self.outer(self.maker(self.inner(given)))
        watched = (given, self.inner.weight, self.outer.weight, self.outer.bias)
        asked = torch.autograd.grad(made.square().sum(), watched, create_graph=True)
        penalty = sum(((each / 100).square().sum() for each in asked), start=made.new_zeros(()))
        return made + penalty


@pytest.mark.parametrize("splits", [False, True])
@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize("name", ["gelu", "layer norm", "scaled"])
def test_gradients_that_a_forward_asks_for_itself(name: str, is_checkpointed: bool, splits: bool) -> None:
    torch.manual_seed(0)
    penalized: nn.Module = Penalized(MAKERS[name]())
    model, given = Behind(Recomputed(penalized) if is_checkpointed else penalized), torch.randn(12, WIDTH)
    expected = of_autograd(model, given)
    found = gradients_of(model, given, splits, model)
    assert_same(found, expected, 1e-4)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.other.weight = self.one.weight

    def forward(self, given: Tensor) -> Tensor:
        made: Tensor = self.other(F.gelu(self.one(given)))
        return made


@pytest.mark.parametrize("splits", [False, True])
def test_a_forward_is_run_again_as_it_was(splits: bool) -> None:
    """Though the next one, by then, has been of the other kind."""
    torch.manual_seed(0)
    model, given = Behind(Recomputed(Tied())), torch.randn(12, WIDTH)
    expected = of_autograd(model, given)

    def between(splitter: Splitter) -> None:
        with splitter.forward(not splits):
            model(given)

    assert_same(gradients_of(model, given, splits, model, between), expected)


class Named(nn.Module):
    """Calls its layers as few do, has a bias that is none of a layer's parameters, and a weight that is watched."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.first, self.watched = nn.Embedding(9, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.shift = nn.Parameter(torch.zeros(WIDTH))
        del self.first.bias
        self.seen, self.kept, self.sizes = None, False, list[float]()
        self.watched.weight.register_post_accumulate_grad_hook(self._note)

    def _note(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.sizes.append(parameter.grad.norm().item())

    def forward(self, given: Tensor) -> Tensor:
        self.first.bias = self.shift.sin()  # type: ignore[assignment] # as torch allows
        watched: Tensor = self.watched(input=self.first(input=self.words(input=given)))
        return watched


@pytest.mark.parametrize("splits", [False, True])
def test_layers_that_are_used_otherwise(splits: bool) -> None:
    torch.manual_seed(0)
    model, given = Named(), torch.tensor([1, 3, 8, 1])
    expected = of_autograd(model, given)
    expected_sizes, model.sizes = model.sizes, []
    found = gradients_of(model, given, splits, model)  # type: ignore[arg-type]
    assert model.sizes == pytest.approx(expected_sizes)
    assert_same(found, expected)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("splits", [False, True])
def test_within_checkpoints(splits: bool, reentrant: bool) -> None:
    torch.manual_seed(0)
    model, given = Behind(nn.GELU()), torch.randn(12, WIDTH, requires_grad=True)
    expected = of_autograd(model, given)
    found = gradients_of(model, given, splits, lambda given: checkpoint(model, given, use_reentrant=reentrant))
    assert_same(found, expected)


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
