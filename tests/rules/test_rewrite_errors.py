"""Errors of ``rewrite``: forms, templates and costs, each by its exact text."""

from __future__ import annotations

import pytest

from fxcompress.forms.words import BUILT_IN
from fxcompress.operators.words import OPERATORS
from fxcompress.rules import parse_rules
from tests.rules.marked import Mistake, errors

HEAD = "budget: {keep: 0.8}\nrules:\n  - id: a\n"
ONE = "    match: {node: {op: linear, as: fc}}\n"
GROUP = "    match: {group: {op: linear, as: fc}}\n"
DOWN = "down: {op: linear, input: $x, weight: fc.right}"
UP = "up: {op: linear, input: $down, weight: fc.left, bias: fc.bias}"
QK = "q: {op: linear, input: $x}, k: {op: linear, input: $x}"


def forms(match: str, rewrite: str) -> str:
    return f"{HEAD}{match}    rewrite: {rewrite}\n"


def several(nodes: str, rewrite: str = "{form: pivoted}", inputs: str = "x") -> str:
    return forms(f"    match: {{inputs: [{inputs}], nodes: {{{nodes}}}}}\n", rewrite)


def graph(*nodes: str, rest: str = "", match: str = ONE) -> str:
    body = "".join(f"        {node}\n" for node in nodes)
    return f"{HEAD}{match}    rewrite:\n      graph:\n{body}{rest}"


