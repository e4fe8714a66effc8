"""A dense weight that is computed only if its values are wanted."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxcompress.rewrite.lazy import lazy


class Counter:
    """Counts how often the weight was computed."""

    def __init__(self) -> None:
        self.calls = 0
        self.factor = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)

    def __call__(self) -> Tensor:
        self.calls += 1
        return self.factor @ self.factor.T


def weight() -> tuple[Counter, Tensor]:
    counter = Counter()
    return counter, lazy((4, 4), counter.factor, counter)


def test_questions_about_the_type_cost_nothing() -> None:
    counter, w = weight()
    assert isinstance(w, Tensor)
    assert w.dtype == torch.float64
    assert w.shape == (4, 4)
    assert w.device.type == "cpu"
    assert (w.size(0), w.dim(), w.ndim, w.numel(), len(w)) == (4, 2, 2, 16, 4)
    assert w.is_floating_point()
    assert w.requires_grad
    assert counter.calls == 0


USES = {
    "matmul": lambda w: torch.ones(4, dtype=torch.float64) @ w,
    "linear": lambda w: F.linear(torch.ones(2, 4, dtype=torch.float64), w),
    "method": lambda w: w.norm(),
    "operator": lambda w: w + 1,
    "transpose": lambda w: w.T,
    "item": lambda w: w[1],
    "cast": lambda w: w.float(),
    "detach": lambda w: w.detach(),
    "data": lambda w: w.data,
    "copy": lambda w: copy.deepcopy(w.detach()),
    "clone": lambda w: w.clone(),
    "kwargs": lambda w: torch.sum(input=w),
    "list": lambda w: torch.stack([w, w]),
}


@pytest.mark.parametrize("name", USES)
def test_any_other_use_computes_it(name: str) -> None:
    counter, w = weight()
    assert torch.equal(USES[name](w), USES[name](counter()))
    assert counter.calls >= 2


def test_it_is_differentiable() -> None:
    counter, w = weight()
    x = torch.randn(3, 4, dtype=torch.float64)
    F.linear(x, w).square().sum().backward()
    found = counter.factor.grad
    counter.factor.grad = None
    F.linear(x, counter.factor @ counter.factor.T).square().sum().backward()
    torch.testing.assert_close(found, counter.factor.grad)


def test_under_compilation_it_is_an_ordinary_tensor() -> None:
    factor = torch.randn(4, 2)

    def function(x: Tensor) -> Tensor:
        return F.linear(x, lazy((4, 4), factor, lambda: factor @ factor.T))

    x = torch.randn(3, 4)
    compiled = torch.compile(function, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), function(x))
