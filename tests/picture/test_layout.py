"""Rows of boxes: edges go down, and cross as seldom as they can on simple graphs."""

from itertools import combinations

from hypothesis import given, settings
from hypothesis import strategies as st

from fxcompress.picture.boxes import OUTSIDE, Edge
from fxcompress.picture.layout import LONGEST, layout


def rows(count: int, pairs: list[tuple[int, int]]) -> tuple[tuple[int, ...], ...]:
    return layout(count, [Edge(a, b, 3) for a, b in pairs]).rows


@st.composite
def graphs(draw: st.DrawFn) -> tuple[int, list[tuple[int, int]]]:
    count = draw(st.integers(1, 12))
    ends = st.integers(OUTSIDE, count - 1)
    pairs = draw(st.sets(st.tuples(ends, ends), max_size=24))
    return count, sorted((a, b) for a, b in pairs if a != b)


@given(graphs())
@settings(max_examples=200, deadline=None)
def test_every_box_has_a_row_and_edges_pass_all_between(
    graph: tuple[int, list[tuple[int, int]]],
) -> None:
    count, pairs = graph
    made = rows(count, pairs)
    row = {what: at for at, each in enumerate(made) for what in each if what >= 0}
    assert sorted(what for each in made for what in each if what >= 0) == [*range(count)]
    for at, (a, b) in enumerate(pairs):
        top = -1 if a == OUTSIDE else row[a]
        end = len(made) if b == OUTSIDE else row[b]
        passed = [number for number, each in enumerate(made) if -1 - at in each]
        assert passed == [*range(top + 1, end)]
        if OUTSIDE not in (a, b) and a < b:
            assert top < end


def crossings(made: tuple[tuple[int, ...], ...], pairs: list[tuple[int, int]]) -> int:
    place = {what: at for each in made for at, what in enumerate(each)}
    row = {what: at for at, each in enumerate(made) for what in each}
    found = 0
    for (a, b), (c, d) in combinations(pairs, 2):
        if row[a] == row[c]:
            found += (place[a] - place[c]) * (place[b] - place[d]) < 0
    return found


def test_a_ladder_that_is_recorded_crosswise_is_straightened() -> None:
    pairs = [(0, 5), (1, 4), (2, 3), (3, 8), (4, 7), (5, 6)]
    made = rows(9, pairs)
    assert [sorted(each) for each in made] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert crossings(made, pairs) == 0


def test_what_reads_nothing_stands_above_what_reads_it() -> None:
    assert rows(4, [(0, 1), (1, 3), (2, 3)]) == ((0,), (1, 2), (3,))


def test_an_edge_over_very_many_rows_has_no_place_in_them() -> None:
    count = LONGEST + 3
    chain = [(at, at + 1) for at in range(count - 1)]
    made = rows(count, [*chain, (0, count - 1)])
    assert made == tuple((at,) for at in range(count))


def test_rows_are_the_same_every_time() -> None:
    pairs = [(0, 3), (1, 3), (2, 4), (0, 4), (3, 5), (4, 5)]
    assert rows(6, pairs) == rows(6, list(pairs))
