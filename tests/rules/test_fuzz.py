"""Any text is a rule set or a RuleError, never anything else."""

from __future__ import annotations

import random

import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fxcompress.errors import RuleError
from fxcompress.rules import LoadedRules, load_rules, parse_rules

PRESETS = [load_rules(name).text for name in ("decoder", "encoder", "every-linear")]
TOKENS = (
    ": |- |  |\n|\n  |{|}|[|]|,|*a|&a |>= 4|> || |!!x |!|\"|'|#|%|@|`|\t|---\n|...\n|? |<<: |no|on"
    "|null|~|1e-3|1.0e-3|.inf|.nan|0x_|0b_|1:30|2020-13-45|op|as|name|match|any_of|node|nodes"
    '|graph|where|unless|rewrite|form|none|keep|rules|id|expect|matches|min|budget|"\\U0011FFFF"'
    '|"\\ud800"|\u2028|\x85|\x07|\ufeff|é|999999999999999999999999|linear|conv2d|fc.in_features'
    "|kernel_size|[3, 3]|{a,b}|\r\n|9" + "9" * 5000
).split("|")


def check(text: str) -> None:
    try:
        loaded = parse_rules(text, "r.yaml")
    except RuleError as error:
        message = str(error)
        assert message.startswith("r.yaml:")
        assert " error[" in message
        message.encode()
    else:
        assert isinstance(loaded, LoadedRules)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(PRESETS), st.integers(0, 2**32))
def test_mutated_presets(text: str, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(text) + 1)
        length = rng.choice([0, 0, 1, 3, 20])
        text = text[:at] + rng.choice(TOKENS) + text[at + length :]
    check(text)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(TOKENS), max_size=30).map("".join))
@example('a: "\\U0011FFFF"')
@example('budget: {keep: "\\ud800"}\nrules: [{id: "\\ud800"}]')
@example('"": 1\n"": 2')
@example("? [a]\n: b")
@example("a: 0x_\nb: 0b_\nc: 1:30")
def test_random_tokens(text: str) -> None:
    check(text)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60))
def test_random_text(text: str) -> None:
    check(text)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(TOKENS[:60]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["op", "as", "name", "node", "any_of", "form", "min", "max", "scope", "matches"]
            ),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(["match", "unless", "where", "rewrite", "expect", "id", "priority"]), plain)
def test_any_shape_anywhere(key: str, value: object) -> None:
    rule = {"id": "a", "match": {"node": {"op": "linear"}}, "rewrite": {"form": "pivoted"}}
    check(yaml.safe_dump({"budget": {"keep": 0.8}, "rules": [rule | {key: value}]}))
