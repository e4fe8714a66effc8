"""Alike blocks are one, whatever their ranks; and nothing else is."""

from collections import Counter
from collections.abc import Iterator

import pytest

from fxcompress.picture.boxes import Box, Tree
from fxcompress.picture.build import tree_of_plan
from fxcompress.picture.folded import Folded, fold_tree, run_label
from tests.picture.graphs import PLANS, compressed, only_planned, uniform


def labels(folded: Folded, kind: int | None = None) -> list[str]:
    kind = folded.root if kind is None else kind
    found = [run_label(entry.labels) for entry in folded.kinds[kind].entries]
    return [label for label in found if label not in ("input", "output")]


def unfolded(folded: Folded, kind: int, around: str) -> Iterator[tuple[str, int, int]]:
    """Every box that the folded graph stands for, by its labels, its status and its sides."""
    for entry in folded.kinds[kind].entries:
        for at, label in enumerate(entry.labels):
            name = f"{around}/{label}"
            yield name, entry.status, entry.sides
            if entry.kinds:
                inner = entry.kinds[at if len(entry.kinds) > 1 else 0]
                yield from unfolded(folded, inner, name)


def boxes(box: Box, around: str) -> Iterator[tuple[str, int, int]]:
    for each in box.inside:
        name = f"{around}/{each.label}"
        yield name, each.status, each.sides
        yield from boxes(each, name)


def check_whole(tree: Tree) -> Folded:
    folded = fold_tree(tree)
    assert Counter(unfolded(folded, folded.root, "")) == Counter(boxes(tree.root, ""))
    for kind in folded.kinds:
        places = [place for entry in kind.entries for place in entry.places]
        assert places == [*range(len(places))]
    return folded


@pytest.mark.parametrize("name", [*PLANS, "planned"])
def test_every_box_is_in_it_once(name: str) -> None:
    check_whole(tree_of_plan(compressed(name) if name in PLANS else only_planned()))


def test_blocks_of_different_ranks_are_one() -> None:
    folded = check_whole(tree_of_plan(uniform(5, [4, 8, 12, 16, 20])))
    assert labels(folded) == ["blocks.0 … 4"]
    assert len(folded.kinds) == 3  # the body, a block, the model
    (body, block, _) = folded.kinds
    assert [entry.after for entry in body.entries] == ["linear 64-r→r", "linear r→64"]
    assert [entry.before for entry in block.entries] == ["linear 64→64", "linear"]
    assert block.counts[1] == 1
    assert folded.kinds[folded.root].counts[:2] == (7, 5)


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ([4, 4, None, 4, 4], ["blocks.0 … 1", "blocks.2", "blocks.3 … 4"]),
        ([None, None, 4], ["blocks.0 … 1", "blocks.2"]),
        ([4], ["blocks.0"]),
    ],
)
def test_a_block_that_differs_is_by_itself(ranks: list[int | None], expected: list[str]) -> None:
    assert labels(check_whole(tree_of_plan(uniform(len(ranks), ranks)))) == expected


def test_only_what_counts_up_by_one_is_a_run() -> None:
    made = uniform(4, [4, 4, 4, 4])
    rename = {"blocks.2.": "blocks.7."}

    def renamed(path: str) -> str:
        for old, new in rename.items():
            path = path.replace(old, new)
        return path

    update = {
        side: tuple(
            node.model_copy(update={"path": renamed(node.path)}) for node in getattr(made, side)
        )
        for side in ("before", "after")
    }
    update["sites"] = tuple(
        one.model_copy(update={"name": renamed(one.name)}) for one in made.sites
    )
    folded = check_whole(tree_of_plan(made.model_copy(update=update)))
    assert labels(folded) == ["blocks.0 … 1", "blocks.7", "blocks.3"]


def test_steps_inside_of_bodies_are_no_reason_to_tell_blocks_apart() -> None:
    made = uniform(3, [4, 8, 12])
    order = made.after[1].model_copy(
        update={"name": "order", "op": "index_select", "path": "blocks.1.fc.body"}
    )
    folded = check_whole(
        tree_of_plan(made.model_copy(update={"after": (*made.after[:4], order, *made.after[4:])}))
    )
    assert labels(folded) == ["blocks.0 … 2"]
    run = folded.kinds[folded.root].entries[1]
    assert len(run.kinds) == 3
    assert run.kinds[0] == run.kinds[2] != run.kinds[1]


def test_a_run_is_named_by_its_ends() -> None:
    assert run_label(["a.0.b", "a.1.b", "a.2.b"]) == "a.0 … 2.b"
