from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxcompress.report.fold import fold_blocks
from fxcompress.rules.matching.folding import fold, index_set, split_indices
from tests.report.plans import llama, site


@pytest.mark.parametrize(
    ("indices", "text"),
    [
        ([0], "0"),
        ([0, 1], "{0..1}"),
        ([3, 7], "{3,7}"),
        ([0, 1, 2, 3, 5, *range(7, 30)], "{0..3,5,7..29}"),
        ([2, 1, 0, 1], "{0..2}"),
    ],
)
def test_index_set(indices: list[int], text: str) -> None:
    assert index_set(indices) == text


@pytest.mark.parametrize(
    ("paths", "patterns"),
    [
        ([], ()),
        (["lm_head"], ("lm_head",)),
        ([""], ("",)),
        (["h.0.fc", "h.1.fc"], ("h.{0..1}.fc",)),
        # A number inside a name is an index like any other; one that never changes is printed.
        (["encoder_layer_0.conv2d", "encoder_layer_1.conv2d"], ("encoder_layer_{0..1}.conv2d",)),
        # Different names are never folded, and keep their order.
        (["h.1.b", "h.1.a", "h.0.b"], ("h.{0..1}.b", "h.1.a")),
        # Padded numbers are names: "1" and "01" are different modules.
        (["h.01", "h.1", "h.2"], ("h.01", "h.{1..2}")),
        (
            [f"layers.{i}.blocks.{j}.mlp" for i, j in product(range(2), range(6))],
            ("layers.{0..1}.blocks.{0..5}.mlp",),
        ),
        # Swin: stage 2 has more blocks than the others.
        (
            [f"layers.{i}.blocks.{j}" for i, n in enumerate([2, 2, 6, 2]) for j in range(n)],
            ("layers.{0..1,3}.blocks.{0..1}", "layers.2.blocks.{0..5}"),
        ),
        # The better of the two directions is taken: by first index it would be three patterns.
        (
            ["a.0.b.0", "a.1.b.0", "a.1.b.1", "a.2.b.1"],
            ("a.{0..1}.b.0", "a.{1..2}.b.1"),
        ),
    ],
)
def test_fold_paths(paths: list[str], patterns: tuple[str, ...]) -> None:
    assert fold(paths) == patterns


@given(st.sets(st.tuples(*[st.integers(0, 4)] * 3), min_size=1))
def test_folding_is_exact(points: set[tuple[int, ...]]) -> None:
    """Expanding the patterns gives every path once, and no other."""
    paths = {f"a.{i}.b{j}.c.{k}" for i, j, k in points}
    expanded = [path for pattern in fold(sorted(paths)) for path in _expand(pattern)]
    assert sorted(expanded) == sorted(paths)


def test_split_indices_ignores_numbers_too_long_to_be_indices() -> None:
    assert split_indices("a.1234567890.b.3") == (("a.1234567890.b.", ""), (3,))


def test_blocks_fold_whatever_their_ranks() -> None:
    groups = fold_blocks(llama(layers=30).sites)
    assert [(group.patterns, group.count) for group in groups] == [
        (("model.layers.{0..29}.self_attn",), 30),
        (("model.layers.{0..29}.mlp",), 30),
    ]
    (up,) = [row for row in groups[1].rows if row.name == "up_proj"]
    assert [one.name for one in up.sites] == [f"model.layers.{i}.mlp.up_proj" for i in range(30)]
    assert len({one.rank for one in up.sites}) > 1


@pytest.mark.parametrize(
    "other",
    [
        {"m": 128},
        {"n": 128},
        {"form": "low_rank"},
        {"bias": True},
        {"rule": "other"},
        {"name": "h.1.up"},
        {"name": "g.1.fc"},
    ],
)
def test_blocks_that_differ_in_structure_stay_apart(other: dict[str, object]) -> None:
    first = site("h.0.fc", 64, 64, 8)
    same = site("h.1.fc", 64, 64, 16, predicted=0.5)
    arguments = {"name": "h.1.fc", "n": 64, "m": 64, "rank": 16, **other}
    assert len(fold_blocks([first, same])) == 1
    assert len(fold_blocks([first, site(**arguments)])) == 2  # type: ignore[arg-type]


def test_a_missing_child_splits_the_group_in_two() -> None:
    plan = llama(dense=["model.layers.3.mlp.up_proj", "model.layers.7.mlp.up_proj"])
    patterns = [group.patterns for group in fold_blocks(plan.rewritten)]
    assert patterns == [
        ("model.layers.{0..29}.self_attn",),
        ("model.layers.{0..2,4..6,8..29}.mlp",),
        ("model.layers.{3,7}.mlp",),
    ]


def test_numbered_children_of_one_block_share_a_row_if_alike() -> None:
    sites = [
        site("net.0", 64, 64, 8),
        site("net.2", 64, 64, 16),
        site("net.4", 64, 10, 4),
    ]
    (group,) = fold_blocks(sites)
    assert group.patterns == ("net",)
    assert [(row.name, row.per_block) for row in group.rows] == [("{0,2}", 2), ("4", 1)]


def test_two_weights_of_one_module_are_two_rows() -> None:
    (group,) = fold_blocks([site("mixer", 64, 64, 8), site("mixer", 64, 64, 16)])
    assert [(row.name, row.sites[0].rank) for row in group.rows] == [("mixer", 8), ("mixer", 16)]


def _expand(pattern: str) -> list[str]:
    """A second implementation of what the braces mean."""
    head, brace, rest = pattern.partition("{")
    if not brace:
        return [pattern]
    inside, _, tail = rest.partition("}")
    indices: list[int] = []
    for run in inside.split(","):
        first, _, last = run.partition("..")
        indices += range(int(first), int(last or first) + 1)
    return [f"{head}{index}{end}" for index in indices for end in _expand(tail)]
