"""Patterns of several operators: what matches, what is lost where, and what becomes of it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from fxcompress.graph.operator import Operator
from fxcompress.rules import MatchResult, match_rules, parse_rules
from tests.rules.graphs import blocks, linear, plain, siblings

QKV = """\
      inputs: [x]
      nodes:
        q: {op: linear, input: $x, name: "*.q"}
        k: {op: linear, input: $x, name: "*.k"}
        v: {op: linear, input: $x, name: "*.v"}
"""
CHAIN = """\
      nodes:
        up: {op: linear}
        act: {op: [gelu, relu], input: $up}
        down: {op: linear, input: $act}
"""


def rule(
    match: str, rewrite: str = "{form: pivoted}", rest: Sequence[str] = (), name: str = "a"
) -> str:
    more = "".join(f"    {line}\n" for line in rest)
    return f"  - id: {name}\n    match:\n{match}{more}    rewrite: {rewrite}\n"


def match(
    rules: str,
    operators: Sequence[Operator],
    together: str | None = None,
    illegal: str = "-",
    head: str = "",
) -> MatchResult:
    text = f"budget: {{keep: 0.8}}\n{head}\nrules:\n{rules}"
    return match_rules(
        parse_rules(text, "r.yaml"),
        operators,
        lambda operator: "is frozen" if illegal in operator.path else None,
        lambda operators: together,
    )


def losses(result: MatchResult, name: str = "a") -> dict[str, tuple[str, str, str]]:
    return {m.path: (m.step, m.reason, m.location) for m in result.misses_of(name)}


def chain(*ops: str, leak: bool = False) -> list[Operator]:
    """``m.fc1``, plain operators one after the other, ``m.fc2``; and who else reads fc1."""
    operators = [linear("m.fc1")]
    for op in ops:
        operators.append(plain(op, "m", [operators[-1].name]))
    operators.append(linear("m.fc2", inputs_from=[operators[-1].name]))
    if leak:
        operators.append(plain("add", "m", ["m_fc1", "m_fc2"]))
    return operators


# ---- matching ---------------------------------------------------------------------------


def test_matches_bind_by_data_flow_not_by_name() -> None:
    result = match(rule(QKV), blocks(2))
    assert [dict(one.operators) for one in result.instances["a"]] == [
        {n: f"h.{block}.attn.{n}" for n in "qkv"} for block in (0, 1)
    ]
    assert [m.path for m in result.matches] == [f"h.{b}.attn.{n}" for b in (0, 1) for n in "qkv"]
    assert not result.bundles
    assert str(result.funnels["a"]) == (
        "12 linear → 2 name → 2 pattern → 2 unless → 2 where → 2 legal → 2 kept"
    )


def test_the_rarest_operator_is_the_anchor() -> None:
    result = match(rule(CHAIN), blocks(3))
    assert result.funnels["a"].anchors == ("act",)
    assert result.funnels["a"].ops == ("gelu", "relu")
    assert [m.path for m in result.matches] == [
        f"h.{b}.mlp.{n}" for b in range(3) for n in ("up", "down")
    ]


def test_operands_count_by_position_unless_the_operator_is_commutative() -> None:
    def pair(op: str) -> str:
        nodes = f"a: {{op: linear}}, c: {{op: {op}, inputs: [$a, $x]}}"
        return rule(f"      {{inputs: [x], nodes: {{{nodes}}}}}\n")

    start = plain("relu", "m")
    fc = linear("m.fc", inputs_from=["m_relu"])
    for op, swapped in (("add", True), ("matmul", False)):
        straight = [start, fc, plain(op, "m", ["m_fc", "m_relu"])]
        turned = [start, fc, plain(op, "m", ["m_relu", "m_fc"])]
        assert len(match(pair(op), straight).matches) == 1
        assert len(match(pair(op), turned).matches) == swapped


def test_one_value_read_twice() -> None:
    text = rule("      {nodes: {a: {op: linear}, c: {op: mul, inputs: [$a, $a]}}}\n")
    once = [linear("m.a"), linear("m.b"), plain("mul", "m", ["m_a", "m_b"])]
    twice = [linear("m.a"), plain("mul", "m", ["m_a", "m_a"])]
    assert [m.path for m in match(text, twice).matches] == ["m.a"]
    assert losses(match(text, once))["m"] == (
        "pattern",
        "its operands are not [$a, $a]",
        "r.yaml:6:36",
    )


def test_parameters_of_a_function_are_no_operands() -> None:
    weight = Operator("w", "parameter", "w", "", {}, (), (), None)
    norm = plain("layer_norm", "m")
    call = Operator(
        "f", "linear", "m", "m", {"in_features": 4}, ("m_layer_norm", "w"), (), None, "w"
    )
    text = rule("      nodes: {n: {op: layer_norm}, fc: {op: linear, inputs: [$n]}}\n", "none")
    assert [m.weight for m in match(text, [norm, weight, call]).protected] == ["w"]


def test_an_optional_operator_may_be_absent() -> None:
    text = rule(
        "      nodes:\n"
        "        up: {op: linear}\n"
        "        act: {op: [gelu, relu], input: $up}\n"
        "        drop: {op: dropout, input: $act, optional: true}\n"
        "        down: {op: linear, input: $drop}\n"
    )
    for ops in (["gelu"], ["gelu", "dropout"]):
        (found,) = match(text, chain(*ops)).instances["a"]
        names = ["up", "act", *["drop"] * (len(ops) - 1), "down"]
        assert [name for name, _ in found.operators] == names
    assert losses(match(text, chain("gelu", "tanh")))["m"] == (
        "pattern",
        "no other linear reads m (gelu) (node down)",
        "r.yaml:10:15",
    )


def test_any_of_is_the_union_and_the_first_alternative_wins() -> None:
    text = rule(
        "      any_of:\n"
        "        - group: {op: linear, as: fc}\n"
        "        - node: {op: linear, as: fc, name: '*1*'}\n"
    )
    operators = [*siblings(2), linear("m.out1", inputs_from=["m_n0"])]
    result = match(text, operators)
    assert [m.path for m in result.matches] == ["m.n0", "m.n1", "m.out1"]
    assert [len(one.operators) for one in result.instances["a"]] == [2, 1]
    assert not result.misses
    assert str(result.funnels["a"]).endswith("3 legal → 3 kept")


@pytest.mark.parametrize(
    ("bounds", "count", "reason"),
    [
        ("", 2, None),
        ("", 1, "1 linear reads m (relu); a group has at least 2"),
        ("min: 3, ", 2, "2 linear read m (relu); a group has at least 3"),
        ("max: 3, ", 4, "4 linear read m (relu); a group has at most 3"),
    ],
)
def test_group(bounds: str, count: int, reason: str | None) -> None:
    text = rule(f"      group: {{{bounds}op: linear, as: fc}}\n", "{form: joint}")
    result = match(text, siblings(count))
    if reason is None:
        (bundle,) = result.bundles
        assert bundle.members == tuple(f"m.n{i}.weight" for i in range(count))
        assert bundle.roles == ("fc",) * count
    else:
        assert {(m.step, m.reason) for m in result.misses} == {("pattern", reason)}
        assert len(result.misses) == count


def test_a_group_is_what_lies_in_one_module_of_the_scope() -> None:
    """Keys and values of two layers that read one value are two groups, not one of four."""
    names = [f"layers.{layer}.cross.{name}" for layer in (0, 1) for name in "kv"]
    operators = [linear("encoder"), *(linear(name, inputs_from=["encoder"]) for name in names)]
    group = '      group: {op: linear, as: fc, name: "*.{k,v}"}\n'
    (whole,) = match(rule(group, "{form: joint}"), operators).bundles
    assert len(whole.members) == 4
    scoped = match(rule(group + '      scope: "layers.[0-9]*"\n', "{form: joint}"), operators)
    assert [bundle.members for bundle in scoped.bundles] == [
        (f"layers.{layer}.cross.k.weight", f"layers.{layer}.cross.v.weight") for layer in (0, 1)
    ]
    nowhere = match(rule(group + '      scope: "blocks.*"\n', "{form: joint}"), operators)
    assert {miss.step for miss in nowhere.misses if miss.path != "encoder"} == {"scope"}


# ---- losses -----------------------------------------------------------------------------


def test_an_interior_value_may_not_be_read_outside() -> None:
    result = match(rule(CHAIN), chain("gelu", leak=True))
    assert losses(result)["m"] == (
        "pattern",
        '"up" (m.fc1) is also read by m (add)',
        "r.yaml:7:13",
    )
    allowed = match(rule(CHAIN + "      outputs: [up, down]\n"), chain("gelu", leak=True))
    assert len(allowed.instances["a"]) == 1


def test_a_match_is_convex() -> None:
    text = rule(
        "      {nodes: {a: {op: linear, name: '*.fc1'}, c: {op: add, inputs: [$a]}}, "
        "outputs: [a, c]}\n"
    )
    operators = chain("gelu", leak=True)
    assert losses(match(text, operators))["m"] == (
        "pattern",
        '"c" (m (add)) also depends on the match through m.fc2',
        "r.yaml:6:51",
    )


def test_the_near_miss_is_the_way_that_got_furthest() -> None:
    operators = [o for o in blocks(1) if o.path != "h.0.attn.v"]
    assert losses(match(rule(QKV), operators))["h.0.attn.q"] == (
        "pattern",
        'no linear named "*.v" reads the input of h.0.attn.k (node v)',
        "r.yaml:10:12",
    )


def test_scope_encloses_the_whole_match() -> None:
    text = rule('      scope: "*.mlp"\n' + CHAIN)
    assert len(match(text, blocks(2)).instances["a"]) == 2
    text = rule(
        '      scope: "*.{attn,mlp}"\n      nodes:\n'
        "        o: {op: linear, name: '*.o'}\n"
        "        s: {op: add, input: $o}\n"
        "        up: {op: linear, input: $s, name: '*.up'}\n"
        "      outputs: [s, up]\n"
    )
    assert losses(match(text, blocks(1)))["h.0.attn"] == (
        "scope",
        'no enclosing module is named "*.{attn,mlp}"',
        "r.yaml:6:14",
    )


def test_scope_of_a_single_operator() -> None:
    text = rule('      scope: "*.attn"\n      node: {op: linear}\n')
    result = match(text, blocks(1))
    assert [m.path for m in result.matches] == [f"h.0.attn.{n}" for n in "qkvo"]
    assert str(result.funnels["a"]) == (
        "6 linear → 6 name → 4 scope → 4 unless → 4 where → 4 legal → 4 kept"
    )


def test_unless_is_about_what_is_rewritten_or_about_the_node_it_names() -> None:
    nodes = CHAIN.replace("up: {op: linear}", "up: {op: linear, name: '*.up'}")
    hit = match(rule(nodes, rest=['unless: [{name: "h.0.*.down"}]']), blocks(2))
    assert losses(hit)["h.0.mlp"][:2] == ("unless", 'unless: name "h.0.*.down" (down)')
    assert len(hit.instances["a"]) == 1
    context = match(rule(nodes, rest=['unless: [{name: "h.0.mlp"}]']), blocks(2))
    assert len(context.instances["a"]) == 2
    named = match(rule(nodes, rest=['unless: [{node: act, scope: "h.0"}]']), blocks(2))
    assert losses(named)["h.0.mlp"][:2] == ("unless", 'unless: scope "h.0" (act)')


def test_where_sees_all_operators() -> None:
    rest = ["where: [up.out_features > 4 * down.out_features]"]
    result = match(rule(CHAIN, rest=rest), blocks(1))
    assert losses(result)["h.0.mlp"] == (
        "where",
        "where: up.out_features > 4 * down.out_features is False "
        "(up.out_features = 2048, down.out_features = 512)",
        "r.yaml:10:13",
    )


def test_where_holds_for_every_member_of_a_group() -> None:
    operators = [*siblings(2), linear("m.wide", 512, 64, inputs_from=["m_relu"])]
    text = rule(
        "      group: {op: linear, as: fc}\n",
        rest=["where: [count(fc) == 3, fc.out_features > 64]"],
    )
    result = match(text, operators)
    assert {(m.step, m.reason) for m in result.misses} == {
        ("where", "where: fc.out_features > 64 is False (fc.out_features = 64)")
    }


def test_legality_of_every_claimed_operator() -> None:
    assert losses(match(rule(QKV), blocks(1), illegal="attn.v"))["h.0.attn.q"] == (
        "legal",
        "v: is frozen",
        "r.yaml:4",
    )


def test_a_rule_takes_a_weight_once() -> None:
    text = rule(
        "      inputs: [x]\n      nodes: {a: {op: linear, input: $x}, b: {op: linear, input: $x}}\n"
    )
    result = match(text, siblings(5))
    assert [[path for _, path in one.operators] for one in result.instances["a"]] == [
        ["m.n0", "m.n1"],
        ["m.n2", "m.n3"],
    ]
    assert losses(result) == {
        "m.n4": ("pattern", "no other linear reads the input of m.n4 (node b)", "r.yaml:7:46")
    }


def test_a_match_that_wants_what_an_earlier_one_has_is_lost() -> None:
    nodes = 'q: {op: linear, input: $x, name: "*.n?"}, k: {op: linear, input: $x, name: "*.key"}'
    text = rule(f"      inputs: [x]\n      nodes: {{{nodes}}}\n")
    result = match(text, [*siblings(2), linear("m.key", inputs_from=["m_relu"])])
    assert [m.path for m in result.matches] == ["m.n0", "m.key"]
    assert losses(result)["m.n1"] == (
        "overlap",
        "k (m.key) is in an earlier match of this rule",
        "r.yaml:4",
    )
    assert str(result.funnels["a"]).endswith("2 legal → 1 kept")


def test_operators_that_are_read_in_turn_are_not_alike() -> None:
    text = rule(
        "      inputs: [x]\n"
        "      nodes:\n"
        "        a: {op: linear, input: $x}\n"
        "        b: {op: linear, input: $x}\n"
        "        c: {op: matmul, inputs: [$a, $b]}\n"
    )
    result = match(text, [*siblings(2), plain("matmul", "m", ["m_n1", "m_n0"])])
    assert [dict(one.operators) for one in result.instances["a"]] == [
        {"a": "m.n1", "b": "m.n0", "c": "m"}
    ]


def test_matches_along_a_chain_alternate() -> None:
    text = rule("      nodes: {a: {op: linear}, b: {op: linear, input: $a}}\n")
    operators = [linear("m.0"), linear("m.1", inputs_from=["m_0"])]
    operators.append(linear("m.2", inputs_from=["m_1"]))
    operators.append(linear("m.3", inputs_from=["m_2"]))
    operators.append(linear("m.4", inputs_from=["m_3"]))
    result = match(text, operators)
    assert [[path for _, path in one.operators] for one in result.instances["a"]] == [
        ["m.0", "m.1"],
        ["m.2", "m.3"],
    ]
    assert losses(result)["m.4"][:2] == ("pattern", "no other linear reads m.4 (node b)")


def test_a_match_loses_to_another_rule_as_a_whole() -> None:
    text = rule(QKV) + rule(
        "      node: {op: linear, name: 'h.1.attn.k'}\n", "none", ["priority: 1"], name="dense"
    )
    result = match(text, blocks(2))
    assert [m.path for m in result.matches] == [f"h.0.attn.{n}" for n in "qkv"]
    assert losses(result)["h.1.attn.q"][:2] == (
        "protected",
        "protected by rule 'dense' (rewrite: none)",
    )
    assert str(result.funnels["a"]).endswith("2 legal → 1 kept")


def test_the_larger_pattern_wins_an_overlap() -> None:
    text = rule("      node: {op: linear}\n", name="each") + rule(QKV)
    result = match(text, blocks(1))
    assert {m.path: m.rule_id for m in result.matches} == {
        **{f"h.0.attn.{n}": "a" for n in "qkv"},
        **dict.fromkeys(("h.0.attn.o", "h.0.mlp.up", "h.0.mlp.down"), "each"),
    }
    assert losses(result, "each")["h.0.attn.q"][1] == "taken by rule 'a' (a larger pattern)"


# ---- forms ------------------------------------------------------------------------------


def test_a_joint_form_makes_a_bundle() -> None:
    result = match(rule(QKV, "{any_of: [joint, pivoted], max_rank: 64}"), blocks(1))
    (bundle,) = result.bundles
    assert bundle.name == "a@h.0.attn.q"
    assert bundle.members == tuple(f"h.0.attn.{n}.weight" for n in "qkv")
    assert (bundle.roles, bundle.forms, bundle.limits.max_rank) == (("q", "k", "v"), ("joint",), 64)
    assert [m.forms for m in result.matches] == [("pivoted",)] * 3


def test_sites_of_a_joint_form_alone_are_matches_without_forms() -> None:
    result = match(rule(QKV, "{form: joint}"), blocks(1))
    assert [m.forms for m in result.matches] == [()] * 3
    assert not result.protected


def test_operators_that_cannot_be_joint() -> None:
    result = match(rule(QKV, "{any_of: [joint, pivoted]}"), blocks(3), together="differ")
    assert not result.bundles
    assert [m.forms for m in result.matches] == [("pivoted",)] * 9
    assert result.warnings == (
        "r.yaml:4 warning[joint-left-out]: rule 'a': joint left out for "
        "h.{0..2}.attn.{q,k,v}: differ",
    )
    alone = match(rule(QKV, "{form: joint}"), blocks(1), together="differ")
    assert losses(alone)["h.0.attn.q"] == ("legal", "differ", "r.yaml:11:21")


def test_one_operator_alone_cannot_be_joint() -> None:
    text = rule("      group: {min: 1, op: linear, as: fc}\n", "{any_of: [joint, pivoted]}")
    result = match(text, siblings(1))
    assert [m.forms for m in result.matches] == [("pivoted",)]
    (warning,) = result.warnings
    assert warning.endswith("joint left out for m.n0: joint needs two operators or more")


def test_a_module_called_twice_is_no_two_members() -> None:
    start = plain("relu", "m")
    calls = [
        linear("m.a", inputs_from=["m_relu"]),
        linear("m.a", name="a_1", inputs_from=["m_relu"]),
    ]
    calls.append(linear("m.b", inputs_from=["m_relu"]))
    text = rule("      group: {op: linear, as: fc}\n", "{form: joint}")
    assert {m.reason for m in match(text, [start, *calls]).misses} == {
        "m.a is in the match twice (fc and fc)"
    }


def test_only_the_nodes_named_are_rewritten() -> None:
    result = match(rule(CHAIN, "{form: pivoted, nodes: [down]}"), blocks(1))
    assert [m.path for m in result.matches] == ["h.0.mlp.down"]


GRAPH = (
    "{graph: {down: {op: linear, input: $x, weight: fc.right}, "
    "up: {op: linear, input: $down, weight: fc.left, bias: fc.bias}}, outputs: {fc: up}}"
)


def test_a_template_is_a_form_of_its_own() -> None:
    pattern = "      inputs: [x]\n      nodes: {fc: {op: linear, input: $x, name: '*.up'}}\n"
    result = match(rule(pattern, GRAPH), blocks(1))
    assert [(m.path, m.forms) for m in result.matches] == [("h.0.mlp.up", ("graph:a",))]
    lossy = GRAPH.replace(", bias: fc.bias", "")
    step, reason, _ = losses(match(rule(pattern, lossy), blocks(1)))["h.0.mlp.up"]
    assert (step, reason) == (
        "legal",
        "fc has a bias, and the template leaves it out (bias: fc.bias)",
    )


@pytest.mark.parametrize(
    ("wanted", "complaint"), [(2, None), (3, "expects 3 matches, and matches 2 matches")]
)
def test_expect_counts_matches(wanted: int, complaint: str | None) -> None:
    result = match(rule(QKV, rest=[f"expect: {{matches: {wanted}}}"]), blocks(2))
    assert [complaint in p.text for p in result.problems] == ([True] if complaint else [])
