"""Matching: each step, ties, repeated calls, overlaps, funnels and problems."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest

from fxcompress.errors import RuleError
from fxcompress.graph.operator import Operator
from fxcompress.rules import (
    Defaults,
    Limits,
    MatchResult,
    Miss,
    Rewrite,
    match_rules,
    parse_rules,
)
from tests.rules.graphs import conv2d, decoder, embedding, linear, plain


def match(rules: str, operators: Sequence[Operator], head: str = "") -> MatchResult:
    text = f"budget: {{keep: 0.8}}\n{head}\nrules:\n{rules}"
    return match_rules(parse_rules(text, "r.yaml"), operators, lambda operator: None)


def rule(
    name: str = "a",
    node: str = "op: linear, as: fc",
    rest: str = "",
    rewrite: str = "{form: pivoted}",
) -> str:
    more = "".join(f"    {line}\n" for line in rest.splitlines())
    return f"  - id: {name}\n    match: {{node: {{{node}}}}}\n{more}    rewrite: {rewrite}\n"


def weights(result: MatchResult) -> list[str]:
    return [found.weight.removesuffix(".weight") for found in result.matches]


def only_miss(result: MatchResult) -> Miss:
    (miss,) = result.misses
    return miss


def test_name_and_order() -> None:
    found = weights(match(rule(node='op: linear, name: ["*.q_proj", "*.mlp.up*"]'), decoder(2)))
    assert found == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.mlp.up_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
    ]


def test_match_carries_the_merged_defaults() -> None:
    text = rule("a", 'op: linear, name: "x"', "", "{form: pivoted, max_rank: 64, group: g}")
    text += rule("b", 'op: linear, name: "y"', "", "{any_of: [low_rank, pivoted], min_rank: 2}")
    result = match(text, [linear("x"), linear("y")], "defaults: {multiple_of: 8, min_rank: 4}")
    x, y = result.matches
    assert (x.forms, x.group) == (("pivoted",), "g")
    assert x.limits == Limits(min_rank=4, max_rank=64, multiple_of=8)
    assert (y.forms, y.group) == (("low_rank", "pivoted"), None)
    assert y.limits == Limits(min_rank=2, multiple_of=8)
    assert (x.location, x.operators, x.op, x.path) == ("r.yaml:4", ("x",), "linear", "x")


def test_every_limit_can_be_given_by_a_rule() -> None:
    """A limit is filled from the keys of its name: those of the schema, and no others."""
    names = {field.name for field in dataclasses.fields(Limits)}
    assert names <= Rewrite.model_fields.keys()
    shared = names & Defaults.model_fields.keys()
    assert shared == {"min_rank", "multiple_of", "min_saving"}
    given = Rewrite(form="pivoted", min_rank=3, min_saving=0.0, unmeasured=True)
    limits = Limits.of(given, Defaults(min_rank=2, multiple_of=8, min_saving=0.5))
    assert limits == Limits(min_rank=3, multiple_of=8, min_saving=0.0, unmeasured=True)
    assert Limits.of(None, Defaults(min_saving=0.5)) == Limits(min_saving=0.5)


@pytest.mark.parametrize(
    ("node", "expected"),
    [
        ("kernel_size: [3, 3]", ["c3", "g"]),
        ("kernel_size: 3", ["c3", "g"]),
        ("kernel_size: [[1, 1], [3, 3]]", ["c1", "c3", "g"]),
        ("kernel_size: 3, groups: 1", ["c3"]),
        ("in_channels: [32, 64]", ["c1", "c3", "g"]),
        ("in_channels: 32", []),
        ("padding_mode: zeros, bias: false", ["c1", "c3", "g"]),
    ],
)
def test_attributes(node: str, expected: list[str]) -> None:
    operators = [conv2d("c1", kernel=1), conv2d("c3"), conv2d("g", groups=64)]
    text = f"  - id: a\n    match: {{node: {{op: conv2d, {node}}}}}\n    rewrite: none\n"
    result = match(text, operators)
    assert [found.path for found in result.protected] == expected
    assert {miss.step for miss in result.misses} <= {"attribute"}


def test_attribute_miss_names_the_values() -> None:
    text = "  - id: a\n    match: {node: {op: conv2d, kernel_size: 1}}\n    rewrite: none\n"
    miss = only_miss(match(text, [conv2d("c")]))
    assert miss == Miss(
        "a", "c", "c", "c.weight", "attribute", "kernel_size is [3, 3], not 1", "r.yaml:5:45"
    )


def test_unless() -> None:
    rest = 'unless: [{name: "*.0.*"}, {scope: "*.mlp", in_features: 512}]'
    result = match(rule(rest=rest), decoder(2)[:-1])
    assert weights(result) == [f"model.layers.1.self_attn.{n}_proj" for n in ("q", "o", "k", "v")]
    reasons = {miss.reason: miss.location for miss in result.misses}
    assert reasons == {
        'unless: name "*.0.*"': "r.yaml:6:14",
        'unless: scope "*.mlp", in_features 512': "r.yaml:6:31",
    }


def test_keys_of_one_exclusion_are_joined_by_and() -> None:
    rest = 'unless: [{name: "*.0.*", out_features: 128}]'
    lost = [miss.path for miss in match(rule(rest=rest), decoder(2)[:-1]).misses]
    assert lost == [f"model.layers.0.self_attn.{n}_proj" for n in ("k", "v")]


def test_where_gives_the_values() -> None:
    rest = 'where: ["min(fc.in_features, fc.out_features) >= 256"]'
    miss = only_miss(match(rule(rest=rest), [linear("a"), linear("b", 192, 512)]))
    assert (miss.step, miss.path, miss.location) == ("where", "b", "r.yaml:6:13")
    assert miss.reason == (
        "where: min(fc.in_features, fc.out_features) >= 256 is False "
        "(fc.in_features = 192, fc.out_features = 512)"
    )


def test_where_that_fails_is_a_located_error() -> None:
    rest = "where: [fc.in_features > 1, fc.in_features / fc.out_features > 1]"
    with pytest.raises(RuleError) as caught:
        match(rule(rest=rest), [linear("net.fc", 3, 0)])
    assert str(caught.value) == (
        "r.yaml:6:33 error[expression-failed]: on operator 'net.fc': division by zero (on 3, 0)\n"
        "   where: [fc.in_features > 1, fc.in_features / fc.out_features > 1]\n"
        "                               ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^"
    )


def test_any_of_in_a_match() -> None:
    text = """\
  - id: a
    match:
      any_of:
        - node: {op: linear, as: x, name: "*.q"}
        - node: {op: conv2d, as: x, groups: 1}
    where: [x.bias == false or x.bias == true]
    rewrite: none
