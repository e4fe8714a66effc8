"""The explanation's text, its JSON, and the folding of paths."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxcompress.rules import Explanation, MatchResult, match_rules, parse_rules
from fxcompress.rules.language.globs import expand
from fxcompress.rules.matching.folding import fold_numbers, fold_paths
from tests.rules.graphs import blocks, decoder

TEXT = """\
budget: {keep: 0.8}
rules:
  - id: mlp
    match: {node: {op: linear, as: fc, name: "*.mlp.*"}}
    unless: [{name: "*.layers.0.*"}]
    rewrite: {form: pivoted}
  - id: wide
    priority: 1
    match: {node: {op: linear, as: fc}}
    unless: [{shares_weight_with: embedding}]
    where: ["fc.out_features > 512", fc.bias]
    rewrite: none
  - id: attention
    match: {node: {op: linear, as: fc, name: "*.self_attn.*"}}
    where: [fc.out_features >= 256]
    rewrite: {form: pivoted}
"""


def result() -> MatchResult:
    loaded = parse_rules(TEXT, "rules.yaml")
    return match_rules(
        loaded, decoder(4), lambda operator: "frozen" if ".1." in operator.path else None
    )


def test_text(golden: Callable[[str, str], None]) -> None:
    golden("explain.txt", f"{Explanation.of(result())}\n")


def test_the_plan_adds_a_last_step() -> None:
    outcomes = {"model.layers.3.self_attn.o_proj.weight": "no saving: rank 448 ≥ break-even 418"}
    lines = str(Explanation.of(result(), outcomes, rule="attention")).splitlines()
    assert lines[1] == "29 linear → 16 name → 16 unless → 8 where → 6 legal → 5 rewritten"
    assert lines[2].startswith("near miss  model.layers.3.self_attn.o_proj ")
    assert " no saving: rank 448 ≥ break-even 418 " in lines[2]
    assert lines[3].startswith("rejected   model.layers.1.self_attn.{q_proj,o_proj} (2) ")


def test_an_overlap_shows_before_the_last_step() -> None:
    text = str(Explanation.of(result(), {}, rule="mlp"))
    assert text.splitlines()[1].endswith("6 legal → 0 kept")


def test_json() -> None:
    document = Explanation.of(result(), {}).to_json()
    assert json.loads(json.dumps(document)) == document
    mlp = document["rules"][0]
    assert mlp["rule"] == "mlp"
    assert mlp["funnel"]["legal"] == 6
    assert mlp["near_misses"][0]["sites"] == 6
    assert mlp["near_misses"][0]["step"] == "protected"
    assert document["problems"][0].startswith("rules.yaml:3 warning[no-match]")


def test_unknown_rule() -> None:
    with pytest.raises(KeyError):
        Explanation.of(result(), rule="nope")


def test_folding() -> None:
    paths = [f"h.{i}.{n}" for i in (0, 1, 2, 3, 7, 9, 10) for n in ("q", "k")]
    assert fold_paths([*paths, "lm_head", "a.b"]) == (
        ("h.{0..3,7,9..10}.{q,k}", 14),
        ("lm_head", 1),
        ("a.b", 1),
    )
    assert fold_paths(["h.0.q", "h.1.q", "h.1.k"]) == (("h.{0..1}.q", 2), ("h.1.k", 1))
    # "fc1" has an index as "h.1" has; a number with a zero before it is a name.
    assert fold_paths(["h.0.fc1", "h.0.fc2"]) == (("h.0.fc{1..2}", 2),)
    assert fold_paths(["h.01.fc", "h.02.fc"]) == (("h.{01,02}.fc", 2),)
    assert fold_numbers(["h.01 of 2", "h.02 of 2"]) == "h.{01,02} of 2"
    assert fold_paths(["h.01.fc", "h.02.fc", "h.01.fc"]) == (("h.01.fc", 2), ("h.02.fc", 1))
    assert fold_paths([]) == ()


@given(st.lists(st.tuples(st.integers(0, 4), st.sampled_from("qkv")), max_size=12))
def test_folding_loses_and_invents_nothing(parts: list[tuple[int, str]]) -> None:
    paths = [f"h.{number}.{word}" for number, word in parts]
    random.Random(0).shuffle(paths)
    seen: list[str] = []
    for folded, count in fold_paths(paths):
        numbered = folded
        for low in range(5):
            for high in range(low + 1, 5):
                whole = ",".join(map(str, range(low, high + 1)))
                numbered = numbered.replace(f"{low}..{high}", whole)
        found = list(expand(numbered))
        assert count % len(found) == 0
        seen += found * (count // len(found))
    assert sorted(seen) == sorted(paths)


JOINT = """\
budget: {keep: 0.8}
rules:
  - id: qkv
    match:
      inputs: [x]
      nodes:
        q: {op: linear, input: $x, name: "*.q"}
        k: {op: linear, input: $x, name: "*.k"}
        v: {op: linear, input: $x, name: "*.{v,value}"}
    rewrite: {any_of: [joint, pivoted]}
"""


def joint() -> Explanation:
    operators = [o for o in blocks(4) if o.path != "h.3.attn.v"]
    matched = match_rules(parse_rules(JOINT, "rules.yaml"), operators, lambda operator: None)
    return Explanation.of(matched, {"h.1.attn.q.weight": "no saving"})


def test_a_rule_about_several_operators(golden: Callable[[str, str], None]) -> None:
    golden("explain_joint.txt", f"{joint()}\n")


def test_its_json_lists_the_members() -> None:
    (rule,) = joint().to_json()["rules"]
    assert rule["counted"] == ["q"]
    assert rule["funnel"]["kept"] == rule["funnel"]["rewritten"] == 3
    assert rule["matched"] == [
        {
            "scope": "h.{0..2}.attn",
            "operators": [{"node": name, "path": name} for name in "qkv"],
            "matches": 3,
        }
    ]


def test_reasons_that_differ_in_a_number_are_one() -> None:
    operators = [o for o in blocks(3) if not o.path.endswith("attn.v")]
    matched = match_rules(parse_rules(JOINT, "rules.yaml"), operators, lambda operator: None)
    (near,) = Explanation.of(matched).rules[0].near
    assert near.reason == (
        'no linear named "*.{v,value}" reads the input of h.{0..2}.attn.k (node v)'
    )
    assert near.paths == (("h.{0..2}.attn.q", 3),)


def test_numbers_fold() -> None:
    assert fold_numbers(["a.0 of 8", "a.1 of 8", "a.3 of 8"]) == "a.{0..1,3} of 8"
    assert fold_numbers(["conv2d 1"]) == "conv2d 1"
