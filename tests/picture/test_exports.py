"""The picture as text, as JSON, for Graphviz and for Model Explorer."""

import json
import re
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import fxcompress
from fxcompress.errors import RecordError
from fxcompress.picture import Picture, graph_data
from fxcompress.picture.data import SITE
from fxcompress.plans.plan import NodeSummary, Plan
from tests.picture.graphs import PLANS, blocks, chain, compressed, only_planned, uniform
from tests.report.plans import plan, site

HOSTILE = [
    "</script><img src=x onerror=alert(1)>",
    'a "b" \\N \\"',
    "{|}<->;",
    "ünïcode 🙂",
    "__proto__",
]


def hostile() -> Plan:
    return chain(HOSTILE, [site(name, 64, 64, 8, rule=name) for name in HOSTILE])


def test_text_of_a_model() -> None:
    assert str(fxcompress.draw(blocks(), torch.randn(2, 8))) == (
        """\
Sequential: 25 nodes
input                         2×8
0       linear 8→16, bias     2×16
1 … 3   3 alike
  norm  layer_norm eps=1e-05  2×16
  gate  linear 16→40, bias    2×40
  silu                        2×40
  up    linear 16→40, bias    2×40
  mul                         2×40
  down  linear 40→16, bias    2×16
  add                         2×16
4       linear 16→4, bias     2×4
output"""
    )


def test_text_of_a_plan_tells_ranges() -> None:
    made = Picture.of_plan(uniform(4, [4, 8, None, 16]))
    assert made.text() == (
        """\
LlamaForCausalLM: 10 nodes → 13; predicted losses in nats per prediction
input                       2×64
blocks.0 … 1  2 alike
  fc          linear 64→64  2×64  → pivoted, r 4..8 of 64, loss 0.004..0.008
  out         linear        2×64
blocks.2
  fc          linear 64→64  2×64  → left dense
  out         linear        2×64
blocks.3
  fc          linear 64→64  2×64  → pivoted, r 16 of 64, loss 0.016
  out         linear        2×64
output                      2×64"""
    )
    assert made.text(depth=1).splitlines()[2:-1] == [
        "blocks.0 … 1  2 alike, 2 operators: 2 linear",
        "blocks.2      2 operators: 2 linear",
        "blocks.3      2 operators: 2 linear",
    ]
    assert max(map(len, made.text(width=30).splitlines()[1:])) == 30


def test_text_tells_what_became_narrower() -> None:
    text = Picture.of_plan(compressed("narrow")).text()
    assert re.search(r"silu +16×40 +→ 16×k\n", text)
    assert re.search(r"gate +linear 16→40, bias +16×40 +→ narrow, k \d+(\.\.\d+)? of 40\n", text)


def test_an_operator_and_its_neighbours() -> None:
    drawn = Picture.of_plan(compressed("joint"))
    assert drawn.near("2.act") == drawn.near("silu") == ""
    lines = drawn.near("{1,2}.gate").split("\n\n")[1].splitlines()
    assert lines[0] == "2.gate  linear  16×40"
    assert lines[1:3] == ["  reads    2.norm  layer_norm  16×16", "  read by  2.silu  silu  16×40"]
    assert lines[3].startswith("  after    joint, r ")
    assert [line.split()[0] for line in lines[4:]] == ["shared.down", "up"]
    assert drawn.near("2.silu").splitlines()[0] == "2.silu  silu  16×40"


@pytest.mark.parametrize("name", [*PLANS, "planned"])
def test_data_hold_to_what_they_say(name: str) -> None:
    made = compressed(name) if name in PLANS else only_planned()
    data = json.loads(json.dumps(graph_data(made), allow_nan=False))
    assert data["root"] == len(data["kinds"]) - 1
    assert data["planned"] == (name == "planned")
    names, kinds = data["names"], data["kinds"]
    assert len({*names}) == len(names)
    for at, kind in enumerate(kinds):
        count = len(kind["entries"])
        rows = kind.get("rows", [[place] for place in range(count)])
        assert sorted(what for row in rows for what in row if what >= 0) == [*range(count)]
        for source, target, sides in kind["edges"]:
            assert -1 <= source < count
            assert -1 <= target < count
            assert source != target
            assert sides in (1, 2, 3)
        for entry in kind["entries"]:
            inner = entry.get("kinds", [entry["kind"]] if "kind" in entry else [])
            assert all(each < at for each in inner)
            texts = [*entry.get("labels", [entry.get("label")])]
            texts += [entry[key] for key in ("before", "after", "shape", "now") if key in entry]
            assert all(0 <= text < len(names) for text in texts)
    assert data["sites"].keys() == {one.name for one in made.sites}
    for one in made.sites:
        row = dict(zip(data["site"], data["sites"][one.name], strict=True))
        assert tuple(row) == SITE
        assert names[row["form"]] == (one.form_text if one.form else "")
        assert tuple(row["ranks"]) == one.ranks
        assert (row["before"], row["after"]) == (one.before.parameters, one.after.parameters)
        if row["predicted"] is not None:
            assert row["predicted"] == pytest.approx(one.predicted, rel=1e-3)


def test_data_and_texts_are_the_same_every_time() -> None:
    made = compressed("joint")
    copy = Plan.model_validate_json(made.model_dump_json())
    one, other = Picture.of_plan(made), Picture.of_plan(copy)
    assert json.dumps(one.to_json()) == json.dumps(other.to_json())
    assert (one.text(), one.to_dot()) == (other.text(), other.to_dot())


