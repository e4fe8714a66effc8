"""The three kinds of pattern, each with the places in a graph where it may match."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

from fxcompress.rules.language.schema import Alternative
from fxcompress.rules.matching.candidates import Candidate
from fxcompress.rules.matching.dataflow import Dataflow
from fxcompress.rules.matching.patterns import GraphPattern, NodeTest
from fxcompress.rules.matching.result import Lost
from fxcompress.rules.matching.scopes import innermost
from fxcompress.rules.matching.search import MOST_STEPS, Embedding, Search, Taken
from fxcompress.rules.matching.sites import Site, SiteIndex
from fxcompress.rules.matching.steps import Keys

_STEPS_PER_OPERATOR = 50


class Start(NamedTuple):
    """Anchors of which a pattern makes the same matches; a named tuple, for there are many.

    Attributes:
        anchors: the anchors, one but for a group.
        candidates: what fits the pattern there, without what is taken; of None, the first that
            fits whatever is taken, if a short search finds one.
        failure: why nothing does; only after all candidates were asked for.
    """

    anchors: tuple[Site, ...]
    candidates: Callable[[Taken | None], Iterator[Candidate]]
    failure: Callable[[], Lost]


class Places(Protocol):
    """One alternative of a rule, for one graph.

    Attributes:
        anchor: name of the operator that is counted.
        test: what it has to be by itself.
        keys: where that stands in the rule.
    """

    anchor: str
    test: NodeTest
    keys: Keys

    def anchors(self) -> Sequence[Site]:
        """All that is to be counted."""

    def starts(self, anchors: Sequence[Site]) -> Iterator[Start]:
        """The places to look at.

        Args:
            anchors: those that pass their own test.
        """


def places_of(
    alternative: Alternative,
    keys: Keys,
    index: SiteIndex,
    graph: Dataflow,
    locate: Callable[[Keys], str],
) -> Places:
    """The places of one alternative.

    Args:
        alternative: the pattern.
        keys: where it stands in its rule.
        index: the graph's sites.
        graph: the same graph.
        locate: ``"file:line:column"`` of keys.
    """
    if alternative.nodes is not None:
        return _Connected(alternative, keys, index, graph, locate)
    if alternative.group is not None:
        return _Grouped(alternative, keys, index, graph, locate)
    return _Single(alternative, keys, index)


class _Connected:
    """``nodes``: several operators that read one another."""

    def __init__(
        self,
        alternative: Alternative,
        keys: Keys,
        index: SiteIndex,
        graph: Dataflow,
        locate: Callable[[Keys], str],
    ) -> None:
        most_steps = MOST_STEPS + _STEPS_PER_OPERATOR * len(graph.operators)
        self._pattern = GraphPattern.of(alternative, graph)
        self._search = Search(self._pattern, graph, most_steps=most_steps)
        self._index = index
        self._locations = {name: locate((*keys, "nodes", name)) for name in self._pattern.tests}
        self.anchor = self._pattern.anchor
        self.test = self._pattern.tests[self.anchor]
        self.keys: Keys = (*keys, "nodes", self.anchor)

    def anchors(self) -> Sequence[Site]:
        return self._index.calls_of(self.test.ops)

    def starts(self, anchors: Sequence[Site]) -> Iterator[Start]:
        for anchor in anchors:
            yield Start((anchor,), self._at(anchor), self._failure)

    def _at(self, anchor: Site) -> Callable[[Taken | None], Iterator[Candidate]]:
        def candidates(taken: Taken | None) -> Iterator[Candidate]:
            if taken is None:
                first = self._search.first(anchor.order)
                if first is not None:
                    yield self._candidate(first)
            elif not taken(self.anchor, anchor.order):
                yield from map(self._candidate, self._search.at(anchor.order, taken))

        return candidates

    def _candidate(self, found: Embedding) -> Candidate:
        call = self._index.call
        return Candidate(
            {name: (call(found[name]),) if name in found else () for name in self._pattern.tests}
        )

    def _failure(self) -> Lost:
        failure = self._search.failure
        if self._search.gave_up:
            return Lost("overlap", "all that fits is in earlier matches of this rule")
        if failure is None:
            return Lost("pattern", "counts as a match of other operators in another order")
        name, reason = failure
        return Lost("pattern", reason, self._locations[name])


class _Grouped:
    """``group``: all operators of one kind on one input, within one module if there is a scope."""

    def __init__(
        self,
        alternative: Alternative,
        keys: Keys,
        index: SiteIndex,
        graph: Dataflow,
        locate: Callable[[Keys], str],
    ) -> None:
        assert alternative.group is not None
        self._group = alternative.group
        self._within = innermost(alternative.scope) if alternative.scope is not None else None
        self._index = index
        self._graph = graph
        self._locate = locate
        self.anchor = alternative.group.bound_name
        self.test = NodeTest.of(alternative.group)
        self.keys: Keys = (*keys, "group")

    def anchors(self) -> Sequence[Site]:
        return self._index.calls_of(self.test.ops)

    def starts(self, anchors: Sequence[Site]) -> Iterator[Start]:
        together: dict[tuple[int | None, str | None], list[Site]] = {}
        for anchor in anchors:
            operands = self._graph.operands[anchor.order]
            within = self._within(anchor.first) if self._within is not None else None
            together.setdefault((operands[0] if operands else None, within), []).append(anchor)
        for (value, _), members in together.items():
            yield self._start(value, tuple(members))

    def _start(self, value: int | None, members: tuple[Site, ...]) -> Start:
        key, wrong = self._wrong_count(value, len(members))
        found = Candidate({self.anchor: members})
        lost = Lost("pattern", wrong, self._locate((*self.keys, key)))
        return Start(members, lambda taken: iter(() if wrong else (found,)), lambda: lost)

    def _wrong_count(self, value: int | None, count: int) -> tuple[str, str]:
        """The bound that a number of members breaks, and what to say; empty if none."""
        low, high = self._group.min, self._group.max
        if value is None:
            return "op", "reads no value"
        what = f"{count} {self.test.title} read{'s' * (count == 1)} {self._graph.title(value)}"
        if count < low:
            return "min", f"{what}; a group has at least {low}"
        if high is not None and count > high:
            return "max", f"{what}; a group has at most {high}"
        return "", ""


class _Single:
    """``node`` beside patterns of several operators: one weight with all its calls."""

    def __init__(self, alternative: Alternative, keys: Keys, index: SiteIndex) -> None:
        assert alternative.node is not None
        self._index = index
        self.anchor = alternative.node.bound_name
        self.test = NodeTest.of(alternative.node)
        self.keys: Keys = (*keys, "node")

    def anchors(self) -> Sequence[Site]:
        return self._index.candidates(self.test.ops)

    def starts(self, anchors: Sequence[Site]) -> Iterator[Start]:
        for anchor in anchors:
            yield self._start(anchor)

    def _start(self, anchor: Site) -> Start:
        call, orders = self._index.call, self._index.orders
        calls = tuple(call(orders[operator.name]) for operator in anchor.operators)
        found = Candidate({self.anchor: calls})
        lost = Lost("pattern", "")
        return Start((anchor,), lambda taken: iter((found,)), lambda: lost)
