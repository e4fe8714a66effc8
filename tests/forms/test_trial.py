"""Templates run once on random numbers: what is right passes, what is wrong is told."""

from __future__ import annotations

from typing import Any

import pytest

from fxcompress.forms.template import build_template
from fxcompress.forms.trial import try_template

DOWN = {"op": "linear", "input": "$x", "weight": "fc.right"}
UP = {"op": "linear", "input": "$down", "weight": "fc.left", "bias": "fc.bias"}
COMMON = {"op": "linear", "input": "$x", "weight": "joint.right"}


def head(role: str, **changed: str) -> dict[str, str]:
    return {
        "op": "linear", "input": "$h", "weight": f"{role}.left", "bias": f"{role}.bias", **changed
    }  # fmt: skip


def wrong(graph: dict[str, Any], **outputs: str) -> list[tuple[str, str]]:
    outputs = outputs or {"fc": "up"}
    template = build_template("graph:t", graph, outputs, dict.fromkeys(outputs, "x"))
    found = try_template(template)
    assert all(each.error > 0.1 for each in found)
    return [(each.role, each.product) for each in found]


RIGHT: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "two factors": ({"down": DOWN, "up": UP}, {}),
    # Matches whose operator has a bias are lost one by one.
    "no bias": ({"down": DOWN, "up": {**UP, "bias": ""}}, {}),
    "several": ({"h": COMMON, "a": head("q"), "b": head("k")}, {"q": "a", "k": "b"}),
    "what cancels out": (
        {
            "down": DOWN,
            "s": {"op": "silu", "input": "$down"},
            "g": {"op": "sigmoid", "input": "$down"},
            "p": {"op": "mul", "inputs": ["$down", "$g"]},
            "d": {"op": "sub", "inputs": ["$s", "$p"]},
            "r": {"op": "add", "inputs": ["$d", "$down"]},
            "up": {**UP, "input": "$r"},
        },
        {},
    ),
    "negative and positive part": (
        {
            "down": DOWN,
            "z": {"op": "sub", "inputs": ["$down", "$down"]},
            "n": {"op": "sub", "inputs": ["$z", "$down"]},
            "a": {"op": "relu", "input": "$down"},
            "b": {"op": "relu", "input": "$n"},
            "both": {"op": "sub", "inputs": ["$a", "$b"]},
            "up": {**UP, "input": "$both"},
        },
        {},
    ),
    "square operators only": (
        {
            "down": DOWN,
            "up": UP,
            "s": {"op": "add", "inputs": ["$up", "$x"]},
            "d": {"op": "sub", "inputs": ["$s", "$x"]},
        },
        {"fc": "d"},
    ),
    # Its output is as wide as two inputs: it is tried on every match instead.
    "widths that are never tried": (
        {
            "down": DOWN,
            "up": UP,
            "wide": {"op": "cat", "inputs": ["$x", "$x"]},
            "s": {"op": "add", "inputs": ["$up", "$wide"]},
        },
        {"fc": "s"},
    ),
}


@pytest.mark.parametrize("case", RIGHT)
def test_right(case: str) -> None:
    graph, outputs = RIGHT[case]
    assert wrong(graph, **outputs) == []


PRODUCT = "fc.left @ fc.right @ $x + fc.bias"
WRONG: dict[str, tuple[dict[str, Any], dict[str, str], list[tuple[str, str]]]] = {
    "an activation between the factors": (
        {
            "down": DOWN,
            "act": {"op": "gelu", "input": "$down"},
            "up": {**UP, "input": "$act"},
        },
        {},
        [("fc", PRODUCT)],
    ),
    "twice": (
        {
            "down": DOWN,
            "up": UP,
            "s": {"op": "add", "inputs": ["$up", "$up"]},
        },
        {"fc": "s"},
        [("fc", PRODUCT)],
    ),
    "a residual": (
        {"down": DOWN, "up": UP, "s": {"op": "add", "inputs": ["$up", "$x"]}},
        {"fc": "s"},
        [("fc", PRODUCT)],
    ),
    "halves the wrong way round": (
        {
            "h": COMMON,
            "a": head("q"),
            "b": head("k"),
            "swapped": {"op": "sub", "inputs": ["$b", "$a"]},
        },
        {"q": "a", "k": "swapped"},
        [("k", "k.left @ joint.right @ $x + k.bias")],
    ),
    "another's factor": (
        {"h": COMMON, "a": head("q"), "b": head("k")},
        {"q": "b", "k": "a"},
        [
            ("q", "q.left @ joint.right @ $x + q.bias"),
            ("k", "k.left @ joint.right @ $x + k.bias"),
        ],
    ),
    "another's bias": (
        {
            "h": COMMON,
            "a": head("q"),
            "s": head("k", bias="k.bias"),
            "z": {"op": "sub", "inputs": ["$s", "$s"]},
            "b": head("k", bias="q.bias"),
            "c": {"op": "add", "inputs": ["$b", "$z"]},
        },
        {"q": "a", "k": "c"},
        [("k", "k.left @ joint.right @ $x + k.bias")],
    ),
    "the wrong order": (
        {
            "up": {"op": "linear", "input": "$x", "weight": "fc.right"},
            "wide": {"op": "linear", "input": "$up", "weight": "fc.left"},
            "again": {"op": "linear", "input": "$wide", "weight": "fc.right"},
            "last": {**UP, "input": "$again"},
        },
        {"fc": "last"},
        [("fc", PRODUCT)],
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong(case: str) -> None:
    graph, outputs, expected = WRONG[case]
    assert wrong(graph, **outputs) == expected


def test_the_text_says_by_how_much() -> None:
    graph = {"down": DOWN, "up": UP, "s": {"op": "add", "inputs": ["$up", "$up"]}}
    (found,) = try_template(build_template("graph:t", graph, {"fc": "s"}, {"fc": "x"}))
    assert str(found) == (
        "does not compute fc.left @ fc.right @ $x + fc.bias: off by 100% (r = 3, 7 to 9 features)"
    )