"""
    text = text.replace("false", "False").replace("true", "True")
    operators = [linear("m.q"), conv2d("c"), linear("m.k"), conv2d("g", groups=2)]
    result = match(text, operators)
    assert [found.path for found in result.protected] == ["m.q", "c"]
    assert [(m.path, m.step) for m in result.misses] == [("m.k", "name"), ("g", "attribute")]
    assert str(result.funnels["a"]) == (
        "4 linear or conv2d → 3 name → 2 attribute → 2 unless → 2 where → 2 legal → 2 kept"
    )


def test_tied_weights_are_skipped_with_a_reason() -> None:
    result = match(rule(), decoder(1))
    assert "model.embed_tokens" not in weights(result)
    miss = only_miss(result)
    assert (miss.step, miss.path) == ("legal", "lm_head")
    assert miss.reason == "tied to model.embed_tokens (embedding) (defaults.tied: skip)"


def test_shares_weight_with() -> None:
    miss = only_miss(match(rule(rest="unless: [{shares_weight_with: embedding}]"), decoder(1)))
    assert (miss.step, miss.reason) == (
        "unless",
        "unless: shares_weight_with embedding (model.embed_tokens)",
    )


def test_two_linears_that_share_a_weight_are_tied() -> None:
    result = match(rule(), [linear("a", weight="w"), linear("b", weight="w"), linear("c")])
    assert weights(result) == ["c"]
    assert only_miss(result).reason == "tied to b (linear) (defaults.tied: skip)"


def test_a_module_called_twice_is_one_site() -> None:
    calls = [linear("a"), linear("a", name="a_1"), linear("b")]
    result = match(rule(), calls)
    assert [found.operators for found in result.matches] == [("a", "a_1"), ("b",)]
    assert result.funnels["a"]["op"] == 2
    skipped = match(rule(), calls, "defaults: {multi_call: skip}")
    assert only_miss(skipped).reason == "called 2 times (defaults.multi_call: skip)"


def test_one_call_is_enough_for_a_name_and_for_an_exclusion() -> None:
    calls = [
        linear("a.f", name="f1", weight="w", scope="a"),
        linear("a.f", name="f2", weight="w", scope="b"),
    ]
    assert len(match(rule(node='op: linear, name: "a.*"'), calls).matches) == 1
    assert only_miss(match(rule(rest="unless: [{scope: b}]"), calls)).step == "unless"


def test_legality() -> None:
    asked: list[str] = []

    def legality(operator: Operator) -> str | None:
        asked.append(operator.path)
        return "is frozen" if operator.path == "b" else None

    text = "budget: {keep: 0.8}\nrules:\n" + rule("a", 'op: linear, name: "?"') + rule("b")
    loaded = parse_rules(text, "r.yaml")
    result = match_rules(loaded, [linear("a"), linear("b")], legality)
    assert weights(result) == ["a"]
    assert [(m.rule_id, m.path, m.step, m.reason, m.location) for m in result.misses] == [
        ("a", "b", "legal", "is frozen", "r.yaml:3"),
        ("b", "a", "overlap", "taken by rule 'a' (earlier in the file)", "r.yaml:6"),
        ("b", "b", "legal", "is frozen", "r.yaml:6"),
    ]
    assert asked == ["a", "b"]


def test_a_linear_without_a_weight_parameter() -> None:
    miss = only_miss(match(rule(), [linear("a", weight=None), linear("b")]))
    assert (miss.step, miss.weight, miss.reason) == ("legal", None, "reads no weight parameter")


def test_priority_wins_an_overlap_and_the_loser_is_told() -> None:
    text = rule("low") + rule("high", 'op: linear, name: "*.q"', "priority: 5")
    result = match(text, [linear("m.q"), linear("m.k")])
    assert [(found.rule_id, found.path) for found in result.matches] == [
        ("high", "m.q"),
        ("low", "m.k"),
    ]
    misses = [miss for miss in result.misses if miss.rule_id == "low"]
    assert [miss.reason for miss in misses] == ["taken by rule 'high' (priority 5 > 0)"]
    assert str(result.funnels["low"]).endswith("2 legal → 1 kept")


def test_a_rule_protects_what_it_matches() -> None:
    text = rule("all") + rule("first", 'op: linear, name: "*.0.*"', "priority: 1", "none")
    result = match(text, [linear("h.0.fc"), linear("h.1.fc")])
    assert weights(result) == ["h.1.fc"]
    (kept,) = result.protected
    assert (kept.rule_id, kept.path, kept.forms) == ("first", "h.0.fc", ())
    lost = [(miss.step, miss.reason) for miss in result.misses if miss.rule_id == "all"]
    assert lost == [("protected", "protected by rule 'first' (rewrite: none)")]


def test_funnel_counts_sites() -> None:
    rest = """\
