"""Rule tests: their graphs become operators, and what differs is told in full."""

from __future__ import annotations

import pytest

from fxcompress.errors import RecordError
from fxcompress.graph.operator import Operator
from fxcompress.rules import (
    Case,
    CaseNode,
    LoadedRules,
    MatchResult,
    match_rules,
    parse_rules,
    run_cases,
)
from fxcompress.rules.matching.case_graph import build_operators

RULES = """\
budget: {keep: 0.8}
rules:
  - id: mlp
    match: {node: {op: linear, as: fc, name: "*.mlp.*"}}
    unless: [{name: "*.down"}, {shares_weight_with: embedding}]
    where: [fc.in_features >= 64]
    rewrite: {form: pivoted}
  - id: qkv
    match: {group: {op: linear, as: fc, name: "*.{q,k,v}"}}
    rewrite: {any_of: [joint, pivoted]}
tests:
  - name: a block
    graph:
      e: {op: embedding, path: emb, input: $ids}
      q: {op: linear, path: a.q, input: $e}
      k: {op: linear, path: a.k, input: $e}
      up: {op: linear, path: a.mlp.up, input: $q}
      act: {op: relu, path: a.mlp, input: $up}
      down: {op: linear, path: a.mlp.down, input: $act}
      small: {op: linear, path: a.mlp.small, input: $act, in_features: 32}
      head: {op: linear, path: a.mlp.head, input: $down, weight: emb.weight}
    matches: %s
    misses: %s
"""


def load(matches: str = "{mlp: [a.mlp.up]}", misses: str = "{}") -> LoadedRules:
    return parse_rules(RULES % (matches, misses), "r.yaml")


@pytest.mark.parametrize(
    ("matches", "misses"),
    [
        ("{mlp: [a.mlp.up]}", "{}"),
        ("{qkv: [a.q, a.k]}", "{}"),
        ("{qkv: [[a.k, a.q]], mlp: [[a.mlp.up]]}", "{}"),
        ("{}", "{mlp: {a.mlp.down: unless, a.mlp.small: where, a.q: name, a.mlp: op}}"),
        ("{}", "{mlp: {a.mlp.small: fc.in_features = 32, a.mlp.head: shares_weight_with}}"),
    ],
)
def test_what_is_so_passes(matches: str, misses: str) -> None:
    (result,) = run_cases(load(matches, misses))
    assert result.passed, str(result)
    assert str(result) == "ok    a block"
    assert result.to_json()["passed"] is True


def test_a_wrong_set_of_matches() -> None:
    (result,) = run_cases(load("{mlp: [a.mlp.down]}"))
    (failure,) = result.failures
    assert (result.location, failure.location) == ("r.yaml:12:5", "r.yaml:22:20")
    assert failure.message == (
        "rule 'mlp' should match a.mlp.down; it matches a.mlp.up\n"
        "  not matched: a.mlp.down (lost at step 'unless', r.yaml:5:14: name \"*.down\")\n"
        "  not expected: a.mlp.up"
    )
    assert failure.explanation.startswith("rule mlp (r.yaml:3)\n")
    assert str(result).startswith("FAIL  a block  (r.yaml:12:5)\n      r.yaml:22:20: rule 'mlp'")
    assert result.to_json()["failures"][0]["location"] == "r.yaml:22:20"


def test_members_of_a_match_count_together() -> None:
    (result,) = run_cases(load("{qkv: [[a.q], [a.k]]}"))
    (failure,) = result.failures
    assert failure.message == (
        "rule 'qkv' should match a.k, a.q; it matches [a.k, a.q]\n"
        "  not matched: a.k (matched, but not together with these)\n"
        "  not matched: a.q (matched, but not together with these)\n"
        "  not expected: [a.k, a.q]"
    )


