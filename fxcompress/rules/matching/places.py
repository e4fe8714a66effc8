"""The three kinds of pattern, each with the places in a graph where it may match."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from fxcompress.rules.language.loader import LoadedRule
from fxcompress.rules.language.schema import Alternative
from fxcompress.rules.matching.candidates import PatternFit
from fxcompress.rules.matching.dataflow import Dataflow
from fxcompress.rules.matching.patterns import GraphPattern, NodeTest
from fxcompress.rules.matching.result import Lost
from fxcompress.rules.matching.scopes import innermost
from fxcompress.rules.matching.search import MOST_STEPS, Embedding, Search, Taken
from fxcompress.rules.matching.sites import SiteIndex, WeightCalls
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

    anchors: tuple[WeightCalls, ...]
    candidates: Callable[[Taken | None], Iterator[PatternFit]]
    failure: Callable[[], Lost]


@dataclass
class Places(ABC):
    """One alternative of a rule, for one graph.

    Attributes:
        alternative: the pattern.
        at: where it stands in its rule.
        index: the graph's sites.
        graph: the same graph.
        loaded: the rule.
        anchor: name of the operator that is counted.
        test: what it has to be by itself.
        keys: where that stands in the rule.
    """

    alternative: Alternative
    at: Keys
    index: SiteIndex
    graph: Dataflow
    loaded: LoadedRule
    anchor: str = field(init=False)
    test: NodeTest = field(init=False)
    keys: Keys = field(init=False)

    @abstractmethod
    def __post_init__(self) -> None:
        """Set what is counted."""

    @abstractmethod
    def anchors(self) -> Sequence[WeightCalls]:
        """All that is to be counted."""

    @abstractmethod
    def starts(self, anchors: Sequence[WeightCalls]) -> Iterator[Start]:
        """The places to look at.

        Args:
            anchors: those that pass their own test.
        """


def places_of(
    alternative: Alternative, keys: Keys, index: SiteIndex, graph: Dataflow, loaded: LoadedRule
) -> Places:
    """The places of one alternative, which stands under ``keys`` of its rule."""
    kind: type[Places] = _Single
    if alternative.nodes is not None:
        kind = _Connected
    elif alternative.group is not None:
        kind = _Grouped
    return kind(alternative, keys, index, graph, loaded)


class _Connected(Places):
    """``nodes``: several operators that read one another."""

    def __post_init__(self) -> None:
        most_steps = MOST_STEPS + _STEPS_PER_OPERATOR * len(self.graph.operators)
        self._pattern = GraphPattern.of(self.alternative, self.graph)
        self._search = Search(self._pattern, self.graph, most_steps=most_steps)
        self.anchor = self._pattern.anchor
        self.test = self._pattern.tests[self.anchor]
        self.keys = (*self.at, "nodes", self.anchor)

    def anchors(self) -> Sequence[WeightCalls]:
        return self.index.calls_of(self.test.ops)

    def starts(self, anchors: Sequence[WeightCalls]) -> Iterator[Start]:
        for anchor in anchors:
            yield Start((anchor,), self._at(anchor), self._failure)

    def _at(self, anchor: WeightCalls) -> Callable[[Taken | None], Iterator[PatternFit]]:
        def candidates(taken: Taken | None) -> Iterator[PatternFit]:
            if taken is None:
                first = self._search.first(anchor.order)
                if first is not None:
                    yield self._candidate(first)
            elif not taken(self.anchor, anchor.order):
                yield from map(self._candidate, self._search.at(anchor.order, taken))

        return candidates

    def _candidate(self, found: Embedding) -> PatternFit:
        call = self.index.call
        return PatternFit(
            {name: (call(found[name]),) if name in found else () for name in self._pattern.tests}
        )

    def _failure(self) -> Lost:
        failure = self._search.failure
        if self._search.gave_up:
            return Lost("overlap", "all that fits is in earlier matches of this rule")
        if failure is None:
            return Lost("pattern", "counts as a match of other operators in another order")
        name, reason = failure
        return Lost("pattern", reason, self.loaded.at(*self.at, "nodes", name))


class _Grouped(Places):
    """``group``: all operators of one kind on one input, within one module if there is a scope."""

    def __post_init__(self) -> None:
        assert self.alternative.group is not None
        self._group, scope = self.alternative.group, self.alternative.scope
        self._within = innermost(scope) if scope is not None else None
        self.anchor = self._group.bound_name
        self.test = NodeTest.of(self._group)
        self.keys = (*self.at, "group")

    def anchors(self) -> Sequence[WeightCalls]:
        return self.index.calls_of(self.test.ops)

    def starts(self, anchors: Sequence[WeightCalls]) -> Iterator[Start]:
        together: dict[tuple[int | None, str | None], list[WeightCalls]] = {}
        for anchor in anchors:
            operands = self.graph.operands[anchor.order]
            within = self._within(anchor.first) if self._within is not None else None
            together.setdefault((operands[0] if operands else None, within), []).append(anchor)
        for (value, _), members in together.items():
            yield self._start(value, tuple(members))

    def _start(self, value: int | None, members: tuple[WeightCalls, ...]) -> Start:
        key, wrong = self._wrong_count(value, len(members))
        found = PatternFit({self.anchor: members})
        lost = Lost("pattern", wrong, self.loaded.at(*self.keys, key))
        return Start(members, lambda taken: iter(() if wrong else (found,)), lambda: lost)

    def _wrong_count(self, value: int | None, count: int) -> tuple[str, str]:
        """The bound that a number of members breaks, and what to say; empty if none."""
        low, high = self._group.min, self._group.max
        if value is None:
            return "op", "reads no value"
        what = f"{count} {self.test.title} read{'s' * (count == 1)} {self.graph.title(value)}"
        if count < low:
            return "min", f"{what}; a group has at least {low}"
        if high is not None and count > high:
            return "max", f"{what}; a group has at most {high}"
        return "", ""


class _Single(Places):
    """``node`` beside patterns of several operators: one weight with all its calls."""

    def __post_init__(self) -> None:
        assert self.alternative.node is not None
        self.anchor = self.alternative.node.bound_name
        self.test = NodeTest.of(self.alternative.node)
        self.keys = (*self.at, "node")

    def anchors(self) -> Sequence[WeightCalls]:
        return self.index.candidates(self.test.ops)

    def starts(self, anchors: Sequence[WeightCalls]) -> Iterator[Start]:
        for anchor in anchors:
            yield self._start(anchor)

    def _start(self, anchor: WeightCalls) -> Start:
        call, orders = self.index.call, self.index.orders
        calls = tuple(call(orders[operator.name]) for operator in anchor.operators)
        found = PatternFit({self.anchor: calls})
        lost = Lost("pattern", "")
        return Start((anchor,), lambda taken: iter((found,)), lambda: lost)
