"""A graph as boxes within boxes, before and after at once: modules, and operators in them.

The operator that a rewrite is about is one box on both sides; what took its place is inside of
it.  So both sides have the same boxes with the same edges wherever nothing was changed, and one
layout draws both of them in line.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from fxcompress.picture.nodes import Node
from fxcompress.plans.plan import SitePlan

BEFORE, AFTER = 1, 2
"""Sides of a picture, as bits."""

OUTSIDE = -1
"""Stands for what is outside of a box, in the edges among those in it."""

UNCHANGED, FACTORIZED, NARROWED, DENSE, DROPPED, ADDED = range(6)

STATUSES = ("unchanged", "factorized", "narrowed", "left dense", "dropped", "added")
"""What happened to an operator.

Factorized: other operators took its place.  Narrowed: it is the same operator on fewer channels.
Left dense: a rule matched it, and it stayed.
"""


@dataclass(frozen=True)
class Edge:
    """A value that goes from one box to another one in the same box.

    Attributes:
        source, target: places among the boxes inside; :data:`OUTSIDE` for anything outside.
        sides: where it does so, :data:`BEFORE`, :data:`AFTER` or both.
    """

    source: int
    target: int
    sides: int


@dataclass(frozen=True)
class Box:
    """A module, or an operator.

    Attributes:
        label: path below the box around it; the operator's name for a function.
        path: of the module; for a function, of the module that calls it.
        before, after: the operator on either side, None for a module, and where there is none.
        site: what the plan says of it, if it is an operator that a rule matched.
        call: which call of it this is, from 0.
        function: whether it is a function's call, so that its label is no name in the model.
        status: place in :data:`STATUSES`; of a module :data:`UNCHANGED`.
        sides: where it exists.
        inside: the boxes in it, in the order in which they run.
        edges: among these.
    """

    label: str
    path: str
    before: Node | None = None
    after: Node | None = None
    site: SitePlan | None = None
    call: int = 0
    function: bool = False
    status: int = UNCHANGED
    sides: int = 0
    inside: tuple[Box, ...] = ()
    edges: tuple[Edge, ...] = ()

    @property
    def is_module(self) -> bool:
        """Whether the box is a module, no operator."""
        return self.before is None and self.after is None and self.site is None

    def walk(self) -> Iterator[Box]:
        """The box itself and all in it, in order."""
        yield self
        for box in self.inside:
            yield from box.walk()


@dataclass(frozen=True, eq=False)
class Tree:
    """A whole graph.

    Attributes:
        root: the model.
        before, after: of every node by its name, the way to its box: places from the root on.
        planned: whether the plan is not carried out: what stands in operators' places is as
            planned, not recorded.
        single: whether there is one graph only, which both sides show.
        unmatched: why operators with a weight are not matched, by path.
    """

    root: Box
    before: Mapping[str, tuple[int, ...]]
    after: Mapping[str, tuple[int, ...]]
    planned: bool = False
    single: bool = False
    unmatched: Mapping[str, str] = field(default_factory=dict)

    def box(self, way: tuple[int, ...]) -> Box:
        """The box at the end of a way."""
        box = self.root
        for place in way:
            box = box.inside[place]
        return box
