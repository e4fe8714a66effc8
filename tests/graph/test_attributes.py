"""Attributes of plain operators, and operands in the order of the arguments."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from transformers.activations import ACT2FN

from fxcompress.graph.operator import Operator
from fxcompress.graph.recorder import record
from fxcompress.rules.language.vocabulary import PLAIN_OPERATORS
from tests.zoo import ZOO


class Calls(nn.Module):
    """A model that is one expression of its input."""

    def __init__(self, function: Callable[[Tensor], Any], leaf: nn.Module | None = None) -> None:
        super().__init__()
        self.function = function
        self.leaf = leaf
        self.child = nn.Identity()  # a module without children would be one node

    def forward(self, x: Tensor) -> Any:
        return self.function(x) if self.leaf is None else self.leaf(x)


def operators(function: Any, x: Tensor | None = None) -> list[Operator]:
    leaf = function if isinstance(function, nn.Module) else None
    x = torch.randn(2, 4, 6) if x is None else x
    recording = record(Calls(function, leaf), [x])
    return [each for each in recording.operators if each.op not in ("input", "output")]


def only(function: Any, op: str) -> dict[str, Any]:
    (found,) = (dict(each.attributes) for each in operators(function) if each.op == op)
    return found


Q = torch.randn(2, 1, 4, 6)
CASES: dict[str, list[tuple[Any, dict[str, Any]]]] = {
    "add": [
        (lambda x: x + 2, {"other": 2}),
        (lambda x: 1.5 + x, {"other": 1.5}),
        (lambda x: torch.add(x, other=3), {"other": 3}),
        (lambda x: x.add_(1.0), {"other": 1.0}),
        (lambda x: x + x, {}),
        (lambda x: x + True, {}),
    ],
    # The number is ``other`` only if it stands second: 1 - x is not x - 1.
    "sub": [
        (lambda x: x - 2, {"other": 2}),
        (lambda x: torch.subtract(x, 2), {"other": 2}),
        (lambda x: torch.sub(x, x), {}),
        (lambda x: 2 - x, {}),
    ],
    "mul": [
        (lambda x: x * 0.5, {"other": 0.5}),
        (lambda x: 0.5 * x, {"other": 0.5}),
        (lambda x: x.mul(x), {}),
    ],
    "div": [
        (lambda x: torch.div(x, 8.0), {"other": 8.0}),
        (lambda x: x / 8.0, {"other": 8.0}),
        (lambda x: 8.0 / x, {}),
    ],
    "pow": [
        (lambda x: x.pow(2), {"exponent": 2}),
        (lambda x: x**0.5, {"exponent": 0.5}),
        (lambda x: 2**x, {}),
    ],
    "batch_norm": [
        (nn.BatchNorm1d(4, eps=1e-3), {"num_features": 4, "eps": 1e-3}),
        (
            lambda x: F.batch_norm(x, torch.arange(4.0), torch.arange(4.0), eps=1e-3),
            {"num_features": 4, "eps": 1e-3},
        ),
    ],
    "cat": [
        (lambda x: torch.cat([x, x]), {"dim": -3}),
        (lambda x: torch.cat((x, x), dim=1), {"dim": -2}),
        (lambda x: torch.cat([x, x], -1), {"dim": -1}),
        (lambda x: torch.concat([x, x], axis=2), {"dim": -1}),
        (lambda x: torch.cat([torch.tensor([]), x], dim=2), {"dim": -1}),
    ],
    "stack": [
        (lambda x: torch.stack([x, x]), {"dim": -4}),
        (lambda x: torch.stack([x], 3), {"dim": -1}),
    ],
    "chunk": [
        (lambda x: x.chunk(3, dim=-1)[0] + 0, {"chunks": 3, "dim": -1}),
        (lambda x: torch.chunk(x, 2)[0] + 0, {"chunks": 2, "dim": -3}),
    ],
    "split": [
        (lambda x: x.split(2, dim=2)[1] + 0, {"dim": -1}),
        (lambda x: x.split(1)[0] + 0, {"dim": -3}),
    ],
    "unbind": [
        (lambda x: x.unbind()[0] + 0, {"dim": -3}),
        (lambda x: x.unbind(2)[0] + 0, {"dim": -1}),
    ],
    "dropout": [
        (nn.Dropout(0.3), {"p": 0.3}),
        (lambda x: F.dropout(x, training=False), {"p": 0.5}),
        (lambda x: F.dropout(x, p=0.1, training=False), {"p": 0.1}),
    ],
    "elu": [(nn.ELU(0.7), {"alpha": 0.7}), (lambda x: F.elu(x), {"alpha": 1.0})],
    "flatten": [
        (lambda x: x.flatten(1), {"start_dim": -2, "end_dim": -1}),
        (nn.Flatten(), {"start_dim": -2, "end_dim": -1}),
    ],
    "gelu": [
        (nn.GELU(), {"approximate": "none"}),
        (nn.GELU("tanh"), {"approximate": "tanh"}),
        (lambda x: F.gelu(x), {"approximate": "none"}),
        (lambda x: F.gelu(x, approximate="tanh"), {"approximate": "tanh"}),
        (ACT2FN["gelu"], {"approximate": "none"}),
        (ACT2FN["gelu_new"], {"approximate": "tanh"}),
        (ACT2FN["gelu_pytorch_tanh"], {"approximate": "tanh"}),
        (ACT2FN["gelu_accurate"], {"approximate": "tanh"}),
    ],
    "getitem": [(lambda x: x[1], {"index": 1}), (lambda x: x[:, 0], {})],
    "glu": [(lambda x: F.glu(x, 1), {"dim": -2}), (nn.GLU(), {"dim": -1})],
    "group_norm": [(nn.GroupNorm(2, 4), {"num_groups": 2, "eps": 1e-5})],
    "layer_norm": [
        (nn.LayerNorm(6, eps=1e-6), {"eps": 1e-6}),
        (lambda x: F.layer_norm(x, (6,)), {"eps": 1e-5}),
    ],
    "leaky_relu": [
        (nn.LeakyReLU(0.2), {"negative_slope": 0.2}),
        (lambda x: F.leaky_relu(x), {"negative_slope": 0.01}),
    ],
    "rms_norm": [(nn.RMSNorm(6, eps=1e-4), {"eps": 1e-4}), (lambda x: F.rms_norm(x, (6,)), {})],
    "softmax": [
        (nn.Softmax(2), {"dim": -1}),
        (lambda x: x.softmax(1), {"dim": -2}),
        (lambda x: torch.softmax(x, dim=-1), {"dim": -1}),
    ],
    "log_softmax": [(lambda x: F.log_softmax(x, -1), {"dim": -1})],
    "scaled_dot_product_attention": [
        (
            lambda x: F.scaled_dot_product_attention(Q, Q, Q + x.sum(), is_causal=True),
            {"is_causal": True, "dropout_p": 0.0},
        )
    ],
    "squeeze": [(lambda x: x[:1].squeeze(0), {"dim": -3})],
    "unsqueeze": [
        (lambda x: x.unsqueeze(0), {"dim": -4}),
        (lambda x: x.unsqueeze(-1), {"dim": -1}),
    ],
    "transpose": [
        (lambda x: x.transpose(1, 2), {"dim0": -2, "dim1": -1}),
        (lambda x: x.transpose(-1, -2), {"dim0": -2, "dim1": -1}),
        (lambda x: x.swapaxes(0, 1), {"dim0": -3, "dim1": -2}),
        (lambda x: torch.swapaxes(x, axis0=2, axis1=0), {"dim0": -3, "dim1": -1}),
        (lambda x: x.mT, {"dim0": -2, "dim1": -1}),
        (lambda x: x[0].T, {"dim0": -2, "dim1": -1}),
    ],
}


@pytest.mark.parametrize("op", CASES)
def test_attributes(op: str) -> None:
    for function, wanted in CASES[op]:
        found = only(function, op)
        assert found == wanted
        assert {k: type(v) for k, v in found.items()} == {k: type(v) for k, v in wanted.items()}


KINDS: dict[str, Any] = {"int": int, "bool": bool, "str": str, "float": (int, float)}


def test_the_vocabulary_of_rules_is_what_is_recorded() -> None:
    """Every attribute that a rule may ask for occurs, with the type that is promised."""
    promised = {op: set(attributes) for op, attributes in PLAIN_OPERATORS.items() if attributes}
    occurring = {op: {name for _, w in cases for name in w} for op, cases in CASES.items()}
    assert promised == occurring
    for op, cases in CASES.items():
        for _, wanted in cases:
            for name, value in wanted.items():
                assert isinstance(value, KINDS[PLAIN_OPERATORS[op][name].kind]), (op, name)


def test_parts_of_one_value_are_told_apart() -> None:
    def both(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return a - b

    items = [each for each in operators(both) if each.op == "getitem"]
    assert [each.attributes["index"] for each in items] == [0, 1]


# ---- operands -------------------------------------------------------------------------


def test_operands_keep_their_order_and_repetitions() -> None:
    def function(x: Tensor) -> Tensor:
        a, b = x.relu(), x.tanh()
        return (
            torch.cat([b, a, b])
            + torch.where(condition=a > 0, input=b, other=a).sum()
            + (a + a).sum()
        )

    found = {each.op: each for each in operators(function) if each.op in ("cat", "where")}
    assert found["cat"].inputs == ("tanh", "relu", "tanh")
    assert found["where"].inputs[1:] == ("tanh", "relu")
    twice = next(each for each in operators(function) if each.inputs == ("relu", "relu"))
    assert twice.op == "add"
    relu = next(each for each in operators(function) if each.op == "relu")
    assert len(set(relu.users)) == len(relu.users)


def test_inputs_of_all_models_are_nodes_before() -> None:
    for name in ("llama", "gpt2", "resnet"):
        seen: set[str] = set()
        for each in record(ZOO[name].build(), [ZOO[name].batch()]).operators:
            assert set(each.inputs) <= seen
            seen.add(each.name)


# ---- names ----------------------------------------------------------------------------


@torch.library.custom_op("tests::linear", mutates_args=())
def foreign_linear(x: Tensor, scale: float, weight: Tensor) -> Tensor:
    """An operator of some library that is no ``F.linear``."""
    return x @ weight.T * scale


class MyGate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


class MyGQARouter2(MyGate):
    pass


class GELU(MyGate):
    """Of a user, who may mean either approximation, or another function."""


def test_names_of_modules() -> None:
    expected = {
        ACT2FN["silu"]: "silu",
        ACT2FN["quick_gelu"]: "quick_gelu",
        ACT2FN["relu"]: "relu",
        transformers.models.llama.modeling_llama.LlamaRMSNorm(6): "rms_norm",
        transformers.models.t5.modeling_t5.T5LayerNorm(6): "rms_norm",
        MyGate(): "my_gate",
        MyGQARouter2(): "my_gqa_router2",
        nn.MaxPool2d(1): "max_pool2d",
        nn.LogSigmoid(): "logsigmoid",
        GELU(): "gelu",
    }
    for module, op in expected.items():
        assert [each.op for each in operators(module)] == [op], module
    (norm,) = operators(transformers.models.llama.modeling_llama.LlamaRMSNorm(6, eps=1e-5))
    assert norm.attributes == {"eps": 1e-5}
    assert only(GELU(), "gelu") == {}


@pytest.mark.parametrize(
    ("function", "op"),
    [
        (lambda x: torch.multiply(x, x), "mul"),
        (lambda x: x.clip(0, 1), "clamp"),
        (lambda x: x // 2, "floor_divide"),
        (lambda x: torch.div(x, 2, rounding_mode="floor"), "floor_divide"),
        (lambda x: torch.div(x, 2, rounding_mode="trunc"), "div_trunc"),
        (lambda x: torch.div(x, 2, rounding_mode=None), "div"),
        (lambda x: x.add(x, alpha=2), "add_multiple"),
        (lambda x: x.add(x, alpha=1), "add"),
        (lambda x: torch.rand(3, 4, 5).T, "T"),  # of three dimensions: all are reversed
        (lambda x: ~(x > 0), "invert"),
        (lambda x: (x > 0).__iand__(x > 1), "and"),
        (lambda x: 1 // x, "floor_divide"),
        (lambda x: 1 % x, "remainder"),
        (lambda x: torch.greater_equal(x, 1), "ge"),
        (lambda x: F.logsigmoid(x), "logsigmoid"),
        (lambda x: torch.special.softmax(x, -1), "softmax"),
        (lambda x: foreign_linear(x, 2.0, x[0]), "tests_linear"),
    ],
)
def test_names_of_functions(function: Any, op: str) -> None:
    assert operators(function)[-1].op == op


@pytest.mark.parametrize("name", ["mixtral", "wav2vec2", "swin", "clip"])
def test_names_are_words(name: str) -> None:
    """Models with classes and functions of odd names: MixtralTopKRouter, _weight_norm."""
    for each in record(ZOO[name].build(), [ZOO[name].batch()]).operators:
        assert re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", each.op), each.op


# ---- which modules ran ----------------------------------------------------------------


def test_called_modules_are_listed() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used = nn.Sequential(spectral_norm(nn.Linear(6, 6)), nn.ReLU())
            self.unused = nn.Linear(6, 6)
            self.sometimes = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            y = self.used(x)
            return self.sometimes(y) if len(x) > 2 else y

    model, x = Half(), torch.randn(2, 6)
    inside = "used.0.parametrizations.weight"  # of a leaf
    always = {"", "used", "used.0", "used.1", inside, f"{inside}.0"}
    assert record(model, [x]).called.keys() == always
    assert record(model, [x, torch.randn(3, 6)]).called.keys() == always | {"sometimes"}