@pytest.mark.parametrize("alike", [True, False])
def test_ten_thousand_sites_are_less_than_three_megabytes(alike: bool) -> None:
    count = 10_000
    names = [f"model.layers.{at}.mlp.up_proj" for at in range(count)]
    widths = [64 if alike else 64 + at % 4999 for at in range(count)]
    sites = [
        site(name, n, n, 1 + at % 31, predicted=1e-4 / (1 + at), reason="")
        for at, (name, n) in enumerate(zip(names, widths, strict=True))
    ]
    made = chain(names, sites)
    size = len(json.dumps(graph_data(made), separators=(",", ":"), ensure_ascii=False))
    assert size < 3_000_000


# ---- Graphviz -------------------------------------------------------------------------


def tokens(dot: str) -> list[str]:
    """Words of the DOT language; fails where something is none."""
    pattern = re.compile(r'\s*("(?:[^"\\]|\\.)*"|[A-Za-z0-9_.]+|->|[{}\[\]=,;])')
    found, at = [], 0
    while at < len(dot.rstrip()):
        match = pattern.match(dot, at)
        assert match, dot[at : at + 40]
        found.append(match[1])
        at = match.end()
    return found


def dot_edges(dot: str) -> set[tuple[str, str]]:
    words = tokens(dot)
    return {(words[at - 1], words[at + 1]) for at, word in enumerate(words) if word == "->"}


@pytest.mark.parametrize("name", [*PLANS, "planned", "hostile"])
def test_dot_has_a_node_for_every_end_of_an_edge(name: str) -> None:
    made = hostile() if name == "hostile" else None
    made = made or (compressed(name) if name in PLANS else only_planned())
    dot = Picture.of_plan(made).to_dot()
    words = tokens(dot)
    assert words.count("{") == words.count("}")
    nodes = {word for word, after in pairwise(words) if after == "["}
    ends = {end for edge in dot_edges(dot) for end in edge}
    assert ends
    assert ends <= nodes


def test_names_in_dot_come_back_as_they_were() -> None:
    if shutil.which("dot") is None:
        pytest.skip("Graphviz is not installed")
    dot = Picture.of_plan(hostile()).to_dot()
    done = subprocess.run(
        ["dot", "-Tplain"], input=dot, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    svg = subprocess.run(["dot", "-Tsvg"], input=dot, capture_output=True, text=True, timeout=60)
    assert "<img" not in svg.stdout
    assert "&lt;img src=x onerror=alert(1)&gt;" in svg.stdout
    assert "a &quot;b&quot; \\N \\&quot;" in svg.stdout


# ---- Model Explorer -------------------------------------------------------------------


@pytest.mark.parametrize("name", PLANS)
def test_model_explorer_has_every_node_and_value(name: str, tmp_path: Path) -> None:
    made = compressed(name)
    paths = Picture.of_plan(made).to_model_explorer(tmp_path / "out")
    assert [path.name for path in paths] == ["graphs.json", "losses.json"]
    collection, losses = (json.loads(path.read_text(encoding="utf-8")) for path in paths)
    # Its loader takes an object with a label and graphs.
    assert collection.keys() == {"label", "graphs"}
    before, after = collection["graphs"]
    assert [before["id"], after["id"]] == ["before", "after"] == [*losses]
    for graph, nodes in ((before, made.before), (after, made.after)):
        by_id: dict[str, dict[str, Any]] = {node["id"]: node for node in graph["nodes"]}
        assert by_id.keys() == {node.name for node in nodes}
        for node in nodes:
            drawn = by_id[node.name]
            sources = [edge["sourceNodeId"] for edge in drawn["incomingEdges"]]
            assert sources == list(node.inputs)
            assert all(isinstance(each["value"], str) for each in drawn["attrs"])
        assert losses[graph["id"]]["results"].keys() <= by_id.keys()
    told = sum(each["value"] for each in losses["before"]["results"].values())
    called = {one.name: one.calls for one in made.sites}
    told -= sum(one.predicted * (called[one.name] - 1) for one in made.rewritten)
    assert told == pytest.approx(sum(one.predicted for one in made.rewritten))


# ---- draw -----------------------------------------------------------------------------


def test_a_compressed_model_is_drawn_from_its_plan() -> None:
    torch.manual_seed(0)
    model = blocks(2)
    small = fxcompress.compile(model, "every-linear", [torch.randn(16, 8) for _ in range(3)])
    assert str(fxcompress.draw(small)) == str(fxcompress.draw(fxcompress.plan_of(small)))


def test_drawing_says_what_is_missing() -> None:
    with pytest.raises(RecordError, match="drawing a model runs it once: give it an example batch"):
        fxcompress.draw(blocks())
    with pytest.raises(RecordError, match="this plan holds no graph"):
        fxcompress.draw(plan([site("a", 8, 8, 2)]))


def test_a_plan_without_operators_is_a_picture_of_none() -> None:
    only = NodeSummary(name="x", op="input", path="", inputs=(), shape=(1,))
    drawn = Picture.of_plan(plan().model_copy(update={"before": (only,), "after": (only,)}))
    assert drawn.text().splitlines()[1:] == ["input    1"]
    assert tokens(drawn.to_dot())