unless: [{name: "*.layers.0.*"}, {shares_weight_with: embedding}]
where: ["min(fc.in_features, fc.out_features) >= 256"]"""
    result = match(rule(node='op: linear, as: fc, name: "*.layers.*"', rest=rest), decoder(4))
    assert result.funnels["a"].steps == (
        ("op", 29),
        ("name", 28),
        ("unless", 21),
        ("where", 15),
        ("legal", 15),
        ("kept", 15),
    )
    assert len(result.matches) == 15
    assert len(result.misses) == 14


def test_graph_nodes_are_no_readers() -> None:
    parameter = Operator("w", "parameter", "", "", {}, (), ("a",), None, "a.weight")
    assert weights(match(rule(), [parameter, plain("relu", "x"), linear("a")])) == ["a"]


def test_nothing_matched_is_a_warning_with_advice() -> None:
    result = match(rule(node='op: linear, name: "*.mpl.*"'), decoder(1))
    assert result.warnings == (
        "r.yaml:4 warning[no-match]: rule 'a' matches nothing\n"
        "   8 linear → 0 name → 0 unless → 0 where → 0 legal → 0 kept\n"
        "   the last of 8 sites went at step 'name'\n"
        "   no path has 'mpl'; close: mlp\n"
        '   near miss  model.layers.0.self_attn.q_proj   name does not match "*.mpl.*"\n'
        '   near miss  model.layers.0.self_attn.o_proj   name does not match "*.mpl.*"\n'
        '   near miss  model.layers.0.self_attn.k_proj   name does not match "*.mpl.*"',
    )
    result.check()


def test_no_operator_of_that_kind() -> None:
    (warning,) = match(rule(), [embedding("e"), conv2d("c"), plain("relu", "")]).warnings
    assert warning.endswith("the graph has no linear; it has conv2d, embedding")


@pytest.mark.parametrize(
    ("expect", "complaint"),
    [
        ("{matches: 3}", None),
        ("{matches: {min: 1}}", None),
        ("{matches: {max: 2}}", "expects 0 to 2 sites, and matches 3 sites"),
        ("{matches: {min: 4}}", "expects at least 4 sites, and matches 3 sites"),
        ("{matches: 1}", "expects 1 site, and matches 3 sites"),
    ],
)
def test_expect(expect: str, complaint: str | None) -> None:
    result = match(rule(rest=f"expect: {expect}"), [linear(path) for path in "abc"])
    if complaint is None:
        result.check()
    else:
        with pytest.raises(RuleError, match=complaint) as caught:
            result.check()
        assert str(caught.value).startswith("r.yaml:6:13 error[expect]: rule 'a'")


def test_matching_is_deterministic() -> None:
    text = rule("x") + rule("y", 'op: linear, name: "*proj"', "priority: 2")
    first, second = match(text, decoder()), match(text, decoder())
    assert first.matches == second.matches
    assert first.misses == second.misses
