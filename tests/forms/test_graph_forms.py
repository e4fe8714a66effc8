"""Templates as forms: what they build, count and compute, for one operator and for several."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fxcompress.forms import Body, Form, JointForm, LinearShape, find_form, template_form
from fxcompress.forms.template import Template, build_template

BOTTLENECK = {
    "down": {"op": "linear", "input": "$x", "weight": "fc.right"},
    "up": {"op": "linear", "input": "$down", "weight": "fc.left", "bias": "fc.bias"},
}
QKV: dict[str, Any] = {
    "h": {"op": "linear", "input": "$x", "weight": "joint.right"},
    "a": {"op": "linear", "input": "$h", "weight": "q.left", "bias": "q.bias"},
    "b": {"op": "linear", "input": "$h", "weight": "k.left"},
}
RANK = 3


def single() -> Template:
    return build_template("graph:one", BOTTLENECK, {"fc": "up"}, {"fc": "x"})


def several() -> Template:
    return build_template("graph:qk", QKV, {"q": "a", "k": "b"}, {"q": "x", "k": "x"})


def normal(*size: int) -> Tensor:
    return torch.randn(*size, dtype=torch.float64)


@pytest.mark.parametrize("bias", [True, False])
def test_one_operator(bias: bool) -> None:
    form = template_form(single())
    assert isinstance(form, Form)
    shape = LinearShape(8, 6, bias, torch.float64)
    body = form.empty(shape, RANK)
    left, right, b, x = normal(6, RANK), normal(RANK, 8), normal(6), normal(2, 5, 8)
    form.fill(body, (left, right), b if bias else None)
    wanted = x @ (left @ right).T + (b if bias else 0)
    torch.testing.assert_close(body(x), wanted)
    torch.testing.assert_close(form.weight(body, shape), left @ right)
    found = form.bias(body, shape)
    assert (found is None) == (not bias)
    if bias:
        torch.testing.assert_close(found, b)
    counted = sum(p.numel() for p in body.parameters()) - 6 * bias
    assert counted == form.parameters(shape, np.array([RANK]))[0] == RANK * (6 + 8)


def test_it_is_what_low_rank_is() -> None:
    shape = LinearShape(8, 6, True, torch.float64)
    left, right, b, x = normal(6, RANK), normal(RANK, 8), normal(6), normal(4, 8)
    outputs = []
    for form in (template_form(single()), find_form("low_rank")):
        body = form.empty(shape, RANK)
        form.fill(body, (left, right), b)
        outputs.append(body(x))
    assert torch.equal(*outputs)


def test_several_operators_share_what_both_need() -> None:
    form = template_form(several())
    assert isinstance(form, JointForm)
    shapes = [LinearShape(8, 6, True, torch.float64), LinearShape(8, 4, False, torch.float64)]
    body = form.empty(shapes, RANK)
    assert [name for name, _ in body.shared.named_children()] == ["h"]
    assert [[name for name, _ in head.named_children()] for head in body.heads] == [["a"], ["b"]]
    lefts, right, b, x = (
        (normal(6, RANK), normal(4, RANK)),
        normal(RANK, 8),
        normal(6),
        normal(5, 8),
    )
    form.fill(body, lefts, right, (b, None))
    for index, (left, bias) in enumerate(zip(lefts, (b, 0), strict=True)):
        torch.testing.assert_close(body.member(index)(x), x @ (left @ right).T + bias)
    modules = (body.shared, *body.heads)
    counted = sum(p.numel() for module in modules for p in module.parameters()) - 6
    assert counted == form.parameters(shapes, np.array([RANK]))[0] == RANK * (8 + 6 + 4)


def test_an_output_may_be_read_by_another() -> None:
    """A shared step is then both handed on and returned."""
    graph = {**QKV, "c": {"op": "add", "inputs": ["$a", "$b"]}}
    form = template_form(
        build_template("graph:r", graph, {"q": "a", "k": "c"}, dict.fromkeys("qk", "x"))
    )
    assert isinstance(form, JointForm)
    shape = LinearShape(8, 6, False, torch.float64)
    body: Body = form.empty([shape, shape], RANK)
    lefts, right, x = (normal(6, RANK), normal(6, RANK)), normal(RANK, 8), normal(5, 8)
    form.fill(body, lefts, right, (None, None))
    q, k = (body.member(index)(x) for index in range(2))
    torch.testing.assert_close(q, x @ (lefts[0] @ right).T)
    torch.testing.assert_close(k, x @ ((lefts[0] + lefts[1]) @ right).T)


def test_all_operators() -> None:
    """Values are what torch computes; widths follow."""
    graph = {
        "h": {"op": "linear", "input": "$x", "weight": "fc.right"},
        **{op: {"op": op, "input": "$h"} for op in ("relu", "gelu", "silu", "tanh", "sigmoid")},
        "s": {"op": "sub", "inputs": ["$relu", "$gelu"]},
        "p": {"op": "mul", "inputs": ["$silu", "$tanh"]},
        "t": {"op": "add", "inputs": ["$s", "$p"]},
        "u": {"op": "add", "inputs": ["$t", "$sigmoid"]},
        "up": {"op": "linear", "input": "$u", "weight": "fc.left"},
    }
    form = template_form(build_template("graph:all", graph, {"fc": "up"}, {"fc": "x"}))
    assert isinstance(form, Form)
    body = form.empty(LinearShape(8, 6, False, torch.float64), RANK)
    left, right, x = normal(6, RANK), normal(RANK, 8), normal(5, 8)
    form.fill(body, (left, right), None)
    h = body.h(x)
    f = torch.nn.functional
    inner = (f.relu(h) - f.gelu(h)) + f.silu(h) * h.tanh() + h.sigmoid()
    torch.testing.assert_close(body(x), body.up(inner))


def test_cat_adds_widths_up() -> None:
    graph = {
        "h": {"op": "linear", "input": "$x", "weight": "joint.right"},
        "a": {"op": "linear", "input": "$h", "weight": "q.left"},
        "b": {"op": "linear", "input": "$h", "weight": "k.left"},
        "c": {"op": "cat", "inputs": ["$a", "$b"]},
    }
    made = build_template("graph:c", graph, {"q": "a", "k": "c"}, {"q": "x", "k": "x"})
    sizes = {"q": {"in_features": 8, "out_features": 6}, "k": {"in_features": 8, "out_features": 4}}
    assert made.misfit(sizes) == "template node 'c' has 10 features, and k has 4"


@pytest.mark.parametrize("make", [single, several])
def test_templates_travel(make: Any) -> None:
    made = make()
    assert Template.model_validate_json(made.model_dump_json()) == made
    for copied in (
        copy.deepcopy(template_form(made)),
        pickle.loads(pickle.dumps(template_form(made))),
    ):
        assert copied.template == made
        assert copied.name == made.name
