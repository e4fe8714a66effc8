"""Every node is in one box, on both sides, and every value is an edge on its way."""

import pytest

from fxcompress.picture.boxes import (
    ADDED,
    AFTER,
    BEFORE,
    DENSE,
    DROPPED,
    FACTORIZED,
    NARROWED,
    OUTSIDE,
    UNCHANGED,
    Box,
    Tree,
)
from fxcompress.picture.build import DEEPEST, build, tree_of_plan
from fxcompress.picture.nodes import Node
from fxcompress.plans.plan import NodeSummary, Plan
from tests.picture.graphs import PLANS, compressed, only_planned, uniform
from tests.report.plans import plan, site


def of(name: str) -> tuple[Plan, Tree]:
    made = compressed(name) if name in PLANS else only_planned()
    return made, tree_of_plan(made)


def box(tree: Tree, path: str) -> Box:
    """The operator of a name."""
    found = [each for each in tree.root.walk() if each.path == path and not each.is_module]
    assert len(found) == 1, path
    return found[0]


@pytest.mark.parametrize("name", PLANS)
def test_every_node_is_in_one_box(name: str) -> None:
    made, tree = of(name)
    boxes = [*tree.root.walk()]
    for nodes, ways, held in (
        (made.before, tree.before, [each.before for each in boxes]),
        (made.after, tree.after, [each.after for each in boxes]),
    ):
        names = [node.name for node in held if node is not None]
        assert sorted(names) == sorted(node.name for node in nodes)
        assert ways.keys() == {*names}
    for name, way in tree.before.items():
        found = tree.box(way).before
        assert found is not None
        assert found.name == name


def edges_by_definition(
    tree: Tree, nodes: tuple[NodeSummary, ...], side: int
) -> dict[tuple[int, ...], set[tuple[int, int]]]:
    """What the edges in every box have to be, straight from the definition."""
    ways = tree.before if side == BEFORE else tree.after
    found: dict[tuple[int, ...], set[tuple[int, int]]] = {}
    for node in nodes:
        target = ways[node.name]
        for name in node.inputs:
            source = ways[name]
            for around in {source[:end] for end in range(len(source))} | {
                target[:end] for end in range(len(target))
            }:
                depth = len(around)
                ends = tuple(
                    way[depth] if way[:depth] == around else OUTSIDE for way in (source, target)
                )
                if ends[0] != ends[1]:
                    found.setdefault(around, set()).add(ends)  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("side", [BEFORE, AFTER])
def test_edges_are_the_values_that_go_from_box_to_box(name: str, side: int) -> None:
    made, tree = of(name)
    expected = edges_by_definition(tree, made.before if side == BEFORE else made.after, side)
    assert expected[()]

    def check(inner: Box, way: tuple[int, ...]) -> None:
        here = {(edge.source, edge.target) for edge in inner.edges if edge.sides & side}
        assert here == expected.pop(way, set())
        for place, each in enumerate(inner.inside):
            check(each, (*way, place))

    check(tree.root, ())
    assert not expected


@pytest.mark.parametrize("name", PLANS)
def test_what_is_not_rewritten_is_one_box_before_and_after(name: str) -> None:
    made, tree = of(name)
    for each in tree.root.walk():
        if each.is_module or each.sides == AFTER:
            continue
        assert each.after is not None or each.inside
        assert each.status in (UNCHANGED, DROPPED, NARROWED, DENSE, FACTORIZED)
        if each.status == UNCHANGED and each.before and each.after:
            assert (each.before.op, each.before.shape) == (each.after.op, each.after.shape)
    rewritten = {one.name for one in made.rewritten}
    sites = [
        each for each in tree.root.walk() if each.status in (NARROWED, FACTORIZED) and each.site
    ]
    assert {each.path for each in sites} == rewritten


def test_what_took_an_operators_place_is_in_its_box() -> None:
    _, tree = of("joint")
    gate, up, down = (box(tree, f"1.{name}") for name in ("gate", "up", "down"))
    assert [each.label for each in gate.inside] == ["shared.down", "up"]
    assert [each.label for each in up.inside] == ["up"]
    assert [each.label for each in down.inside] == ["down", "up"]
    assert {gate.status, up.status, down.status} == {FACTORIZED}
    # The second one reads what the first one makes, after but not before.
    block = next(each for each in tree.root.inside if each.label == "1")
    at = {each.label: place for place, each in enumerate(block.inside)}
    sides = {(edge.source, edge.target): edge.sides for edge in block.edges}
    assert sides[at["gate"], at["up"]] == AFTER
    assert sides[at["norm"], at["up"]] == BEFORE
    assert sides[at["norm"], at["gate"]] == BEFORE | AFTER


def test_a_narrowed_value_is_narrowed_all_the_way() -> None:
    _, tree = of("narrow")
    block = next(each for each in tree.root.inside if each.label == "1")
    status = {each.label: each.status for each in block.inside}
    narrowed = {"gate", "up", "down", "silu", "mul"}
    assert {label for label, each in status.items() if each == NARROWED} == narrowed
    assert {status["norm"], status["add"]} == {UNCHANGED}