MISTAKES = {
    "unknown form": Mistake(
        forms(ONE, "{form: «pivotd»}"),
        "unknown-form",
        "unknown form 'pivotd'",
        "did you mean 'pivoted'?",
    ),
    "no form that is near": Mistake(
        forms(ONE, "{any_of: [pivoted, «xyz»]}"),
        "unknown-form",
        "unknown form 'xyz'",
        "one of: " + ", ".join(dict.fromkeys(form.name for form in BUILT_IN.values())),
    ),
    "no node for the form": Mistake(
        several("q: {op: embedding, input: $x}, n: {op: relu, input: $q}", "{form: «pivoted»}"),
        "form-does-not-apply",
        "pivoted can rewrite none of q, n",
        "a node has to be one of: conv1d, conv2d, conv3d, conv_transpose1d, conv_transpose2d, "
        "conv_transpose3d, linear",
    ),
    "a form that does not apply to a node that is asked for": Mistake(
        several(
            "q: {op: linear, input: $x}, c: {op: embedding, input: $q}",
            "{form: «pivoted», nodes: [q, c]}",
        ),
        "form-does-not-apply",
        "pivoted cannot rewrite embedding (line 4)",
        "one of: embedding",
    ),
    "nothing to protect": Mistake(
        several("q: {op: relu, input: $x}", "none").replace("nodes", "«nodes»"),
        "not-rewritable",
        "no operator of the pattern has a weight to rewrite",
        "one of: " + ", ".join(OPERATORS),
    ),
    "graph without a node": Mistake(forms(ONE, "{«graph»: {}}"), "empty-list", "graph is empty"),
    "no list of inputs": Mistake(
        graph(DOWN, "up: {op: linear, inputs: «$down», weight: fc.left, bias: fc.bias}"),
        "wrong-type",
        "inputs is a list, not '$down'",
        'put it into a list: ["..."]',
    ),
    "a number for inputs": Mistake(
        graph(DOWN, "up: {op: linear, inputs: «1», weight: fc.left, bias: fc.bias}"),
        "wrong-type",
        "inputs is a list, not 1",
    ),
    "joint for one": Mistake(
        forms(ONE, "{form: «joint»}"),
        "form-does-not-apply",
        "joint rewrites several operators together, and the pattern has one",
        'match them with "group", or with several "nodes" on one input',
    ),
    "joint for one, as one of several forms": Mistake(
        forms(ONE, "{any_of: [pivoted, «joint»]}"),
        "form-does-not-apply",
        "joint rewrites several operators together, and the pattern has one",
        'match them with "group", or with several "nodes" on one input',
    ),
    "$ in nodes": Mistake(
        several(QK, "{form: pivoted, nodes: [«$q», k]}"),
        "bad-name",
        "'$q' is a reference, and a name is wanted here",
        "without the $: q",
    ),
    "joint for different inputs": Mistake(
        several("q: {op: linear, input: $x}, k: {op: linear, input: $q}", "{form: «joint»}"),
        "form-does-not-apply",
        "joint rewrites several operators that read one value; the pattern has no two",
        'match them with "group", or with several "nodes" on one input',
    ),
    "joint of convolutions": Mistake(
        forms("    match: {group: {op: conv2d}}\n", "{form: «joint»}"),
        "form-does-not-apply",
        "joint cannot rewrite conv2d",
        "it applies to linear",
    ),
    "joint with equal ranks": Mistake(
        forms(GROUP, "{form: joint, «group»: g}"),
        "wrong-place",
        "'group' asks for equal ranks, and joint has one rank anyway",
        "leave 'group' out",
    ),
    "unknown node": Mistake(
        several(QK, "{form: pivoted, nodes: [q, «z»]}"),
        "unknown-node",
        "the pattern has no node 'z'",
        "one of: q, k",
    ),
    "node without weight": Mistake(
        several(
            "q: {op: linear, input: $x}, n: {op: relu, input: $q}",
            "{form: pivoted, nodes: [q, «n»]}",
        ),
        "not-rewritable",
        "'n' is relu, which has no weight to rewrite",
    ),
    "empty graph": Mistake(forms(ONE, "{«graph»: {}}"), "empty-list", "graph is empty"),
    "form and graph": Mistake(
        graph(DOWN, UP, rest="      form: pivoted\n").replace("rewrite", "«rewrite»"),
        "missing-form",
        "rewrite takes one of 'form', 'any_of' and 'graph'; it has 'form' and 'graph'",
    ),
    "cost without graph": Mistake(
        forms(ONE, "{form: pivoted, cost: r}").replace("rewrite", "«rewrite»"),
        "wrong-place",
        "'cost' goes with 'graph' only",
    ),
    "nodes with a graph": Mistake(
        graph(DOWN, UP, rest="      «nodes»: [fc]\n"),
        "wrong-place",
        "'nodes' goes with forms; a graph says in 'outputs' what it replaces",
    ),
    "graph for a group": Mistake(
        graph(DOWN, UP, match=GROUP).replace("graph:", "«graph»:"),
        "wrong-place",
        "a graph cannot replace a 'group': the number of its operators is not known",
        "name them: nodes: {...}",
    ),
    "graph without a linear operator": Mistake(
        graph(DOWN, UP, match=ONE.replace("linear", "conv2d")).replace("graph:", "«graph»:"),
        "form-does-not-apply",
        "the pattern has no linear operator that a graph could replace",
    ),
    "operator called r": Mistake(
        graph(DOWN, UP, match=ONE.replace("as: fc", "«as»: r")),
        "name-clash",
        "'r' stands for the rank in a graph; the operator needs another name",
    ),
    "unknown operator of a template": Mistake(
        graph(DOWN, UP.replace("linear", "«linaer»")),
        "unknown-operator",
        "a template has no operator 'linaer'",
        "did you mean 'linear'?",
    ),
    "unknown key of a template": Mistake(
        graph(DOWN, UP.replace("bias:", "«bais»:")),
        "unknown-key",
        "unknown key 'bais'",
        "did you mean 'bias'?",
    ),
    "unknown weight": Mistake(
        graph(DOWN.replace("fc.right", "«fc.rigth»"), UP),
        "unknown-source",
        "there is no weight 'fc.rigth'",
        "did you mean 'fc.right'?",
    ),
    "unknown value": Mistake(
        graph(DOWN, UP.replace("$down", "«$dwon»")),
        "unbound-value",
        "'$dwon' is neither a node of the graph nor what the match reads",
        "did you mean '$down'?",
    ),
    "no $": Mistake(
        graph(DOWN, UP.replace("$down", "«down»")),
        "bad-reference",
        "'down' is no reference to a value",
        "did you mean $down?",
    ),
    "node that is called as the input": Mistake(
        graph(DOWN.replace("down", "«x»"), UP),
        "name-clash",
        "'x' is what the match reads; the node needs another name",
    ),
    "circle": Mistake(
        graph(
            "«down»: {op: linear, input: $up, weight: fc.right}", UP, rest="      outputs: {fc: up}"
        ),
        "template-cycle",
        "nodes read one another in a circle: down <- up <- down",
    ),
    "unknown output": Mistake(
        graph(DOWN, UP, rest="      outputs: {fc: «upp»}"),
        "bad-outputs",
        "graph has no node 'upp'",
        "did you mean 'up'?",
    ),
    "output of what is not there": Mistake(
        graph(DOWN, UP, rest="      outputs: {fc: up, «fcc»: up}"),
        "bad-outputs",
        "'fcc' is no linear operator of the pattern",
        "did you mean 'fc'?",
    ),
    "$ in outputs": Mistake(
        graph(DOWN, UP, rest="      outputs: {fc: «$up»}"),
        "bad-name",
        "'$up' is a reference, and a name is wanted here",
        "without the $: up",
    ),
    "no outputs": Mistake(
        graph(DOWN, UP, "z: {op: relu, input: $x}").replace("graph:", "«graph»:"),
        "missing-outputs",
        "graph needs 'outputs': which operator becomes which node",
        "for example outputs: {fc: up}",
    ),
    "node for nothing": Mistake(
        graph(DOWN, UP, "«z»: {op: relu, input: $x}", rest="      outputs: {fc: up}"),
        "unused-node",
        "nothing reads 'z', and it is no output",
    ),
    "misfit": Mistake(
        graph("down: {op: linear, input: $x, «weight»: fc.left}"),
        "shape-mismatch",
        "'down' reads fc.in_features features, and fc.left takes r",
    ),
    "two inputs for one": Mistake(
        graph(DOWN, "«up»: {op: linear, inputs: [$down, $x], weight: fc.left}"),
        "wrong-inputs",
        "linear takes one input, not 2",
    ),
    "no input": Mistake(
        graph("«down»: {op: linear, weight: fc.right}", UP),
        "missing-input",
        "'down' takes one of 'input' and 'inputs'; it has neither",
        "for example input: $x",
    ),
    "no weight": Mistake(
        graph("«down»: {op: linear, input: $x}", UP),
        "missing-key",
        "linear needs 'weight'",
        "for example weight: fc.right",
    ),
    "weight of a function": Mistake(
        graph(DOWN, "n: {op: relu, input: $down, «weight»: fc.left}", UP.replace("$down", "$n")),
        "wrong-place",
        "relu takes no weight",
    ),
    "a graph that computes something else": Mistake(
        graph(
            DOWN,
            "act: {op: relu, input: $down}",
            UP.replace("up:", "«up»:").replace("down,", "act,"),
        ),
        "wrong-template",
        "'up' does not compute fc.left @ fc.right @ $x + fc.bias: off by 85% (r = 3, 7 to 9 "
        "features)",
        "the solver counts on that product: no match could be rewritten",
    ),
    "wrong cost": Mistake(
        graph(DOWN, UP, rest='      cost: «"r * fc.in_features"»'),
        "wrong-cost",
        "cost says r * fc.in_features, the graph has r * fc.in_features + r * fc.out_features",
    ),
    "cost of an unknown attribute": Mistake(
        graph(DOWN, UP, rest='      cost: "r * fc.«in_feature»"'),
        "unknown-attribute",
        "'fc' has no attribute 'in_feature'",
        "did you mean 'in_features'?",
    ),
    "cost that is no number": Mistake(
        graph(DOWN, UP, rest='      cost: "«r > 3»"'),
        "expression-failed",
        "gives True, which is not a number",
    ),
    "cost in the rank alone": Mistake(
        graph(DOWN, UP, rest='      cost: "«rank» * 3"'),
        "unbound-name",
        "'rank' is not bound; this rule binds 'fc'",
        "one of: fc",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_error_text(case: str) -> None:
    mistake = MISTAKES[case]
    assert errors(mistake.plain) == mistake.report


SEVERAL = """\
budget: {keep: 0.8}
rules:
  - id: a
    match:
      inputs: [x, y]
      nodes: {q: {op: linear, input: $x%s}, k: {op: linear%s}, s: {op: add, inputs: [$q, $k]}}
    rewrite:
      graph:
        h: {op: linear, input: $x, weight: joint.right}
        a: {op: linear, input: $h, weight: q.left, bias: q.bias}
        b: {op: linear, input: $h, weight: k.left, bias: k.bias}
      outputs: {q: a, k: b}
"""


@pytest.mark.parametrize(
    ("more", "rest", "expected"),
    [
        (", optional: true", ", input: $x", "12:17 error[optional-output]: 'q' is optional, and"),
        ("", "", "6:43 error[missing-input]: 'k' does not say what it reads, so the graph cannot"),
        ("", ", input: $y", "12:7 error[bad-outputs]: q, k read different values ($x, $y)"),
    ],
)
def test_graph_of_several(more: str, rest: str, expected: str) -> None:
    inputs = "[x, y]" if "$y" in rest else "[x]"
    found = errors((SEVERAL % (more, rest)).replace("[x, y]", inputs))
    assert found.startswith(f"r.yaml:{expected}")
    assert found.count(" error[") == 1


def test_templates_are_kept_by_rule() -> None:
    cost = '      cost: "r * (fc.in_features + fc.out_features)"\n'
    loaded = parse_rules(graph(DOWN, UP, rest=cost), "r.yaml")
    template = loaded.templates["a"]
    assert template.name == "graph:a"
    assert template.outputs == (("fc", "up"),)
    assert template.cost == "r * fc.in_features + r * fc.out_features"
    assert parse_rules(forms(ONE, "{form: pivoted}"), "r.yaml").templates == {}


def test_graph_of_several_with_its_cost() -> None:
    text = (SEVERAL % ("", ", input: $x")).replace("[x, y]", "[x]")
    for cost, right in (
        ("r * (q.in_features + q.out_features + k.out_features)", True),
        ("r * (k.in_features + q.out_features + k.out_features)", True),
        ("r * (q.in_features + k.in_features + q.out_features + k.out_features)", False),
    ):
        given = f'{text}      cost: "{cost}"\n'
        if right:
            assert parse_rules(given, "r.yaml").templates["a"].roles == ("q", "k")
        else:
            assert "error[wrong-cost]: cost says" in errors(given)
