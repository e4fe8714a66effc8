"""Patterns of several operators, prepared for the search.

An optional operator is there or not, so that a pattern is a few variants: the same pattern
with some of its optional operators left out, and what they read in their place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

from fxcompress.graph.operator import AttributeValue, Operator
from fxcompress.rules.language.globs import compile_globs
from fxcompress.rules.language.schema import (
    MOST_OPTIONAL,
    Alternative,
    GraphNode,
    NodePattern,
    reads,
)
from fxcompress.rules.language.vocabulary import COMMUTATIVE, OPERATORS
from fxcompress.rules.matching.dataflow import Dataflow
from fxcompress.rules.matching.literals import matches_literal, show

RARE = 4
"""How many times rarer its name has to make an operator for the search to start from it."""


@dataclass(frozen=True)
class NodeTest:
    """What one operator has to be, by itself.

    Attributes:
        ops: canonical operator names, one of which it has.
        globs: its path fits one of them; None for any path.
        attributes: what its attributes have to be.
    """

    ops: tuple[str, ...]
    globs: tuple[str, ...] | None
    attributes: tuple[tuple[str, AttributeValue], ...]

    @classmethod
    def of(cls, node: NodePattern | GraphNode) -> NodeTest:
        """The test that a node of a rule file asks for."""
        return cls(node.op, node.name, tuple(node.attributes.items()))

    @cached_property
    def named(self) -> Callable[[str], object] | None:
        """Whether a path fits the globs; None for any path."""
        return None if self.globs is None else compile_globs(self.globs).match

    @property
    def not_named(self) -> str:
        """Why an operator is lost to the globs."""
        shown = ", ".join(f'"{glob}"' for glob in self.globs or ())
        many = len(self.globs or ()) > 1
        return f"name matches none of {shown}" if many else f"name does not match {shown}"

    def misfit(self, operator: Operator) -> tuple[str, str] | None:
        """The first attribute that is not as wanted, and what it is instead."""
        for attribute, wanted in self.attributes:
            if not matches_literal(operator, attribute, wanted):
                found = show(operator.attributes.get(attribute))
                return attribute, f"{attribute} is {found}, not {show(wanted)}"
        return None

    def accepts(self, operator: Operator) -> bool:
        """Whether an operator is what is wanted."""
        return (
            operator.op in self.ops
            and (self.named is None or bool(self.named(operator.path)))
            and self.misfit(operator) is None
        )

    @cached_property
    def title(self) -> str:
        """``linear named "*.v_proj"``."""
        text = " or ".join(self.ops)
        if self.globs is not None:
            text += f" named {quoted(self.globs)}"
        if self.attributes:
            text += " with " + ", ".join(f"{key} {show(value)}" for key, value in self.attributes)
        return text


def quoted(globs: Sequence[str]) -> str:
    """``'"*.q" or "*.k"'``."""
    return " or ".join(f'"{glob}"' for glob in globs)


@dataclass(frozen=True)
class Variant:
    """A pattern without some of its optional operators.

    Attributes:
        nodes: names of the operators that are there, in the order of the file.
        reads: operator -> names of what its first operands are, None for anything.
        outputs: operators whose values may be used outside of the match.
        plan: the operators in the order of the search, the anchor first.
        twins: operator -> the one before it that it could change places with.
    """

    nodes: tuple[str, ...]
    reads: Mapping[str, tuple[str | None, ...]]
    outputs: frozenset[str]
    plan: tuple[str, ...]
    twins: Mapping[str, str]


@dataclass(frozen=True)
class GraphPattern:
    """A pattern of several operators, for one graph.

    Attributes:
        tests: name -> what that operator has to be by itself, in the order of the file.
        optional: names of the operators that may be absent.
        anchor: the operator that the search starts from: of all required ones, the graph has the
            fewest.
        variants: those that the graph has the operators for, the whole pattern first.
    """

    tests: Mapping[str, NodeTest]
    optional: frozenset[str]
    anchor: str
    variants: tuple[Variant, ...]

    @classmethod
    def of(cls, alternative: Alternative, graph: Dataflow) -> GraphPattern:
        """Prepare a pattern given by ``nodes``.

        Raises:
            ValueError: more than :data:`MOST_OPTIONAL` optional operators.
        """
        nodes = alternative.nodes or {}
        tests = {name: NodeTest.of(node) for name, node in nodes.items()}
        optional = [name for name, node in nodes.items() if node.optional]
        never = {name for name in optional if not graph.count(tests[name].ops)}
        if len(optional) > MOST_OPTIONAL:
            raise ValueError(f"{len(optional)} optional nodes; at most {MOST_OPTIONAL}")
        required = [name for name in nodes if name not in optional]
        anchor = _anchor({name: test for name, test in tests.items() if name in required}, graph)
        sources = {name: reads(node) for name, node in nodes.items()}
        variants = tuple(
            _variant(absent, sources, alternative.outputs, anchor, tests, optional)
            for count in range(len(optional) + 1)
            for absent in combinations(optional, count)
            if never.issubset(absent)
        )
        return cls(tests, frozenset(optional), anchor, variants)

    @cached_property
    def ordered(self) -> bool:
        """Whether the search meets matches of one anchor in the order in which they count."""
        (first, *others) = self.variants
        names = (self.anchor, *(name for name in first.nodes if name != self.anchor))
        either_way = any(COMMUTATIVE.intersection(test.ops) for test in self.tests.values())
        return not others and first.plan == names and not either_way

    @cached_property
    def symmetric(self) -> bool:
        """Whether the same operators may match in several ways."""
        ops = [op for test in self.tests.values() for op in test.ops]
        return len(set(ops)) < len(ops)


def _anchor(tests: Mapping[str, NodeTest], graph: Dataflow) -> str:
    """Where the search starts: the operator of which the graph has the fewest.

    Names count only where they leave next to nothing: what is lost to the name of the anchor
    is no near miss, and the search says better what is missing.
    """
    left = {
        name: graph.count(test.ops)
        if test.globs is None
        else graph.count_named(test.ops, test.globs)
        for name, test in tests.items()
    }
    first = min(
        tests,
        key=lambda name: (
            graph.count(tests[name].ops),
            not any(op in OPERATORS for op in tests[name].ops),
        ),
    )
    rarest = min(left, key=left.__getitem__)
    return rarest if 0 < left[rarest] * RARE < left[first] else first


def _variant(
    absent: Sequence[str],
    reads: Mapping[str, tuple[str | None, ...]],
    outputs: Sequence[str] | None,
    anchor: str,
    tests: Mapping[str, NodeTest],
    optional: Sequence[str],
) -> Variant:
    def resolved(name: str | None) -> str | None:
        while name is not None and name in absent:
            # An optional operator has one input that has a name: the checks see to it.
            name = next((source for source in reads[name] if source is not None), None)
        return name

    nodes = tuple(name for name in reads if name not in absent)
    there = {name: tuple(resolved(source) for source in reads[name]) for name in nodes}
    read = {source for sources in there.values() for source in sources}
    ends = (
        frozenset(name for name in nodes if name not in read)
        if outputs is None
        else frozenset(name for name in map(resolved, outputs) if name in there)
    )
    alike: dict[object, str] = {}
    twins: dict[str, str] = {}
    for name in nodes:
        if name in read or name in optional:
            continue
        kind = (repr(tests[name]), there[name], name in ends)
        if kind in alike:
            twins[name] = alike[kind]
        alike[kind] = name
    return Variant(nodes, there, ends, _plan(anchor, there, tests), twins)


def _plan(
    anchor: str, reads: Mapping[str, tuple[str | None, ...]], tests: Mapping[str, NodeTest]
) -> tuple[str, ...]:
    """The order of the search: what has a name first, for most ways end there; then producers,
    of which there is one, before readers."""
    plan: list[str] = []
    known: set[str | None] = set()
    left = dict.fromkeys(reads)
    name = anchor
    while True:
        del left[name]
        plan.append(name)
        known |= {name, *reads[name]} - {None}
        if not left:
            return tuple(plan)
        produced = [other for other in left if other in known]
        reading = [other for other in left if known.intersection(reads[other])]
        near = [*produced, *reading]
        named = [other for other in near if tests[other].globs is not None]
        name = next(iter((*named, *near, *left)))
