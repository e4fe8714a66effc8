"""Every kind of error of a rule file, by its exact text."""

from __future__ import annotations

from pathlib import Path

import pytest

from fxcompress.errors import RuleError
from fxcompress.rules import load_rules, parse_rules

HEAD = "budget: {keep: 0.8}\nrules:\n"
RULE = "  - id: a\n    match: {node: {op: linear, as: fc}}\n    rewrite: {form: pivoted}\n"


def errors(text: str) -> str:
    with pytest.raises(RuleError) as caught:
        parse_rules(text, "r.yaml")
    return str(caught.value)


def rule(match: str = "node: {op: linear, as: fc}", rest: str = "rewrite: {form: pivoted}") -> str:
    return f"{HEAD}  - id: a\n    match: {{{match}}}\n    {rest}\n"


CASES = {
    "another word for convolutions": (
        rule("node: {op: conv}"),
        "r.yaml:4:24 error[unknown-operator]: unknown operator 'conv'\n"
        "   match: {node: {op: conv}}\n"
        "                      ^^^^ did you mean 'conv2d', 'conv1d' or 'conv3d'?",
    ),
    "attention is no operator": (
        rule("node: {op: attention}"),
        "^^^^^^^^^ did you mean 'linear', with name: \"*attn*\": attention is linear layers?",
    ),
    "another word for low rank": (
        rule(rest="rewrite: {form: svd}"),
        "r.yaml:5:21 error[unknown-form]: unknown form 'svd'\n"
        "   rewrite: {form: svd}\n"
        "                   ^^^ did you mean 'low_rank'?",
    ),
    "a metric by itself": (
        "metric: fisher\n" + HEAD + RULE,
        "r.yaml:1:9 error[wrong-type]: metric is a mapping, not 'fisher'\n"
        "   metric: fisher\n"
        "           ^^^^^^ metric: {kind: kfac}",
    ),
    "another word for kfac": (
        "metric: {kind: fisher}\n" + HEAD + RULE,
        "^^^^^^ did you mean 'kfac'?",
    ),
    "another word for macs": (
        "budget: {keep: 0.5, unit: flops}\nrules:\n" + RULE,
        "^^^^^ did you mean 'macs'?",
    ),
    "a percentage": (
        "budget: {keep: 80%}\nrules:\n" + RULE,
        "r.yaml:1:16 error[wrong-type]: keep is a number, not '80%'\n"
        "   budget: {keep: 80%}\n"
        "                  ^^^ 80 % is written 0.8",
    ),
    "a percentage as a number": (
        "budget: {keep: 80}\nrules:\n" + RULE,
        "r.yaml:1:16 error[bad-number]: keep is 80, and has to be at most 1\n"
        "   budget: {keep: 80}\n"
        "                  ^^ 80 % is written 0.8",
    ),
    "a rank": (
        rule(rest="rewrite: {form: pivoted, rank: 64}"),
        "^^^^ the budget chooses ranks; to set one, min_rank and max_rank: 64",
    ),
    "a regular expression": (
        rule("node: {op: linear, name: '^model\\..*\\.(q|k)_proj$'}"),
        "'^model\\..*\\.(q|k)_proj$' is a regular expression, and a name is a glob",
    ),
    "what it is as a glob": (
        rule("node: {op: linear, name: '^model\\..*\\.(q|k)_proj$'}"),
        '"model.*.{q,k}_proj": * is any text, dots too, and {a,b} an or',
    ),
    "unknown attribute": (
        rule("node: {op: linear, in_feature: 512}"),
        "r.yaml:4:32 error[unknown-attribute]: linear has no attribute 'in_feature'\n"
        "   match: {node: {op: linear, in_feature: 512}}\n"
        "                              ^^^^^^^^^^ did you mean 'in_features'?",
    ),
    "unknown key": (
        HEAD + RULE.replace("rewrite", "rewritte") + "    rewrite: none\n",
        "r.yaml:5:5 error[unknown-key]: unknown key 'rewritte'\n"
        "   rewritte: {form: pivoted}\n"
        "   ^^^^^^^^ did you mean 'rewrite'?",
    ),
    "unknown key in budget": (
        "budget: {kep: 0.8, keep: 0.8}\nrules:\n" + RULE,
        "r.yaml:1:10 error[unknown-key]: unknown key 'kep'\n"
        "   budget: {kep: 0.8, keep: 0.8}\n"
        "            ^^^ did you mean 'keep'?",
    ),
    "unknown operator": (
        rule("node: {op: linaer}"),
        "r.yaml:4:24 error[unknown-operator]: unknown operator 'linaer'\n"
        "   match: {node: {op: linaer}}\n"
        "                      ^^^^^^ did you mean 'linear'?",
    ),
    "operator without weight": (
        rule("node: {op: relu}"),
        "r.yaml:4:24 error[not-rewritable]: relu has no weight to rewrite\n"
        "   match: {node: {op: relu}}\n"
        "                      ^^^^ one of: linear, conv1d, conv2d, conv3d, conv_transpose1d, "
        "conv_transpose2d, conv_transpose3d, embedding",
    ),
    "unknown form": (
        rule(rest="rewrite: {any_of: [pivotd]}"),
        "r.yaml:5:24 error[unknown-form]: unknown form 'pivotd'\n"
        "   rewrite: {any_of: [pivotd]}\n"
        "                      ^^^^^^ did you mean 'pivoted'?",
    ),
    "unknown metric": (
        "metric: {kind: kfca}\n" + HEAD + RULE,
        "r.yaml:1:16 error[unknown-metric]: unknown metric 'kfca'\n"
        "   metric: {kind: kfca}\n"
        "                  ^^^^ did you mean 'kfac'?",
    ),
    "form that does not apply": (
        rule("node: {op: embedding}"),
        "r.yaml:5:21 error[form-does-not-apply]: pivoted cannot rewrite embedding (line 4)\n"
        "   rewrite: {form: pivoted}\n"
        "                   ^^^^^^^ one of: embedding",
    ),
    "both forms": (
        rule(rest="rewrite: {form: pivoted, any_of: [low_rank]}"),
        "r.yaml:5:5 error[missing-form]: rewrite takes one of 'form', 'any_of' and 'graph'; "
        "it has 'form' and 'any_of'\n"
        "   rewrite: {form: pivoted, any_of: [low_rank]}\n"
        "   ^^^^^^^",
    ),
    "bad number": (
        "budget: {keep: 1.5}\nrules:\n" + RULE,
        "r.yaml:1:16 error[bad-number]: keep is 1.5, and has to be at most 1\n"
        "   budget: {keep: 1.5}\n"
        "                  ^^^",
    ),
    "ranks the wrong way round": (
        rule(rest="rewrite: {form: pivoted, min_rank: 8, max_rank: 4}"),
        "r.yaml:5:5 error[bad-number]: min_rank 8 is above max_rank 4\n"
        "   rewrite: {form: pivoted, min_rank: 8, max_rank: 4}\n"
        "   ^^^^^^^",
    ),
    "wrong type": (
        rule(rest='rewrite: {form: pivoted, min_rank: "8"}'),
        "r.yaml:5:40 error[wrong-type]: min_rank is a whole number, not '8'\n"
        '   rewrite: {form: pivoted, min_rank: "8"}\n'
        "                                      ^^^ without the quotes",
    ),
    "attribute of a wrong type": (
        rule("node: {op: linear, in_features: many}"),
        "r.yaml:4:45 error[bad-attribute-value]: linear's in_features is a whole number, "
        "not 'many'\n"
        "   match: {node: {op: linear, in_features: many}}\n"
        "                                           ^^^^ conditions on numbers go into 'where'",
    ),
    "attribute of a wrong length": (
        rule("node: {op: conv2d, kernel_size: [3, 3, 3]}", "rewrite: none"),
        "r.yaml:4:45 error[bad-attribute-value]: conv2d's kernel_size has 2 numbers, not 3\n"
        "   match: {node: {op: conv2d, kernel_size: [3, 3, 3]}}\n"
        "                                           ^ for example [3, 3]",
    ),
    "no matcher": (
        rule(""),
        "r.yaml:4:5 error[no-positive-matcher]: match takes one of 'node', 'nodes', 'group' "
        "and 'any_of'; it has none of them\n"
        "   match: {}\n"
        "   ^^^^^",
    ),
    "no operator": (
        rule('node: {name: "*.mlp"}'),
        "r.yaml:4:13 error[no-positive-matcher]: node needs 'op'\n"
        '   match: {node: {name: "*.mlp"}}\n'
        "           ^^^^ for example op: linear",
    ),
    "empty unless": (
        rule(rest="unless: [{}]\n    rewrite: none"),
        "r.yaml:5:14 error[no-positive-matcher]: an empty entry of 'unless' excludes nothing\n"
        "   unless: [{}]\n"
        "            ^",
    ),
    "duplicate id": (
        HEAD + RULE + RULE,
        "r.yaml:6:9 error[duplicate-id]: rule id 'a' is used twice (first on line 3)\n"
        "   - id: a\n"
        "         ^",
    ),
    "alternatives that differ": (
        rule("any_of: [{node: {op: linear, as: x}}, {node: {op: linear, as: y}}]"),
        "r.yaml:4:71 error[alternatives-differ]: alternatives of any_of have to bind the same "
        "name: 'x', 'y'\n"
        "   match: {any_of: [{node: {op: linear, as: x}}, {node: {op: linear, as: y}}]}\n"
        "                                                                     ^^",
    ),
    "bad glob": (
        rule('node: {op: linear, name: "*.{q,k"}'),
        "r.yaml:4:38 error[bad-glob]: '{' is never closed\n"
        '   match: {node: {op: linear, name: "*.{q,k"}}\n'
        "                                    ^^^^^^^^",
    ),
    "bad name": (
        rule("node: {op: linear, as: 1fc}"),
        "r.yaml:4:36 error[bad-name]: '1fc' is not an identifier\n"
        "   match: {node: {op: linear, as: 1fc}}\n"
        "                                  ^^^ letters, digits and _",
    ),
    "unbound name": (
        rule(rest='where: ["cf.in_features > 3"]\n    rewrite: none'),
        "r.yaml:5:14 error[unbound-name]: 'cf' is not bound; this rule binds 'fc'\n"
        '   where: ["cf.in_features > 3"]\n'
        "            ^^ one of: fc",
    ),
    "unknown attribute in an expression": (
        rule(rest="where: [fc.bias and fc.in_feature > 3]\n    rewrite: none"),
        "r.yaml:5:28 error[unknown-attribute]: 'fc' has no attribute 'in_feature'\n"
        "   where: [fc.bias and fc.in_feature > 3]\n"
        "                          ^^^^^^^^^^ did you mean 'in_features'?",
    ),
    "forbidden expression": (
        rule(rest='where: ["fc.in_features ** 9 > 3"]\n    rewrite: none'),
        "r.yaml:5:14 error[forbidden-expression]: '**' is not allowed here\n"
        '   where: ["fc.in_features ** 9 > 3"]\n'
        "            ^^^^^^^^^^^^^^^^^^^",
    ),
    "unknown rewrite": (
        rule(rest="rewrite: pivoted"),
        "r.yaml:5:14 error[unknown-value]: unknown rewrite 'pivoted'\n"
        "   rewrite: pivoted\n"
        "            ^^^^^^^ a mapping such as {form: pivoted}, or none to leave the matches dense",
    ),
    "unknown default": (
        "defaults: {tied: skp}\n" + HEAD + RULE,
        "r.yaml:1:18 error[unknown-value]: unknown tied 'skp'\n"
        "   defaults: {tied: skp}\n"
        "                    ^^^ did you mean 'skip'?",
    ),
    "latency of the model": (
        "budget: {keep: 0.8, of: model, unit: latency}\nrules:\n" + RULE,
        "r.yaml:1:1 error[wrong-place]: latency is measured for the matched operators only: leave "
        "'of' out\n"
        "   budget: {keep: 0.8, of: model, unit: latency}\n"
        "   ^^^^^^",
    ),
    "budgets of one unit": (
        "budget: [{keep: 0.8}, {keep: 0.5}]\nrules:\n" + RULE,
        "r.yaml:1:1 error[duplicate-budget]: two budgets are about the same unit: keep the tighter "
        "one\n"
        "   budget: [{keep: 0.8}, {keep: 0.5}]\n"
        "   ^^^^^^",
    ),
    "one of several budgets": (
        "budget: [{keep: 0.8}, {keep: 0.5, unit: mac}]\nrules:\n" + RULE,
        "r.yaml:1:41 error[unknown-value]: unknown unit 'mac'\n"
        "   budget: [{keep: 0.8}, {keep: 0.5, unit: mac}]\n"
        "                                           ^^^ did you mean 'macs'?",
    ),
    "later: device": (
        "budget: {keep: 0.5, device: cpu}\nrules:\n" + RULE,
        "r.yaml:1:21 error[not-supported]: 'device' is not supported by this version\n"
        "   budget: {keep: 0.5, device: cpu}\n"
        "                       ^^^^^^",
    ),
    "rounds that change nothing": (
        "solver: {rounds: 3}\n" + HEAD + RULE,
        "r.yaml:1:1 error[wrong-place]: rounds without gradient steps change nothing: give 'steps' "
        "too, or 'correct'\n"
        "   solver: {rounds: 3}\n"
        "   ^^^^^^",
    ),
    "trap: alias": (
        rule("node: {op: linear, name: *.mlp}"),
        "r.yaml:4:38 error[yaml-alias]: '*.mlp' starts an alias in YAML\n"
        "   match: {node: {op: linear, name: *.mlp}}\n"
        '                                    ^^^^^ quote it: "*.mlp"',
    ),
    "trap: alias that scans": (
        rule("node: {op: linear, name: *mlp}"),
        "r.yaml:4:38 error[yaml-alias]: '*mlp' is an alias in YAML, and aliases are not allowed\n"
        "   match: {node: {op: linear, name: *mlp}}\n"
        '                                    ^^^^ quote a glob: "*mlp"',
    ),
    "trap: block scalar": (
        rule("node: {op: linear}", "where:\n      - >= 4\n    rewrite: none"),
        "r.yaml:6:9 error[yaml-block-scalar]: '>' starts a block of text in YAML\n"
        "   - >= 4\n"
        "     ^^^^ a condition goes into 'where', in full: \"fc.in_features >= 4\"",
    ),
    "words of YAML 1.1 are plain strings": (
        "on: 3\n" + HEAD + RULE.replace("id: a", "id: no"),
        "r.yaml:1:1 error[unknown-key]: unknown key 'on'\n"
        "   on: 3\n"
        "   ^^ one of: version, extends, budget, metric, solver, defaults, memory, rules, tests",
    ),
    "trap: duplicate key": (
        rule(rest="rewrite: none\n    rewrite: {form: pivoted}"),
        "r.yaml:6:5 error[duplicate-key]: 'rewrite' is given twice (first on line 5)\n"
        "   rewrite: {form: pivoted}\n"
        "   ^^^^^^^ YAML would silently keep only the last",
    ),
    "trap: tab": (
        "budget:\n\tkeep: 0.8\nrules:\n" + RULE,
        "r.yaml:2:1 error[yaml-tab]: a tab; YAML indents with spaces only\n"
        "   keep: 0.8\n"
        "   ^ use spaces",
    ),
    "trap: comma in a list": (
        rule(rest="where: [min(fc.in_features, 3) > 2]\n    rewrite: none"),
        "r.yaml:5:13 error[yaml-comma]: 'min(fc.in_features' is only a part: the commas of a "
        "[list] split the expression\n"
        "   where: [min(fc.in_features, 3) > 2]\n"
        "           ^^^^^^^^^^^^^^^^^^ quote the whole expression",
    ),
    "anchor": (
        "budget: &b {keep: 0.8}\nrules:\n" + RULE,
        "r.yaml:1:9 error[yaml-anchor]: anchors are not allowed ('&b')\n"
        "   budget: &b {keep: 0.8}\n"
        "           ^^",
    ),
    "tag": (
        "budget: !!python/object:os.system {keep: 0.8}\nrules:\n" + RULE,
        "r.yaml:1:9 error[yaml-tag]: tags ('!...') are not allowed",
    ),
    "second document": (
        HEAD + RULE + "---\nversion: 1\n",
        "r.yaml:6:1 error[yaml-documents]: a second document; a rule file holds one\n"
        "   ---\n"
        "   ^^^",
    ),
    "depth": (
        "budget: " + "[" * 60 + "]" * 60,
        "r.yaml:1:58 error[yaml-depth]: nested deeper than 50",
    ),
    "syntax": (
        "budget: {keep: 0.8\nrules: []\n",
        "r.yaml:2:6 error[yaml-syntax]:",
    ),
    "mapping as a key": (
        "budget: {{keep}: 0.8}\nrules:\n" + RULE,
        "r.yaml:1:10 error[invalid-key]: a list or mapping used as a key\n"
        "   budget: {{keep}: 0.8}\n"
        "            ^ quote text that holds { or [",
    ),
    "list at top level": (
        "- id: a\n",
        "r.yaml:1:1 error[not-a-mapping]: a rule file is a mapping, not a list\n"
        "   - id: a\n"
        "   ^^^^^^^ rules go under the key 'rules'",
    ),
    "text at top level": (
        "hello\n",
        "r.yaml:1:1 error[not-a-mapping]: a rule file is a mapping, not plain text\n"
        "   hello\n"
        "   ^^^^^",
    ),
    "empty": (
        "# nothing\n",
        "r.yaml:1:1 error[empty]: an empty rule file\n   it needs at least 'budget' and 'rules'",
    ),
    "no rules": (
        "budget: {keep: 0.8}\nrules: []\n",
        "r.yaml:2:1 error[empty-list]: rules is an empty list\n   rules: []\n   ^^^^^",
    ),
    "control character": (
        'budget: {keep: "\x07"}\n',
        "r.yaml:1:17 error[yaml-character]: a character that YAML forbids (U+0007)",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_error_text(case: str) -> None:
    text, expected = CASES[case]
    found = errors(text)
    assert expected in found
    assert found.startswith("r.yaml:")


# A list split at its commas is as many mistakes as it has parts.
ALONE = sorted(set(CASES) - {"trap: comma in a list"})


@pytest.mark.parametrize("case", ALONE)
def test_one_mistake_is_one_error(case: str) -> None:
    assert errors(CASES[case][0]).count(" error[") == 1


def test_all_errors_of_a_file_at_once() -> None:
    text = """\
budget: {keep: 2}
rules:
  - id: a
    match: {node: {op: linaer, name: *.mlp}}
    rewrite: {form: pivotd}
  - id: a
    prioritty: 3
    match: {node: {op: linear, in_feature: 3}}
    where: [node.bias > ]
    rewrite: none
"""
    found = errors(text)
    codes = [line.split("[")[1].split("]")[0] for line in found.splitlines() if "error[" in line]
    assert codes == [
        "bad-number",
        "yaml-alias",
        "unknown-form",
        "duplicate-id",
        "unknown-key",
        "unknown-attribute",
        "bad-expression",
    ]


def test_long_lines_keep_the_mistake_in_view() -> None:
    padding = ", ".join(f"fc.bias == {'true' if i % 2 else 'True'}" for i in range(40))
    found = errors(rule(rest=f"where: [{padding}, fc.nope]\n    rewrite: none"))
    last = found.split("error[unknown-attribute]")[-1].splitlines()
    at = last[2].index("^")
    assert last[1][at : at + 4] == "nope"
    assert len(last[1]) < 140


def test_wide_characters_do_not_shift_the_caret() -> None:
    found = errors(rule(rest="where: [\"fc.dtype == 'größe' and fc.nope\"]\n    rewrite: none"))
    line, carets = found.splitlines()[1:3]
    assert line[carets.index("^") :].startswith("nope")


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"", "f.yaml:1:1 error[empty]"),
        (b"\x00\x01\x02", "f.yaml:1:1 error[binary]: a binary file, not YAML text"),
        (b"a: 1\nb: \xff\n", "f.yaml:2:4 error[not-utf-8]: byte 0xff is not UTF-8"),
        (b"# " + b"x" * 1_000_001, "f.yaml:1:1 error[too-large]: 1,000,003 bytes"),
    ],
)
def test_unusable_files(tmp_path: Path, raw: bytes, expected: str) -> None:
    path = tmp_path / "f.yaml"
    path.write_bytes(raw)
    with pytest.raises(RuleError) as caught:
        load_rules(path)
    assert expected in str(caught.value)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(
        RuleError, match=r"error\[unreadable\].*\n   presets are one of: convolutional, decoder"
    ):
        load_rules(tmp_path / "missing.yaml")
    with pytest.raises(RuleError, match=r"did you mean 'decoder'\?"):
        load_rules("decodr")
    with pytest.raises(RuleError, match="unreadable"):
        load_rules(tmp_path)
    with pytest.raises(RuleError, match="unreadable"):
        load_rules("nul\0l")


def test_a_billion_laughs_are_refused() -> None:
    bomb = "a: &a [x, x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(20)
    )
    assert "anchors are not allowed" in errors(bomb)
