"""One name per operator, whichever way it was written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fxcompress.graph.canonical import canonicalize
from fxcompress.graph.operator import Operator
from fxcompress.graph.recorder import record

N, M = 6, 4
LINEAR = {"in_features": N, "out_features": M, "dtype": "float32"}


class Function(nn.Module):
    """A function of x, a weight (4 x 6), a bias, and three stacked weights."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(M, N))
        self.turned = nn.Parameter(torch.randn(N, M))
        self.stack = nn.Parameter(torch.randn(3, M, N))
        self.bias = nn.Parameter(torch.randn(M))
        self.child = nn.Identity()  # not a leaf
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def operators(model: nn.Module, *shape: int) -> list[Operator]:
    found = record(model, [torch.randn(shape)]).operators
    return [o for o in found if o.op not in ("input", "output", "parameter")]


@pytest.mark.parametrize(
    ("function", "weight", "bias"),
    [
        (lambda m, x: F.linear(x, m.weight), "weight", False),
        (lambda m, x: F.linear(x, m.weight, m.bias), "weight", True),
        (lambda m, x: F.linear(x, bias=m.bias, weight=m.weight), "weight", True),
        (lambda m, x: F.linear(bias=None, weight=m.weight, input=x), "weight", False),
        (lambda m, x: torch.ops.aten.linear(x, m.weight, m.bias), "weight", True),
        (lambda m, x: x @ m.turned, "turned", False),
        (lambda m, x: x @ m.weight.T, "weight", False),
        (lambda m, x: x.matmul(m.weight.t()), "weight", False),
        (lambda m, x: torch.mm(x, m.turned), "turned", False),
        (lambda m, x: torch.addmm(m.bias, x, m.turned), "turned", True),
        (lambda m, x: F.linear(x, m.stack[1], m.bias), "stack", True),
    ],
)
def test_products_with_a_parameter_are_linear(
    function: Callable[..., Any], weight: str, bias: bool
) -> None:
    last = operators(Function(function), 5, N)[-1]
    assert (last.op, last.weight, last.module) == ("linear", weight, False)
    assert last.attributes == {**LINEAR, "bias": bias}


@pytest.mark.parametrize(
    ("module", "bias"),
    [(nn.Linear(N, M), True), (nn.Linear(N, M, bias=False), False), (Conv1D(M, N), True)],
)
def test_linear_modules_are_linear(module: nn.Module, bias: bool) -> None:
    (found,) = operators(nn.Sequential(module), 5, N)
    assert (found.op, found.weight, found.path, found.module) == ("linear", "0.weight", "0", True)
    assert found.attributes == {**LINEAR, "bias": bias}
    assert found.shape == (5, M)


@pytest.mark.parametrize(
    ("function", "op", "weight"),
    [
        (lambda m, x: torch.einsum("bn,mn->b", x, m.weight), "einsum", "weight"),
        (lambda m, x: m.weight @ x.T, "matmul", "weight"),
        (lambda m, x: torch.matmul(m.stack, x.T), "matmul", "stack"),
    ],
)
def test_other_products_with_a_parameter_name_it(
    function: Callable[..., Any], op: str, weight: str
) -> None:
    last = operators(Function(function), 5, N)[-1]
    assert (last.op, last.weight, last.attributes) == (op, weight, {})


@pytest.mark.parametrize(
    ("function", "op"),
    [
        (lambda m, x: x @ x.T, "matmul"),
        (lambda m, x: x @ (m.weight.T * 2), "matmul"),
        (lambda m, x: F.linear(x, m.weight + 1, m.bias), "linear"),
        (lambda m, x: x[:, :M] + m.weight @ m.turned, "add"),
        (lambda m, x: x[:, :M] + m.bias, "add"),
    ],
)
def test_products_of_computed_values_have_no_weight(function: Callable[..., Any], op: str) -> None:
    found = operators(Function(function), 4, N)
    assert found[-1].op == op
    assert [o.weight for o in found] == [None] * len(found)


def test_a_product_with_a_computed_weight_has_the_attributes_of_linear() -> None:
    (*_, last) = operators(Function(lambda m, x: F.linear(x, m.weight * 2, m.bias)), 5, N)
    assert (last.op, last.weight, last.attributes) == ("linear", None, {**LINEAR, "bias": True})


def test_every_spelling_of_addition_is_add() -> None:
    def function(m: nn.Module, x: Tensor) -> Tensor:
        y = x + 1
        y += 1
        y = y.add(1).add_(1)
        return torch.add(2 + y, 1)

    assert {o.op for o in operators(Function(function), 5, N)} == {"add"}


class Linear(nn.Module):
    """Of the name alone."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(N))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def test_other_classes_with_the_name_of_linear_are_custom() -> None:
    (found,) = operators(nn.Sequential(Linear()), 5, N)
    assert (found.op, found.weight, found.attributes) == ("custom_linear", "0.weight", {})


def test_convolutions_have_all_their_attributes() -> None:
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, bias=False)
    (found,) = operators(nn.Sequential(conv), 1, 4, 8, 8)
    assert found.op == "conv2d"
    assert found.attributes == {
        "in_channels": 4, "out_channels": 6, "kernel_size": (3, 3), "stride": (2, 2),
        "padding": (1, 1), "dilation": (1, 1), "groups": 2, "bias": False,
        "padding_mode": "zeros", "dtype": "float32",
    }  # fmt: skip


CONVOLUTIONS: list[tuple[nn.Module, Callable[..., Any]]] = [
    (
        nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, bias=False),
        lambda x, m: F.conv2d(x, m.weight, None, 2, [1], groups=2),
    ),
    (
        nn.Conv2d(4, 6, (3, 1), padding="same", dilation=(1, 2)),
        lambda x, m: F.conv2d(x, m.weight, m.bias, padding="same", dilation=(1, 2)),
    ),
    (
        nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, dilation=2),
        lambda x, m: F.conv_transpose2d(x, m.weight, m.bias, 2, 0, 0, 2, 2),
    ),
    (nn.Conv1d(4, 6, 3), lambda x, m: torch.ops.aten.conv1d(x[:, :, 0], m.weight, m.bias)),
    (nn.Embedding(9, N), lambda x, m: F.embedding((x[0] > 0).long(), m.weight)),
    (nn.Embedding(9, N), lambda x, m: torch.embedding(m.weight, (x[0] > 0).long())),
]


@pytest.mark.parametrize(("module", "function"), CONVOLUTIONS)
def test_functions_have_the_attributes_of_modules(
    module: nn.Module, function: Callable[..., Any]
) -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, x: Tensor) -> Tensor:
            return function(x, self.inner)

    last = operators(Holder(), 1, 4, 8, 8)[-1]
    wanted = canonicalize(module=module)
    assert (last.op, last.attributes) == (wanted["op"], wanted["attributes"])
    assert (last.weight, last.module) == ("inner.weight", False)


def test_other_modules_go_by_their_plain_names() -> None:
    model = nn.Sequential(nn.LayerNorm(8), nn.GELU(), nn.Dropout(), nn.SiLU(), nn.ReLU6())
    assert [o.op for o in operators(model, 5, 8)] == [
        "layer_norm",
        "gelu",
        "dropout",
        "silu",
        "relu6",
    ]
