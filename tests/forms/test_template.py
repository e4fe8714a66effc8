"""Templates as written: what is wrong with them, what they cost, and what they fit."""

from __future__ import annotations

from typing import Any

import pytest

from fxcompress.forms.template import Fault, Template, TemplateErrors, build_template

DOWN = {"op": "linear", "input": "$x", "weight": "fc.right"}
UP = {"op": "linear", "input": "$down", "weight": "fc.left", "bias": "fc.bias"}
QKV: dict[str, Any] = {
    "h": {"op": "linear", "input": "$x", "weight": "joint.right"},
    "a": {"op": "linear", "input": "$h", "weight": "q.left"},
    "b": {"op": "linear", "input": "$h", "weight": "k.left"},
}
LINEAR = {"in_features": 8, "out_features": 6, "bias": False}


def build(
    graph: dict[str, Any], outputs: dict[str, str] | None = None, *roles: str, value: str = "x"
) -> Template:
    return build_template("graph:t", graph, outputs, dict.fromkeys(roles or ("fc",), value))


def problems(graph: dict[str, Any], outputs: Any = None, *roles: str) -> list[Fault]:
    with pytest.raises(TemplateErrors) as caught:
        build(graph, outputs, *roles)
    assert all(problem.message in str(caught.value) for problem in caught.value.problems)
    return list(caught.value.problems)


def test_outputs_may_be_left_out_where_there_is_no_doubt() -> None:
    assert build({"down": DOWN, "up": UP}).outputs == (("fc", "up"),)
    (problem,) = problems(QKV, None, "q", "k")
    assert problem.code == "missing-outputs"
    assert problem.hint == "for example outputs: {q: b}"


def test_steps_come_in_an_order_in_which_they_can_run() -> None:
    assert [step.name for step in build({"up": UP, "down": DOWN}).steps] == ["down", "up"]


def test_cost_of_one_operator() -> None:
    template = build({"down": DOWN, "up": UP})
    assert template.cost == "r * fc.in_features + r * fc.out_features"
    assert template.parameters({"r": 3, "fc.in_features": 8, "fc.out_features": 6}) == 3 * (8 + 6)


def test_cost_of_several() -> None:
    template = build(QKV, {"q": "a", "k": "b"}, "q", "k")
    assert template.cost == "r * q.in_features + r * q.out_features + r * k.out_features"
    sizes = {"r": 2, "q.in_features": 8, "q.out_features": 6, "k.out_features": 4}
    assert template.parameters(sizes) == 2 * (8 + 6 + 4)


CASES: dict[str, tuple[dict[str, Any], dict[str, str] | None, tuple[Any, ...], str, str]] = {
    "operator": (
        {"down": DOWN, "up": {**UP, "op": "softmax"}},
        None,
        ("graph", "up", "op"),
        "unknown-operator",
        "a template has no operator 'softmax'",
    ),
    "arity": (
        {"down": DOWN, "up": {**UP, "input": None, "inputs": ["$down", "$x"]}},
        None,
        ("graph", "up"),
        "wrong-inputs",
        "linear takes one input, not 2",
    ),
    "cat of one": (
        {"down": DOWN, "c": {"op": "cat", "input": "$down"}, "up": {**UP, "input": "$c"}},
        None,
        ("graph", "c"),
        "wrong-inputs",
        "cat takes two or more inputs, not 1",
    ),
    "unbound in a list": (
        {"down": DOWN, "s": {"op": "add", "inputs": ["$down", "$y"]}, "up": {**UP, "input": "$s"}},
        None,
        ("graph", "s", "inputs", 1),
        "unbound-value",
        "'$y' is neither a node of the graph nor what the match reads",
    ),
    "weight of a single operator": (
        {"down": {**DOWN, "weight": "joint.right"}, "up": UP},
        None,
        ("graph", "down", "weight"),
        "unknown-source",
        "there is no weight 'joint.right'",
    ),
    "bias": (
        {"down": DOWN, "up": {**UP, "bias": "fc.left"}},
        None,
        ("graph", "up", "bias"),
        "unknown-source",
        "there is no bias 'fc.left'",
    ),
    "clash": (
        {"x": DOWN, "up": {**UP, "input": "$x"}},
        None,
        ("graph", "x"),
        "name-clash",
        "'x' is what the match reads; the node needs another name",
    ),
    "ranks that never fit": (
        {
            "down": DOWN,
            "c": {"op": "cat", "inputs": ["$down", "$down"]},
            "up": {**UP, "input": "$c"},
        },
        None,
        ("graph", "up", "weight"),
        "shape-mismatch",
        "'up' reads 2 r features, and fc.left takes r",
    ),
    "output of the rank's width": (
        {"down": DOWN},
        None,
        ("outputs", "fc"),
        "shape-mismatch",
        "'down' has r features, and fc has fc.out_features",
    ),
    "sum of what never fits": (
        {"down": DOWN, "s": {"op": "add", "inputs": ["$down", "$x"]}, "up": {**UP, "input": "$s"}},
        None,
        ("graph", "s"),
        "shape-mismatch",
        "'s' joins values of r and fc.in_features features",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_problems(case: str) -> None:
    graph, outputs, path, code, message = CASES[case]
    (problem,) = problems(graph, outputs)
    assert (problem.path, problem.code, problem.message) == (path, code, message)


def test_all_problems_at_once() -> None:
    up = {"op": "linear", "input": "$dwon", "weight": "fc.lfet"}
    found = problems({"down": {**DOWN, "op": "linaer"}, "up": up}, {"fc": "up"})
    assert [problem.code for problem in found] == [
        "unknown-operator",
        "unbound-value",
        "unknown-source",
        "unused-node",
    ]


def test_a_template_without_nodes() -> None:
    (problem,) = problems({})
    assert (problem.path, problem.message) == (("graph",), "graph has no node")


def test_a_pattern_without_linear_operators() -> None:
    with pytest.raises(TemplateErrors, match="no linear operator that a graph could replace"):
        build_template("graph:t", {"down": DOWN, "up": UP}, None, {})


def test_what_fits_a_match() -> None:
    template = build({"down": DOWN, "up": {**UP, "bias": None}})
    assert template.misfit({"fc": LINEAR}) is None
    assert template.misfit({"fc": {**LINEAR, "bias": True}}) == (
        "fc has a bias, and the template leaves it out (bias: fc.bias)"
    )
    several = build(QKV, {"q": "a", "k": "b"}, "q", "k")
    assert several.misfit({"q": LINEAR, "k": {**LINEAR, "in_features": 4}}) == (
        "q, k read values of different widths"
    )


def test_factors_that_nobody_uses() -> None:
    """The widths may fit by chance; the operator would be gone all the same."""
    act = {"u": {"op": "relu", "input": "$x"}}
    with pytest.raises(TemplateErrors, match=r"no node has the weight 'fc\.left'"):
        build_template("graph:a", act, {"fc": "u"}, {"fc": "x"})
    shared = {
        "h": {"op": "linear", "input": "$x", "weight": "joint.right"},
        "a": {"op": "linear", "input": "$h", "weight": "q.left"},
    }
    with pytest.raises(TemplateErrors, match="'a' takes the place of 'q' already"):
        build_template("graph:a", shared, {"q": "a", "k": "a"}, {"q": "x", "k": "x"})
