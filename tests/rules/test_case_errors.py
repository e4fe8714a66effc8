"""Errors of the tests that a rule file carries, each by its exact text."""

from __future__ import annotations

import pytest

from tests.rules.marked import Mistake, errors

HEAD = (
    "budget: {keep: 0.8}\nrules:\n  - id: mlp\n    match: {node: {op: linear, as: fc}}\n"
    "    rewrite: {form: pivoted}\ntests:\n"
)
FC = "n: {op: linear, path: a.fc}"
MATCHES = "matches: {mlp: [a.fc]}"


def case(graph: str = FC, expected: str = MATCHES, more: str = "") -> str:
    return f"{HEAD}  - name: t\n    graph: {{{graph}}}\n    {expected}\n{more}"


MISTAKES = {
    "unknown rule": Mistake(
        case(expected="matches: {«mpl»: [a.fc]}"),
        "unknown-rule",
        "there is no rule 'mpl'",
        "did you mean 'mlp'?",
    ),
    "unknown rule of a miss": Mistake(
        case(expected="misses: {«xyz»: {a.fc: name}}"), "unknown-rule", "there is no rule 'xyz'"
    ),
    "unknown path": Mistake(
        case(expected="matches: {mlp: [«a.fcc»]}"),
        "unknown-path",
        "the graph has no 'a.fcc'",
        "did you mean 'a.fc'?",
    ),
    "unknown path of a member": Mistake(
        case(expected="matches: {mlp: [[a.fc, «b»]]}"), "unknown-path", "the graph has no 'b'"
    ),
    "unknown path of a miss": Mistake(
        case(expected="misses: {mlp: {«b»: name}}"), "unknown-path", "the graph has no 'b'"
    ),
    "unknown step": Mistake(
        case(expected="misses: {mlp: {a.fc: «wher»}}"),
        "unknown-step",
        "there is no step 'wher'",
        "did you mean 'where'?",
    ),
    "no name": Mistake(
        f"{HEAD}  - «graph: {{{FC}}}»\n    {MATCHES}\n", "missing-key", "a test needs 'name'"
    ),
    "name twice": Mistake(
        case(more=f"  - name: «t»\n    graph: {{{FC}}}\n    {MATCHES}\n"),
        "duplicate-test",
        "test 't' is there twice (first on line 7)",
    ),
    "nothing expected": Mistake(
        case(expected="").replace("name: t", "«name: t»"),
        "nothing-expected",
        "a test expects something: it needs 'matches' or 'misses'",
    ),
    "no graph": Mistake(
        f"{HEAD}  - «name: t»\n    {MATCHES}\n",
        "missing-graph",
        "a test takes one of 'graph' and 'model'; it has neither",
    ),
    "graph and model": Mistake(
        case(more="    model: m.py:net\n").replace("name: t", "«name: t»"),
        "missing-graph",
        "a test takes one of 'graph' and 'model'; it has both",
    ),
    "data without model": Mistake(
        case(more="    data: m.py:rows\n").replace("name: t", "«name: t»"),
        "wrong-place",
        "'data' goes with 'model' only",
    ),
    "unknown key": Mistake(
        case(more="    «mises»: {}\n"),
        "unknown-key",
        "unknown key 'mises'",
        "did you mean 'misses'?",
    ),
    "unknown operator": Mistake(
        case(f"{FC}, m: {{op: «liner»}}"),
        "unknown-operator",
        "unknown operator 'liner'",
        "did you mean 'linear'?",
    ),
    "unknown attribute": Mistake(
        case("n: {op: linear, path: a.fc, «infeatures»: 3}"),
        "unknown-attribute",
        "linear has no attribute 'infeatures'",
        "did you mean 'in_features'?",
    ),
    "weight of a function": Mistake(
        case(f"{FC}, m: {{op: relu, «weight»: n.weight}}"), "wrong-place", "relu reads no weight"
    ),
    "input and inputs": Mistake(
        case("n: {op: linear, path: a.fc, input: $x, «inputs»: [$x]}"),
        "both-inputs",
        "'n' takes one of 'input' and 'inputs'; it has both",
    ),
    "circle": Mistake(
        case("«n»: {op: linear, path: a.fc, input: $m}, m: {op: relu, input: $n}"),
        "graph-cycle",
        "nodes read one another in a circle: n -> m -> n",
    ),
    "no $": Mistake(
        case("n: {op: linear, path: a.fc, input: «m»}"),
        "bad-reference",
        "'m' is no reference to a value",
        "did you mean $m?",
    ),
    "no list": Mistake(
        case(expected="matches: {mlp: «a.fc»}"),
        "wrong-type",
        "mlp is a list, not 'a.fc'",
        'put it into a list: ["..."]',
    ),
    "several values": Mistake(
        case("n: {op: linear, path: a.fc, in_features: «[»3, 4]}"),
        "bad-attribute-value",
        "linear's in_features has several values; an operator has one",
    ),
    "several kernels": Mistake(
        case(f"{FC}, c: {{op: conv2d, kernel_size: «[»[3, 3], [1, 1]]}}"),
        "bad-attribute-value",
        "conv2d's kernel_size has several values; an operator has one",
    ),
    "value from outside with a path": Mistake(
        case(f"{FC}, x: {{op: input, «path»: x}}"),
        "wrong-place",
        "a value from outside has no 'path'",
    ),
    "path of a value from outside": Mistake(
        case(f"{FC}, x: {{op: input}}", "matches: {mlp: [«x»]}"),
        "unknown-path",
        "the graph has no 'x'",
    ),
    "matched and missed": Mistake(
        case(expected=f"{MATCHES}\n    misses: {{mlp: {{«a.fc»: name}}}}"),
        "contradiction",
        "'a.fc' cannot be both matched and missed",
    ),
    "a boolean for a name": Mistake(
        case().replace("name: t", "name: «true»"),
        "wrong-type",
        "name is a string or a list of them, not true",
        'quote it: "true"',
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_error_text(name: str) -> None:
    mistake = MISTAKES[name]
    assert errors(mistake.plain) == mistake.report
