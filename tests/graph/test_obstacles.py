"""What cannot be rewritten is said, with the reason, and left as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fxcompress
from fxcompress.graph.eligible import obstacle
from fxcompress.rewrite import Factorized, record_operators
from tests.full_rank import factorized, rewrite
from tests.zoo import ZOO

N = 8


class Pair(nn.Module):
    """``b(a(x))``, where tests do something to a."""

    def __init__(self, a: nn.Module | None = None) -> None:
        super().__init__()
        self.a = a or nn.Linear(N, N)
        self.b = nn.Linear(N, N)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))


def reasons(model: nn.Module, example: Any = None) -> dict[str, str | None]:
    """Reason (or None) per path, or per weight where there is no path."""
    example = torch.randn(3, N) if example is None else example
    recording = record_operators(model, [example])
    reason = obstacle(model, recording, (Factorized,))
    return {o.path or str(o.weight): reason(o) for o in recording.operators if o.op == "linear"}


class Doubling(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class Spelt(nn.Linear):
    """A forward of its own that is the plain one."""

    def forward(self, input: Tensor) -> Tensor:
        product = input @ self.weight.T
        return product if self.bias is None else product + self.bias


class Twice(nn.Linear):
    """Of the same operators, and another function."""

    def forward(self, input: Tensor) -> Tensor:
        product = input @ self.weight.T + self.bias
        return product + self.bias


class Noisy(nn.Linear):
    """The plain one in evaluation only."""

    def forward(self, input: Tensor) -> Tensor:
        product = input @ self.weight.T + self.bias
        return product + torch.randn_like(product) if self.training else product


class Negative(nn.Linear):
    """Equal to the plain one on what it is recorded on: positive products."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.relu(input @ self.weight.T) + self.bias


class OwnConvolution(nn.Conv1d):
    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight, self.bias)


class Centred(nn.Conv1d):
    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight - self.weight.mean(), self.bias)


class Named(nn.Linear):
    """A subclass without a forward of its own is as good as its base class."""


class Special(nn.Parameter):
    pass


def _hook(register: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = Pair()
        getattr(model.a, register)(lambda *args: None)
        return model

    return make


def _forward_on_instance() -> nn.Module:
    model = Pair()
    model.a.forward = lambda x: F.linear(x, model.a.weight)
    return model


def _tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(N, N), nn.ReLU(), Pair())
    model[2].a.weight = model[0].weight
    return model


def _tied_by_data() -> nn.Module:
    model = nn.Sequential(nn.Linear(N, N), nn.ReLU(), Pair())
    model[2].a.weight.data = model[0].weight.data
    return model


def _tied_bias() -> nn.Module:
    model = Pair()
    model.a.bias = model.b.bias
    return model


def _buffer() -> nn.Module:
    model = Pair()
    model.a.register_buffer("scale", torch.ones(1))
    return model


def _special() -> nn.Module:
    model = Pair()
    model.a.weight = Special(model.a.weight.data)
    return model


class Stranger(Pair):
    def __init__(self, part: str) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + getattr(self.a, self.part).sum()


@pytest.mark.parametrize(
    ("make", "path", "reason"),
    [
        (lambda: Pair(parametrizations.weight_norm(nn.Linear(N, N))), "a", "parametrized"),
        (lambda: Pair(nn.utils.weight_norm(nn.Linear(N, N))), "a", "made by a hook"),
        (_forward_on_instance, "a", "replaced on the instance"),
        (_hook("register_forward_hook"), "a", "hooks"),
        (_hook("register_forward_pre_hook"), "a", "hooks"),
        (_hook("register_full_backward_hook"), "a", "hooks"),
        (_hook("register_full_backward_pre_hook"), "a", "hooks"),
        (_tied, "0", "tied to 2.a.weight"),
        (_tied, "2.a", "tied to 2.a.weight"),
        (_tied_by_data, "2.a", "tied to 2.a.weight"),
        (_tied_bias, "a", "bias is tied"),
        (_tied_bias, "b", "bias is tied"),
        (_buffer, "a", "more than a weight and a bias: scale"),
        (_special, "a", "a Special, not a plain parameter"),
        (lambda: Stranger("weight"), "a", "weight is also read by the model"),
        (lambda: Stranger("bias"), "a", "bias is also read by the model"),
        (lambda: nn.Linear(N, N), "weight", "it is the model itself"),
    ],
)
def test_reasons(make: Callable[[], nn.Module], path: str, reason: str) -> None:
    model = make()
    found = reasons(model)
    assert reason in str(found[path])
    others = {other: why for other, why in found.items() if other == "b" != path}
    assert set(others.values()) <= {None} or "bias is tied" in reason


