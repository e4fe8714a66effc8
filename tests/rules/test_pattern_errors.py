"""Errors of patterns over several operators: each by its exact text, and nothing else beside it."""

from __future__ import annotations

import pytest

from fxcompress.operators.words import OPERATORS
from tests.rules.marked import Mistake, errors

HEAD = "budget: {keep: 0.8}\nrules:\n  - id: a\n"
PIVOTED = "    rewrite: {form: pivoted}\n"
Q, K = "      q: {op: linear, input: $x}\n", "      k: {op: linear, input: $x}\n"
ALL = "one of: " + ", ".join(OPERATORS)
LIST = "the nodes of a pattern are connected by the values that they read"


def nodes(*lines: str, inputs: str = "inputs: [x]", rest: str = PIVOTED, more: str = "") -> str:
    body = "".join(line if line.endswith("\n") else f"      {line}\n" for line in lines)
    given = "".join(f"     {key}\n" for key in (inputs, more) if key)
    return f"{HEAD}    match:\n{given}     nodes:\n{body}{rest}"


MISTAKES = {
    "unknown operator": Mistake(
        nodes("q: {op: «linaer», input: $x}"),
        "unknown-operator",
        "unknown operator 'linaer'",
        "did you mean 'linear'?",
    ),
    "unknown operator in a list": Mistake(
        nodes("q: {op: [linear, «linaer»], input: $x}"),
        "unknown-operator",
        "unknown operator 'linaer'",
        "did you mean 'linear'?",
    ),
    "attribute of a plain operator": Mistake(
        nodes(Q, "n: {op: layer_norm, input: $q, «epss»: 1.0e-5}"),
        "unknown-attribute",
        "layer_norm has no attribute 'epss'",
        "did you mean 'eps'?",
    ),
    "attribute that not all operators have": Mistake(
        nodes("q: {op: [linear, conv2d], input: $x, «in_features»: 3}"),
        "unknown-attribute",
        "conv2d has no attribute 'in_features'",
        "one of: bias, dtype",
    ),
    "number": Mistake(
        nodes(Q, "n: {op: layer_norm, input: $q, eps: «big»}"),
        "bad-attribute-value",
        "layer_norm's eps is a number, not 'big'",
        "conditions on numbers go into 'where'",
    ),
    "bad glob": Mistake(
        nodes('q: {op: linear, input: $x, name: «"*.{q"»}'), "bad-glob", "'{' is never closed"
    ),
    "bad glob of a scope": Mistake(
        nodes(Q, K, more='scope: «"[a"»'), "bad-glob", "'[' is never closed"
    ),
    "unbound value, close": Mistake(
        nodes(Q, "longer: {op: relu, input: $q}", "n: {op: relu, input: «$longr»}"),
        "unbound-value",
        "'$longr' is neither a node of the pattern nor one of its 'inputs'",
        "did you mean '$longer'?",
    ),
    "undeclared value": Mistake(
        nodes("q: {op: linear, input: «$x»}", inputs=""),
        "unbound-value",
        "'$x' is neither a node of the pattern nor one of its 'inputs'",
        "a value from outside is declared: inputs: [x]",
    ),
    "unbound value in a list": Mistake(
        nodes(Q, "s: {op: add, inputs: [$q, «$y»]}"),
        "unbound-value",
        "'$y' is neither a node of the pattern nor one of its 'inputs'",
        "a value from outside is declared: inputs: [y]",
    ),
    "input that nothing reads": Mistake(
        nodes(Q, inputs="inputs: [x, «y»]"), "unused-input", "no node reads '$y'"
    ),
    "input that is a node": Mistake(
        nodes(Q, inputs="inputs: [x, «q»]"),
        "name-clash",
        "'q' is a node of the pattern; a value from outside needs another name",
    ),
    "input twice": Mistake(nodes(Q, inputs="inputs: [x, «x»]"), "repeated", "'x' is given twice"),
    "reads itself": Mistake(
        nodes("«q»: {op: linear, input: $q}", inputs=""), "pattern-cycle", "'q' reads itself"
    ),
    "circle": Mistake(
        nodes(K, "«q»: {op: linear, inputs: [$n, $x]}", "n: {op: relu, input: $q}"),
        "pattern-cycle",
        "nodes read one another in a circle: q -> n -> q",
    ),
    "disconnected": Mistake(
        nodes(Q, "«k»: {op: linear, input: $y}", inputs="inputs: [x, y]"),
        "disconnected-pattern",
        "the pattern falls apart: q and k",
        LIST,
    ),
    "nothing that connects": Mistake(
        nodes(Q, "«k»: {op: linear}", K.replace("k:", "m:")),
        "disconnected-pattern",
        "the pattern falls apart: q, m and k",
        LIST,
    ),
    "unknown output": Mistake(
        nodes(Q, K, more="outputs: [q, k, «kk»]"),
        "unknown-node",
        "the pattern has no node 'kk'",
        "did you mean 'k'?",
    ),
    "output twice": Mistake(
        nodes(Q, K, more="outputs: [q, k, «q»]"), "repeated", "'q' is given twice"
    ),
    "node for nothing": Mistake(
        nodes(Q, "«k»: {op: linear, input: $x}", more="outputs: [q]"),
        "unused-node",
        "no node reads 'k', and it is not in 'outputs'",
        "such an operator would compute for nothing: nothing could match",
    ),
    "$ in outputs": Mistake(
        nodes(Q, K, more="outputs: [«$q», k]"),
        "bad-name",
        "'$q' is a reference, and a name is wanted here",
        "without the $: q",
    ),
    "$ in inputs": Mistake(
        nodes(Q, K, inputs="inputs: [«$x»]"),
        "bad-name",
        "'$x' is a reference, and a name is wanted here",
        "without the $: x",
    ),
    "no $": Mistake(
        nodes("q: {op: linear, input: «x»}", K),
        "bad-reference",
        "'x' is no reference to a value",
        "did you mean $x?",
    ),
    "no reference at all": Mistake(
        nodes('q: {op: linear, inputs: [«"$"»]}', K),
        "bad-reference",
        "'$' is no reference to a value",
        "$ and a name: $x",
    ),
    "optional with two inputs": Mistake(
        nodes(Q, "s: {op: add, inputs: [$q, $x], «optional»: true}"),
        "optional-input",
        "'s' is optional, so it needs exactly one input that is named",
        "where it is left out, that value takes its place; for example input: $x",
    ),
    "all optional": Mistake(
        nodes("q: {op: linear, input: $x, optional: true}").replace("nodes", "«nodes»"),
        "all-optional",
        "every node is optional; at least one has to be there",
    ),
    "optional, perhaps": Mistake(
        nodes(Q, "n: {op: relu, input: $q, optional: «maybe»}"),
        "wrong-type",
        "optional is true or false, not 'maybe'",
    ),
    "input and inputs": Mistake(
        nodes("q: {op: linear, input: $x, «inputs»: [$x]}"),
        "both-inputs",
        "'q' takes one of 'input' and 'inputs'; it has both",
    ),
    "no operator": Mistake(
        nodes(Q, "«k»: {input: $x}"),
        "no-positive-matcher",
        "k needs 'op'",
        "for example op: linear",
    ),
    "bad node name": Mistake(
        nodes("«1q»: {op: linear, input: $x}"),
        "bad-name",
        "'1q' is not an identifier",
        "letters, digits and _",
    ),
    "keyword": Mistake(
        nodes("«in»: {op: linear, input: $x}"),
        "bad-name",
        "'in' cannot be a name: expressions could not use it",
    ),
    "too many nodes": Mistake(
        nodes(*(f"n{i}: {{op: linear, input: $x}}" for i in range(33))).replace("nodes", "«nodes»"),
        "too-many",
        "nodes has 33 entries; at most 32",
    ),
    "no nodes": Mistake(
        f"{HEAD}    match: {{«nodes»: {{}}}}\n{PIVOTED}", "empty-list", "nodes is empty"
    ),
    "nodes as a list": Mistake(
        f"{HEAD}    match: {{«nodes»: [q]}}\n{PIVOTED}",
        "wrong-type",
        "nodes is a mapping, not a list",
    ),
    "two patterns": Mistake(
        nodes(Q, more="node: {op: linear}").replace("match", "«match»"),
        "no-positive-matcher",
        "match takes one of 'node', 'nodes', 'group' and 'any_of'; it has 'node' and 'nodes'",
    ),
    "inputs without nodes": Mistake(
        f"{HEAD}    «match»: {{node: {{op: linear}}, inputs: [x]}}\n{PIVOTED}",
        "wrong-place",
        "'inputs' goes with 'nodes' only",
    ),
    "scope beside any_of": Mistake(
        f'{HEAD}    «match»: {{any_of: [{{node: {{op: linear}}}}], scope: "*"}}\n{PIVOTED}',
        "wrong-place",
        "'scope' goes into the patterns of any_of",
    ),
    "a group of what has no weight": Mistake(
        f"{HEAD}    match: {{group: {{op: «relu»}}}}\n{PIVOTED}",
        "not-rewritable",
        "relu has no weight to rewrite",
        ALL,
    ),
    "group range": Mistake(
        f"{HEAD}    match: {{«group»: {{op: linear, min: 3, max: 2}}}}\n{PIVOTED}",
        "bad-number",
        "min 3 is above max 2",
    ),
    "alternatives that differ": Mistake(
        f"{HEAD}    match:\n      any_of:\n"
        "        - {inputs: [x], nodes: {q: {op: linear, input: $x}}}\n"
        "        - {«nodes»: {q: {op: linear}, k: {op: linear, input: $q}}}\n" + PIVOTED,
        "alternatives-differ",
        "alternatives of any_of have to bind the same names: 'q' and 'q', 'k'",
    ),
    "unless: unknown node": Mistake(
        nodes(Q, K, rest="    unless: [{node: «qq», in_features: 3}]\n" + PIVOTED),
        "unknown-node",
        "the pattern binds no 'qq'",
        "did you mean 'q'?",
    ),
    "unless: attribute of another node": Mistake(
        nodes(
            Q,
            "n: {op: layer_norm, input: $q}",
            rest="    unless: [{node: q, «eps»: 1}]\n" + PIVOTED,
        ),
        "unknown-attribute",
        "linear has no attribute 'eps'",
        "one of: in_features, out_features, bias, dtype",
    ),
    "present of what is not bound": Mistake(
        nodes(Q, K, rest='    where: ["present(«qq»)"]\n' + PIVOTED),
        "unbound-name",
        "'qq' is not bound; this rule binds 'q', 'k'",
        "did you mean 'q'?",
    ),
    "present of a value": Mistake(
        nodes(Q, rest='    where: ["«present(q.bias)»"]\n' + PIVOTED),
        "bad-expression",
        "present takes one bound name; write present(q), say",
    ),
    "unknown function": Mistake(
        nodes(Q, rest='    where: ["«cont»(q) == 1"]\n' + PIVOTED),
        "unknown-function",
        "unknown function 'cont'",
        "did you mean 'count'?",
    ),
    "attribute of a plain operator in an expression": Mistake(
        nodes(Q, "n: {op: layer_norm, input: $q}", rest='    where: ["n.«esp» > 0"]\n' + PIVOTED),
        "unknown-attribute",
        "'n' has no attribute 'esp'",
        "did you mean 'eps'?",
    ),
    "trap: alias": Mistake(
        nodes("q: {op: linear, input: $x, name: «*.q»}"),
        "yaml-alias",
        "'*.q' starts an alias in YAML",
        'quote it: "*.q"',
    ),
    "an exponent for a whole number": Mistake(
        nodes("q: {op: linear, input: $x, in_features: «1e3»}"),
        "bad-attribute-value",
        "linear's in_features is a whole number, not 1000.0",
        "conditions on numbers go into 'where'",
    ),
    "a boolean for a string": Mistake(
        nodes(Q, "n: {op: gelu, input: $q, approximate: «true»}"),
        "bad-attribute-value",
        "gelu's approximate is a string, not True",
    ),
    "too many optional nodes": Mistake(
        nodes(
            Q,
            *(f"o{i}: {{op: relu, input: $q, optional: true}}" for i in range(8)),
            "o8: {op: relu, input: $q, «optional»: true}",
        ),
        "too-many",
        "9 optional nodes; at most 8 in one pattern",
    ),
    "list for a reference": Mistake(
        nodes("q: {op: linear, «input»: [$x]}", "r: {op: relu, input: $q}"),
        "wrong-type",
        "input is a string, not a list",
    ),
    "reference for a list": Mistake(
        nodes(Q, "r: {op: relu, inputs: «$q»}"),
        "wrong-type",
        "inputs is a list, not '$q'",
        'put it into a list: ["..."]',
    ),
    "no operator after all": Mistake(
        nodes("q: {op: «null», input: $x}"),
        "wrong-type",
        "op is a string or a list of them, not nothing",
    ),
    "$ in an exclusion": Mistake(
        nodes(Q, K, rest=f"    unless: [{{node: «$q»}}]\n{PIVOTED}"),
        "bad-name",
        "'$q' is a reference, and a name is wanted here",
        "without the $: q",
    ),
    "trap: node twice": Mistake(
        nodes(Q, "«q»: {op: linear, input: $x}"),
        "duplicate-key",
        "'q' is given twice (first on line 7)",
        "YAML would silently keep only the last",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_error_text(case: str) -> None:
    mistake = MISTAKES[case]
    assert errors(mistake.plain) == mistake.report


def test_all_problems_of_a_pattern_at_once() -> None:
    text = nodes(
        "q: {op: linaer, input: $x}",
        'k: {op: linear, input: $y, name: "{"}',
        "v: {op: linear, input: $x, optional: perhaps, in_feature: 3}",
        more="outputs: [w]",
        rest="    where: [q.bias >]\n    rewrite: {form: pivotd}\n",
    )
    found = errors(text)
    codes = [line.split("[")[1].split("]")[0] for line in found.splitlines() if " error[" in line]
    assert sorted(codes) == sorted(
        [
            "unknown-operator",
            "unbound-value",
            "bad-glob",
            "wrong-type",
            "unknown-attribute",
            "unknown-node",
            *["unused-node"] * 3,
            "unknown-form",
        ]
    )
