"""Rules that load can be matched against any graph: a result, or a RuleError, and nothing else."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from fxcompress.errors import RuleError
from fxcompress.rules import parse_rules, run_cases

OPS = ("linear", "linear", "linear", "relu", "add", "mul", "layer_norm", "conv2d", "embedding")
CONDITIONS = (
    "a.in_features > 3",
    "a.in_features / 0 > 1",
    "count(a) >= 2",
    "not present(b) or b.bias",
    "same(a.dtype, b.dtype)",
)
EXCLUSIONS: tuple[dict[str, Any], ...] = (
    {"name": "*q"},
    {"scope": "l"},
    {"node": "b", "bias": True},
    {"shares_weight_with": "embedding"},
    {"in_features": 3},
)
REWRITES: tuple[Any, ...] = (
    "none",
    {"form": "pivoted"},
    {"form": "joint"},
    {"any_of": ["joint", "pivoted"]},
    {"any_of": ["low_rank", "pivoted"], "nodes": ["a"], "group": "g"},
    {
        "graph": {
            "down": {"op": "linear", "input": "$x", "weight": "a.right"},
            "up": {"op": "linear", "input": "$down", "weight": "a.left", "bias": "a.bias"},
        },
        "outputs": {"a": "up"},
    },
)


@st.composite
def several(draw: st.DrawFn) -> dict[str, Any]:
    """A pattern of a few operators that hang together."""
    names = "abcde"[: draw(st.integers(1, 5))]
    nodes = {}
    for index, name in enumerate(names):
        values = st.sampled_from(["$x", *(f"${other}" for other in names[:index])])
        node: dict[str, Any] = {"op": draw(st.sampled_from(OPS)) if index else "linear"}
        if draw(st.booleans()):
            node["input"] = draw(values)
            node["optional"] = bool(index) and draw(st.booleans())
        else:
            node["inputs"] = draw(st.lists(values | st.none(), min_size=1, max_size=2))
        nodes[name] = node
    return {"inputs": ["x"], "nodes": nodes}


patterns = (
    several()
    | st.builds(lambda op: {"node": {"op": op, "as": "a"}}, st.sampled_from(["linear", "conv2d"]))
    | st.builds(lambda n: {"group": {"op": "linear", "as": "a", "min": n}}, st.integers(1, 3))
)


@st.composite
def rules(draw: st.DrawFn) -> dict[str, Any]:
    """A rule, right or wrong."""
    rule = {
        "id": "drawn",
        "match": draw(patterns),
        "rewrite": draw(st.sampled_from(REWRITES)),
        "priority": draw(st.integers(-1, 1)),
    }
    for key, choices in (("where", CONDITIONS), ("unless", EXCLUSIONS)):
        if draw(st.integers(0, 3)) == 0:
            rule[key] = [draw(st.sampled_from(choices))]
    return rule


RIVAL = {
    "id": "rival",
    "match": {"group": {"op": "linear", "as": "fc"}},
    "rewrite": {"any_of": ["joint", "pivoted"]},
}


@st.composite
def graphs(draw: st.DrawFn) -> dict[str, Any]:
    """The graph of a test."""
    nodes: dict[str, Any] = {}
    for index in range(draw(st.integers(1, 10))):
        values = st.sampled_from(["$x", "$y", *(f"$n{other}" for other in range(index))])
        node: dict[str, Any] = {
            "op": draw(st.sampled_from(OPS)),
            "inputs": draw(st.lists(values, min_size=1, max_size=2)),
            "path": draw(st.sampled_from(["l.q", "l.k", "l", "m.q", f"l.{index}"])),
        }
        if node["op"] in ("linear", "embedding") and draw(st.integers(0, 4)) == 0:
            node["weight"] = "shared"
        nodes[f"n{index}"] = node
    return nodes


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(rules(), graphs())
def test_any_rules_on_any_graph(rule: dict[str, Any], graph: dict[str, Any]) -> None:
    paths = [node["path"] for node in graph.values()]
    case = {"name": "t", "graph": graph, "matches": {"drawn": [paths], "rival": []}}
    data = {"budget": {"keep": 0.8}, "rules": [rule, RIVAL], "tests": [case]}
    try:
        loaded = parse_rules(json.dumps(data), "r.yaml")  # JSON is YAML
    except RuleError:
        reject()
    (result,) = run_cases(loaded)
    assert str(result)
    assert json.dumps(result.to_json())