@pytest.mark.parametrize(
    ("misses", "expected"),
    [
        (
            "{mlp: {a.mlp.up: where}}",
            "rule 'mlp' should lose a.mlp.up at step 'where'; the rule matches it",
        ),
        (
            "{mlp: {a.mlp.down: where}}",
            "rule 'mlp' should lose a.mlp.down at step 'where'; it was lost at step 'unless', "
            'r.yaml:5:14: name "*.down"',
        ),
        (
            "{mlp: {a.mlp.small: too narrow}}",
            "rule 'mlp' should lose a.mlp.small because of 'too narrow'; it was lost at step "
            "'where', r.yaml:6:13: fc.in_features >= 64 is False (fc.in_features = 32)",
        ),
        (
            "{mlp: {a.mlp: name}}",
            "rule 'mlp' should lose a.mlp at step 'name'; the rule is about other operators "
            "(step 'op')",
        ),
    ],
)
def test_wrong_misses(misses: str, expected: str) -> None:
    (result,) = run_cases(load("{}", misses))
    (failure,) = result.failures
    assert failure.message == expected
    assert failure.location.startswith("r.yaml:23:")


def test_a_condition_that_fails_is_a_failure() -> None:
    text = (RULES % ("{mlp: []}", "{}")).replace("fc.in_features >= 64", "fc.in_features / 0 > 1")
    (result,) = run_cases(parse_rules(text, "r.yaml"))
    assert result.failures[0].location.startswith("r.yaml:14:")
    assert "did not run: r.yaml:6:13 error[expression-failed]" in result.failures[0].message


MODEL = RULES.partition("tests:")[0] + (
    "tests:\n  - {name: m, model: f.py:net, matches: {mlp: [a.mlp.up]}}\n"
)


def test_models_are_matched_by_the_caller() -> None:
    loaded = parse_rules(MODEL, "r.yaml")
    nodes = {"fc": CaseNode(op="linear", path="a.mlp.up")}

    def match_model(case: Case) -> MatchResult:
        assert case.model == "f.py:net"
        return match_rules(loaded, build_operators(nodes), lambda operator: None)

    assert run_cases(loaded, match_model)[0].passed
    with pytest.raises(ValueError, match="needs a model"):
        run_cases(loaded)


def test_a_model_that_does_not_run_is_a_failure() -> None:
    def match_model(case: Case) -> MatchResult:
        raise RecordError("it stumbled")

    (result,) = run_cases(parse_rules(MODEL, "r.yaml"), match_model)
    assert [(f.location, f.message) for f in result.failures] == [
        ("r.yaml:12:22", "did not run: it stumbled")
    ]


# ---- graphs ---------------------------------------------------------------------------


def operators(**nodes: CaseNode) -> dict[str, Operator]:
    return {operator.name: operator for operator in build_operators(nodes)}


def test_defaults_of_a_linear_operator() -> None:
    fc = operators(fc=CaseNode(op="linear", path="layers.0.fc", in_features=8))["fc"]
    assert fc.attributes == {
        "in_features": 8,
        "out_features": 64,
        "bias": True,
        "dtype": "float32",
    }
    assert (fc.path, fc.scope, fc.weight) == ("layers.0.fc", "layers.0", "layers.0.fc.weight")


def test_defaults_of_a_convolution() -> None:
    c = operators(c=CaseNode(op="conv2d", kernel_size=5, stride=[2, 1]))["c"]
    assert c.attributes["kernel_size"] == (5, 5)
    assert c.attributes["stride"] == (2, 1)
    assert c.attributes["padding"] == (1, 1)
    assert (c.path, c.scope, c.weight) == ("c", "", "c.weight")


def test_values_from_outside_need_no_node() -> None:
    fc = CaseNode(op="linear", input="$x")
    assert operators(x=CaseNode(op="input"), fc=fc) == operators(fc=fc)


def test_values_and_their_readers() -> None:
    found = operators(
        s=CaseNode(op="add", inputs=["$q", "$x"]),
        q=CaseNode(op="linear", input="$x", weight="other.weight"),
        n=CaseNode(op="layer_norm", input="$q", eps=1e-5, scope="block"),
    )
    assert next(iter(found)) == "x"
    assert list(found)[-1] == "output"
    assert list(found).index("q") < list(found).index("s")
    assert found["x"].op == "input"
    assert set(found["x"].users) == {"s", "q"}
    assert found["q"].weight == "other.weight"
    assert found["s"].inputs == ("q", "x")
    assert found["s"].weight is None
    assert found["n"].attributes == {"eps": 1e-5}
    assert found["n"].scope == "block"
    assert found["output"].inputs == ("s", "n")
    assert found["s"].users == ("output",)