def test_ordinary_layers_have_no_reason() -> None:
    assert reasons(Pair()) == {"a": None, "b": None}
    assert reasons(Pair(Named(N, N))) == {"a": None, "b": None}


@pytest.mark.parametrize("make", [Spelt, Twice, Noisy, Negative, Doubling])
@pytest.mark.parametrize("training", [False, True])
def test_what_a_forward_of_its_own_does_with_the_product_stays(
    make: type[nn.Linear], training: bool
) -> None:
    assert reasons(Pair(make(N, N))) == {"a": None, "b": None}
    x = torch.randn(3, N, dtype=torch.float64)
    pair = rewrite(Pair(make(N, N)).double(), x)
    assert set(factorized(pair.model)) == {"a", "b"}
    found = []
    for model in (pair.model, pair.original):
        torch.manual_seed(0)
        found.append(model.train(training)(x))
    torch.testing.assert_close(*found, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("make", "same"), [(OwnConvolution, True), (Centred, False)])
def test_convolutions_with_a_forward_of_their_own(make: type[nn.Conv1d], same: bool) -> None:
    model = nn.Sequential(make(4, 4, 3), nn.ReLU())
    recording = record_operators(model, [torch.randn(2, 4, 9)])
    reason = obstacle(model, recording, (Factorized,))
    (found,) = (reason(o) for o in recording.operators if o.op == "conv1d")
    assert (found is None) is same


@pytest.mark.parametrize(
    ("make", "left"),
    [
        (lambda: Pair(parametrizations.weight_norm(nn.Linear(N, N))), {"a"}),
        (lambda: Pair(nn.utils.weight_norm(nn.Linear(N, N))), {"a"}),
        (_forward_on_instance, {"a"}),
        (_hook("register_forward_hook"), {"a"}),
        (_tied, {"0", "2.a"}),
        (_buffer, {"a"}),
        (lambda: Stranger("weight"), {"a"}),
    ],
)
def test_the_rest_is_rewritten_and_nothing_else(
    make: Callable[[], nn.Module], left: set[str]
) -> None:
    x = torch.randn(3, N, dtype=torch.float64)
    pair = rewrite(make().double(), x)
    linear = {name for name, m in pair.original.named_modules() if isinstance(m, nn.Linear)}
    assert set(factorized(pair.model)) == linear - left
    for path in left:
        old, new = pair.original.get_submodule(path), pair.model.get_submodule(path)
        assert type(old).__name__ == type(new).__name__
        state = new.state_dict()
        assert state.keys() == old.state_dict().keys()
        assert all(torch.equal(state[k], v) for k, v in old.state_dict().items())
    with torch.no_grad():
        # Two 8 x 8 layers in float64: 1e-16 times a condition number of 1e4.
        torch.testing.assert_close(pair.model(x), pair.original(x), rtol=0, atol=1e-11)


def test_a_module_under_two_names_is_one_site_replaced_at_both() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = self.second = nn.Linear(N, N)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.relu(self.first(x)))

    pair = rewrite(Shared().double(), torch.randn(3, N, dtype=torch.float64))
    (site,) = pair.sites
    assert (site.name, site.calls, site.shape.rows) == ("first", 2, 6)
    assert isinstance(pair.model.first, Factorized)
    assert pair.model.second is pair.model.first


def reported(model: nn.Module, example: Any) -> dict[str, str]:
    """What the plan says of weights that stay: weight -> reason."""
    planned = fxcompress.plan(model, "every-linear", [example], keep=0.9, progress=False)
    return {entry.weight: entry.reason for entry in planned.unmatched}


@pytest.mark.parametrize(
    ("name", "weight", "reason"),
    [
        ("tied", "embedding.weight", "shares_weight_with embedding"),
        ("einsum", "heads", "no rule is about operator einsum"),
        ("mamba", "backbone.layers.0.mixer.dt_proj.weight", "no rule is about operator matmul"),
        ("resnet", "layer1.0.conv1.weight", "no rule is about operator conv2d"),
    ],
)
def test_every_weight_that_is_applied_and_stays_is_in_the_plan(
    name: str, weight: str, reason: str
) -> None:
    case = ZOO[name]
    assert reason in reported(case.build(), case.batch())[weight]


def test_a_class_that_only_has_the_name_of_linear_is_seen_through() -> None:
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(N, N))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight * 2

    assert reported(Pair(Linear()), torch.randn(3, N)) == {}