def test_a_folded_batch_norm_is_dropped_where_it_stands() -> None:
    _, tree = of("convolutions")
    norm = box(tree, "norm1")
    assert norm.status == DROPPED
    assert norm.before is not None
    assert norm.after is not None
    assert (norm.before.op, norm.after.op) == ("batch_norm", "identity")


def test_every_call_has_its_box() -> None:
    made, tree = of("convolutions")
    calls = [each for each in tree.root.walk() if each.path == "twice" and each.site is not None]
    assert [each.call for each in calls] == [0, 1]
    assert next(one for one in made.sites if one.name == "twice").form == "low_rank"
    assert all([inner.label for inner in each.inside] == ["down", "up"] for each in calls)
    assert len({inner.after.name for each in calls for inner in each.inside if inner.after}) == 4


def test_a_plan_that_is_not_carried_out_has_parts_in_operators_places() -> None:
    made, tree = of("planned")
    assert not made.after
    assert tree.planned
    down = box(tree, "1.down")
    assert [each.label for each in down.inside] == ["down", "up"]
    block = next(each for each in tree.root.inside if each.label == "1")
    at = {each.label: place for place, each in enumerate(block.inside)}
    sides = {(edge.source, edge.target): edge.sides for edge in block.edges}
    assert sides[at["gate"], at["up"]] == AFTER  # what they share


def test_blocks_left_dense_and_dropped_or_added_operators() -> None:
    made = uniform(2, [8, None])
    gone = NodeSummary(name="gone", op="relu", path="", inputs=("n3",), shape=(2, 64))
    new = NodeSummary(name="new", op="gelu", path="", inputs=("n3",), shape=(2, 64))
    update = {"before": (*made.before, gone), "after": (*made.after, new)}
    tree = tree_of_plan(made.model_copy(update=update))
    status = {each.label or each.path: each.status for each in tree.root.inside}
    assert (status["relu"], status["gelu"]) == (DROPPED, ADDED)
    assert box(tree, "blocks.0.fc").status == FACTORIZED
    assert box(tree, "blocks.1.fc").status == DENSE


def test_one_graph_is_drawn_without_a_plan() -> None:
    nodes = (
        Node("x", "input", "", (), (2, 8)),
        Node("a", "linear", "m.fc", ("x",), (2, 8)),
        Node("b", "relu", "m", ("a",), (2, 8)),
    )
    tree = build(nodes)
    assert tree.single
    assert [each.label for each in tree.root.inside] == ["input", "m"]
    assert [each.label for each in tree.root.inside[1].inside] == ["fc", "relu"]
    assert tree.root.inside[1].inside[1].function


def test_an_input_that_is_first_read_late_stands_first() -> None:
    nodes = (
        Node("p", "parameter", "m.p", (), (8,)),
        Node("x", "input", "", (), (2, 8)),
        Node("a", "add", "m", ("x", "p"), (2, 8)),
    )
    assert [each.label for each in build(nodes).root.inside] == ["input", "m"]


def test_results_of_a_module_stand_beside_it() -> None:
    nodes = (
        Node("x", "input", "", (), (2, 8)),
        Node("c", "custom", "m.rope", ("x",), None),
        Node("i", "getitem", "", ("c",), (2, 8)),
        Node("j", "getitem", "", ("c",), (2, 8)),
        Node("a", "add", "m", ("i", "j"), (2, 8)),
    )
    inner = build(nodes).root.inside[1]
    assert [each.label for each in inner.inside] == ["rope", "getitem", "getitem", "add"]
    assert len(build(nodes).before) == len(nodes)


@pytest.mark.parametrize("depth", [DEEPEST - 1, DEEPEST, DEEPEST + 1, 20_000])
def test_no_path_is_too_deep(depth: int) -> None:
    path = ".".join("m" * depth)
    nodes = tuple(
        NodeSummary(name=f"n{at}", op="linear", path=f"{path}.{at}", inputs=(), shape=None)
        for at in range(2)
    )
    made = plan([site(f"{path}.0", 8, 8, 2)]).model_copy(update={"before": nodes, "after": nodes})
    tree = tree_of_plan(made)
    assert len(tree.before) == len(tree.after) == 2


def test_nodes_that_read_themselves_or_nothing_known_are_drawn() -> None:
    nodes = (
        Node("a", "add", "m", ("a", "b", "nowhere"), None),
        Node("b", "add", "m", ("a",), None),
    )
    inner = build(nodes).root.inside
    assert len(inner) == 1 or {each.label for each in inner} == {"m"}
    (only,) = (each for each in build(nodes).root.walk() if len(each.inside) == 2)
    assert {(edge.source, edge.target) for edge in only.edges} == {(0, 1), (1, 0)}
