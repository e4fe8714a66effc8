"""Matching is fast on large graphs, and never runs away on symmetric ones."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import fxcompress
from fxcompress.errors import RuleError
from fxcompress.graph.operator import Operator
from fxcompress.rules import LoadedRules, MatchResult, match_rules, parse_rules
from tests.rules.graphs import blocks, linear, siblings

PACKAGE = str(Path(fxcompress.__file__).parent)
TraceFunction = Callable[[FrameType, str, Any], Any]


def parsed(rules: str) -> LoadedRules:
    return parse_rules(f"budget: {{keep: 0.8}}\nrules:\n{rules}", "r.yaml")


def matched(rules: str, operators: list[Operator]) -> tuple[MatchResult, int]:
    """The result, and how many steps it took: lines of the package that ran, loops included.

    Steps are the same however busy the machine is.
    """
    loaded = parsed(rules)
    steps = 0

    def count(frame: FrameType, event: str, arg: object) -> TraceFunction:
        nonlocal steps
        steps += 1
        return count

    def enter(frame: FrameType, event: str, arg: object) -> TraceFunction | None:
        return count if frame.f_code.co_filename.startswith(PACKAGE) else None

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        result = match_rules(loaded, operators, lambda operator: None)
    finally:
        sys.settrace(before)
    return result, steps


def single(number: int) -> str:
    return f"""\
  - id: r{number}
    match: {{node: {{op: linear, as: fc, name: "*.layers.*{number}.mlp.*"}}}}
    unless: [{{name: "*.layers.0.*"}}, {{shares_weight_with: embedding}}]
    where: ["min(fc.in_features, fc.out_features) >= 256"]
    rewrite: {{form: pivoted}}
"""


def all_linears(number: int) -> str:
    return f"""\
  - id: r{number}
    match: {{node: {{op: linear, as: fc}}}}
    where: [fc.in_features >= {number}]
    rewrite: {{form: pivoted}}
"""


def shared_input(number: int) -> str:
    return f"""\
  - id: r{number}
    match:
      inputs: [x]
      nodes:
        q: {{op: linear, input: $x, name: "*{number}.attn.q"}}
        k: {{op: linear, input: $x, name: "*.k"}}
        v: {{op: linear, input: $x, name: "*.v"}}
    rewrite: {{any_of: [joint, pivoted]}}
"""


def chain(number: int) -> str:
    return f"""\
  - id: r{number}
    match:
      nodes:
        up: {{op: linear, input: $x}}
        act: {{op: gelu, input: $up}}
        drop: {{op: dropout, input: $act, optional: true}}
        down: {{op: linear, input: $drop, name: "*.{number}?.*"}}
      inputs: [x]
    rewrite: {{form: pivoted}}
"""


def projections(layers: int) -> list[Operator]:
    return [linear(f"model.layers.{i}.mlp.x{j}_proj") for i in range(layers) for j in range(10)]


@pytest.mark.parametrize(
    ("rule", "graph", "most"),
    [
        (single, projections, 26),
        (all_linears, projections, 33),
        (shared_input, blocks, 50),
        (chain, blocks, 44),
    ],
)
def test_steps_per_operator_and_rule(
    rule: Callable[[int], str], graph: Callable[[int], list[Operator]], most: float
) -> None:
    """The same however large the graph: ten thousand operators and fifty rules take a second."""
    rules = "".join(map(rule, range(10)))
    small, large = graph(30), graph(120)
    assert len(small) >= 300
    _, few = matched(rules, small)
    result, many = matched(rules, large)
    assert len(result.matches) > 10
    assert many < 1.2 * few * len(large) / len(small)
    assert many < most * len(large) * 10


@pytest.mark.parametrize(("rule", "graph"), [(all_linears, projections), (shared_input, blocks)])
def test_time_grows_with_the_graph(
    rule: Callable[[int], str], graph: Callable[[int], list[Operator]]
) -> None:
    """What steps do not show, such as a search in a list, would grow with its square.

    Both sizes are measured in turns: a busy machine slows both of them down.
    """
    loaded, operators = parsed("".join(map(rule, range(10)))), (graph(30), graph(480))
    seconds = [math.inf, math.inf]
    for _ in range(3):
        for place, each in enumerate(operators):
            start = time.process_time()
            match_rules(loaded, each, lambda operator: None)
            seconds[place] = min(seconds[place], time.process_time() - start)
    assert seconds[1] < 3 * 16 * seconds[0]


def test_64_linears_on_one_input() -> None:
    nodes = ", ".join(f"n{i}: {{op: linear, input: $x}}" for i in range(5))
    text = f"  - id: five\n    match: {{inputs: [x], nodes: {{{nodes}}}}}\n    rewrite: none\n"
    result, steps = matched(text, siblings(64))
    assert len(result.instances["five"]) == 12
    assert str(result.funnels["five"]).endswith(
        "64 linear → 64 name → 60 pattern → 60 unless → 60 where → 60 legal → 60 kept"
    )
    assert steps < 700_000


def test_a_search_that_runs_away_is_a_located_error() -> None:
    nodes = ", ".join(f"n{i}: {{op: linear, input: $x}}" for i in range(12))
    text = (
        f"  - id: twelve\n    match: {{inputs: [x], nodes: {{{nodes}}}}}\n"
        '    where: ["n0.in_features > n11.in_features"]\n    rewrite: none\n'
    )
    with pytest.raises(RuleError) as caught:
        match_rules(parsed(text), siblings(40), lambda operator: None)
    assert str(caught.value).startswith("r.yaml:4:33 error[search-limit]: rule 'twelve'")


def test_what_is_taken_is_not_searched_for_long() -> None:
    """Only the reason hangs on whether the rest would fit if nothing were taken."""
    nodes = [
        'n0: {op: linear, input: $x, name: "m.*"}',
        'n1: {op: linear, input: $x, name: "*n?*"}',
    ]
    nodes += [f"n{i}: {{op: linear, input: $x}}" for i in range(2, 5)]
    text = f"  - id: five\n    match: {{inputs: [x], nodes: {{{', '.join(nodes)}}}}}\n"
    result, steps = matched(text + "    rewrite: none\n", siblings(64))
    assert len(result.instances["five"]) == 12
    assert {lost.step for _, lost in result.lost["five"]} == {"overlap"}
    assert steps < 2_900_000
