"""Where a pattern of several operators is in a graph.

The search starts from every operator that can be the anchor, follows operands (of which an
operator has few) and then readers, and goes back where it gets stuck.  What a match is:

* different operators of the pattern are different operators of the graph; one name stands for
  one value wherever it is read; and a value from outside is made by no operator of the match;
* only ``outputs`` are read outside of the match;
* no path leaves the match and comes back;
* an optional operator is absent only where no match has it and the same others;
* of several matches of the same operators, the first counts, by the positions of the
  operators in the order of the pattern.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from fxcompress.rules.language.vocabulary import COMMUTATIVE
from fxcompress.rules.matching.dataflow import Dataflow, Value
from fxcompress.rules.matching.patterns import GraphPattern, Variant

Embedding = Mapping[str, int]
"""Operator of the pattern -> its position in the graph; absent ones are left out."""

Taken = Callable[[str, int], bool]
"""Whether an operator of the graph is not to be had as one of the pattern."""

MOST_STEPS = 1_000_000
"""Operators that the search for one pattern may try."""


class SearchLimit(Exception):
    """A search that took more than :data:`MOST_STEPS`."""


_Reached = tuple[bool, int, bool]
"""How far a way got: were all operators there, how many, is the one to blame required."""


@dataclass
class _Walk:
    """What one walk is for.

    Attributes:
        taken: operators that are not to be had.
        fixed: operators that are bound beforehand.
        among: the only operators to be had; None for all.
        noting: whether a failure is of interest.
    """

    taken: Taken | None = None
    fixed: Mapping[str, int] | None = None
    among: frozenset[int] | None = None
    noting: bool = False

    def admits(self, name: str, position: int) -> bool:
        if self.fixed is not None and self.fixed.get(name, position) != position:
            return False
        if self.among is not None and position not in self.among:
            return False
        return self.taken is None or not self.taken(name, position)


class Search:
    """The search for one pattern in one graph.

    Attributes:
        pattern: what to look for.
        graph: where.
        gave_up: whether the last search was :meth:`first`, and took too long.
    """

    def __init__(
        self, pattern: GraphPattern, graph: Dataflow, *, most_steps: int = MOST_STEPS
    ) -> None:
        self.pattern = pattern
        self.graph = graph
        self._steps_left = most_steps
        self._accepted: dict[str, dict[int, bool]] = {name: {} for name in pattern.tests}
        self._furthest: tuple[_Reached, str, Callable[[], str]] | None = None
        self.gave_up = False

    def at(self, start: int, taken: Taken | None = None) -> Iterator[Embedding]:
        """The matches of one anchor, in the order in which they count.

        Args:
            start: position of the anchor, which passes its own test.
            taken: operators to leave out. It may change while the search goes on.
        """
        self._furthest, self.gave_up = None, False
        walk = _Walk(taken=taken, noting=True)
        found = (
            embedding
            for variant in self.pattern.variants
            for embedding in self._complete(variant, start, walk)
            if self._counts(variant, embedding)
        )
        if self.pattern.ordered:
            yield from found
        else:
            keyed = {self.key(embedding): embedding for embedding in found}
            yield from (keyed[key] for key in sorted(keyed))

    def first(self, start: int, most_steps: int = 2_000) -> Embedding | None:
        """The first match of one anchor; None if there is none.

        A search that takes too long is given up, and ``gave_up`` is set: nothing but a reason
        hangs on it.
        """
        left = self._steps_left
        self._steps_left = min(left, most_steps)
        try:
            return next(self.at(start), None)
        except SearchLimit:
            self.gave_up = True
            return None
        finally:
            self._steps_left = left

    def key(self, embedding: Embedding) -> tuple[int, ...]:
        """Sorts the matches of one anchor; an absent operator comes last."""
        absent = len(self.graph.operators)
        return tuple(embedding.get(name, absent) for name in self.pattern.tests)

    # ---- which matches count --------------------------------------------------------

    def _counts(self, variant: Variant, embedding: Embedding) -> bool:
        return self._is_largest(variant, embedding) and self._is_first(embedding)

    def _is_largest(self, variant: Variant, embedding: Embedding) -> bool:
        """Whether no match has the same operators and an optional one besides."""
        start = embedding[self.pattern.anchor]
        return not any(
            len(larger.nodes) > len(variant.nodes)
            and set(larger.nodes).issuperset(variant.nodes)
            and any(True for _ in self._complete(larger, start, _Walk(fixed=embedding)))
            for larger in self.pattern.variants
        )

    def _is_first(self, embedding: Embedding) -> bool:
        """Whether no other match of the same operators comes before."""
        if not self.pattern.symmetric:
            return True
        key = self.key(embedding)
        bound = frozenset(embedding.values())
        return not any(
            self.key(other) < key and self._is_largest(variant, other)
            for variant in self.pattern.variants
            if len(variant.nodes) == len(bound)
            for start in bound
            if self.pattern.tests[self.pattern.anchor].accepts(self.graph.operators[start])
            for other in self._complete(variant, start, _Walk(among=bound))
        )

    # ---- the walk -------------------------------------------------------------------

    def _complete(self, variant: Variant, start: int, walk: _Walk) -> Iterator[Embedding]:
        """Matches of one variant that the rest of the graph does not stand in the way of."""
        self._step()
        ways = self._unified(variant, variant.plan[0], start, {})
        for bound in ways:
            for known in self._extend(variant, 1, bound, walk):
                found = {name: known[name] for name in variant.nodes}
                misfit = self._misfit(variant, found)
                if misfit is None:
                    yield found
                elif walk.noting:
                    name, reason = misfit
                    self._note(True, len(found), name, partial(str, reason))
        if walk.noting and not ways:
            self._note(False, 0, variant.plan[0], lambda: _unfit(variant))

    def _extend(
        self, variant: Variant, depth: int, known: Mapping[str, Value], walk: _Walk
    ) -> Iterator[Mapping[str, Value]]:
        """All ways to bind the rest of the plan."""
        if depth == len(variant.plan):
            yield known
            return
        name = variant.plan[depth]
        accepted, taken, twin = self._accepted[name], walk.taken, variant.twins.get(name)
        reached = False
        for turn, position in enumerate(self._candidates(variant, name, known)):
            self._step()
            if turn and taken and any(taken(n, known[n]) for n in variant.plan[:depth]):
                return  # what was found meanwhile has taken what this way builds on
            if position not in accepted:
                operator = self.graph.operators[position]
                accepted[position] = self.pattern.tests[name].accepts(operator)
            if not accepted[position] or not walk.admits(name, position):
                continue
            if twin is not None and position <= known[twin]:
                continue
            if name not in known and position in known.values():
                continue
            for bound in self._unified(variant, name, position, known):
                for found in self._extend(variant, depth + 1, bound, walk):
                    reached = True
                    yield found
        if walk.noting and not reached:
            self._note(False, depth, name, lambda: self._missing(variant, name, known))

    def _candidates(self, variant: Variant, name: str, known: Mapping[str, Value]) -> Sequence[int]:
        """Where an operator can be, given what is known."""
        if name in known:
            return (known[name],) if known[name] >= 0 else ()
        readers = self.graph.readers
        sources = variant.reads[name]
        found = [readers.get(known[s], ()) for s in sources if s is not None and s in known]
        if found:
            return found[0] if len(found) == 1 else min(found, key=len)
        return self.graph.positions(self.pattern.tests[name].ops)

    def _unified(
        self, variant: Variant, name: str, position: int, known: Mapping[str, Value]
    ) -> list[Mapping[str, Value]]:
        """What is known when an operator is bound: what its operands are, either way round."""
        operands, reads = self.graph.operands[position], variant.reads[name]
        if len(operands) < len(reads):
            return []
        unified: list[Mapping[str, Value]] = []
        orders: list[Sequence[Value]] = [operands]
        if len(operands) == 2 and self.graph.operators[position].op in COMMUTATIVE:
            orders += [operands[::-1]] if operands[0] != operands[1] else []
        for values in orders:
            bound = {**known, name: position}
            for source, value in zip(reads, values, strict=False):
                if source is None:
                    continue
                if source in bound:
                    if bound[source] != value:
                        break
                elif value in bound.values() and _clashes(variant, source, value, bound):
                    break
                else:
                    bound[source] = value
            else:
                unified.append(bound)
        return unified

    def _step(self) -> None:
        self._steps_left -= 1
        if self._steps_left < 0:
            raise SearchLimit

    # ---- the rest of the graph ------------------------------------------------------

    def _misfit(self, variant: Variant, found: Embedding) -> tuple[str, str] | None:
        """The operator that is read outside, or left and reached again; and how."""
        graph = self.graph
        bound = frozenset(found.values())
        for name, position in found.items():
            if name in variant.outputs:
                continue
            for reader in graph.readers.get(position, ()):
                if reader not in bound:
                    title = graph.title(position)
                    return name, f'"{name}" ({title}) is also read by {graph.title(reader)}'
        names = {position: name for name, position in found.items()}
        last = max(bound)
        outside: set[int] = set()
        waiting = list(bound)
        while waiting:
            position = waiting.pop()
            for reader in graph.readers.get(position, ()):
                self._step()
                if reader in bound:
                    if position in outside:
                        title, through = graph.title(reader), graph.title(position)
                        reason = f'"{names[reader]}" ({title}) also depends on the match through '
                        return names[reader], reason + through
                elif reader < last and reader not in outside:
                    outside.add(reader)
                    waiting.append(reader)
        return None

    # ---- how far it got -------------------------------------------------------------

    @property
    def failure(self) -> tuple[str, Callable[[], str]] | None:
        """Where and why the search from the last anchor ended; None if nothing went wrong.

        The name of the operator that was missing or in the wrong, and what tells the reason:
        of the way that got furthest.
        """
        if self._furthest is None:
            return None
        _, name, reason = self._furthest
        return name, reason

    def _note(self, complete: bool, depth: int, name: str, reason: Callable[[], str]) -> None:
        """Keep the furthest failure; of equals the first, and one of a required operator."""
        reached = (complete, depth, name not in self.pattern.optional)
        if self._furthest is None or reached > self._furthest[0]:
            self._furthest = (reached, name, reason)

    def _missing(self, variant: Variant, name: str, known: Mapping[str, Value]) -> str:
        """``no linear named "*.v_proj" reads the input of layers.0.k_proj (node v)``."""
        test, graph = self.pattern.tests[name], self.graph
        if name in known:
            reader = next(
                other for other in variant.plan if other in known and name in variant.reads[other]
            )
            what = f"{graph.title(known[reader])} reads {graph.title(known[name])}, which is no"
            return f"{what} {test.title} (node {name})"
        sources = dict.fromkeys(s for s in variant.reads[name] if s is not None and s in known)
        what = " and ".join(self._source(variant, source, known) for source in sources)
        others = (graph.operators[known[node]] for node in variant.nodes if node in known)
        other = "other " if any(map(test.accepts, others)) else ""
        return f"no {other}{test.title}" + (f" reads {what}" if what else "") + f" (node {name})"

    def _source(self, variant: Variant, source: str, known: Mapping[str, Value]) -> str:
        """How a message names a value: by who makes it, or by who else reads it."""
        if source in variant.reads:
            return self.graph.title(known[source])
        # The one bound last: it is what the search found before it got stuck.
        reader = next(
            other
            for other in reversed(variant.plan)
            if other in known and source in variant.reads[other]
        )
        first = variant.reads[reader][0] == source
        title = self.graph.title(known[reader])
        return f"the input of {title}" if first else f"what {title} reads"


def _clashes(variant: Variant, source: str, value: Value, bound: Mapping[str, Value]) -> bool:
    """Whether an operator would be bound twice, or make a value from outside."""
    return any(
        value == other and (name in variant.reads or source in variant.reads)
        for name, other in bound.items()
    )


def _unfit(variant: Variant) -> str:
    reads = variant.reads[variant.plan[0]]
    wanted = ", ".join("null" if name is None else f"${name}" for name in reads)
    return f"its operands are not [{wanted}]"
