"""From recorded graphs to boxes: which node is in which module, and which two are one box.

Nodes before and after are paired by what they are called: an operator by its path, a function by
its name, its module, and its turn among the calls of it there.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise, takewhile

from fxcompress.graph.paths import above
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
    Edge,
    Tree,
)
from fxcompress.picture.nodes import Node, of_summaries
from fxcompress.plans.plan import Plan, SitePlan

DEEPEST = 40
"""Modules within modules, at most: names in what lies deeper are one."""

Key = tuple[str, str, int]
"""A box: path, what is there (a function's name, or one of ``_NAMED``), and which call of it."""

_NAMED = ("", "site", "leaf", "part")
"""A module, an operator that a rule matched, another one, and a layer of what took its place."""


@dataclass
class _Made:
    """A box while it is made; ``inside`` has the keys of those in it."""

    label: str
    path: str
    before: Node | None = None
    after: Node | None = None
    site: SitePlan | None = None
    order: tuple[int, int] = (1 << 62, 0)
    inside: dict[Key, None] = field(default_factory=dict)
    edges: dict[tuple[Key | None, Key | None], int] = field(default_factory=dict)


def tree_of_plan(plan: Plan) -> Tree:
    """Before and after of a plan; of one that is not carried out, after is as planned."""
    before = of_summaries(plan.before)
    planned = not plan.after and bool(plan.rewritten)
    if planned:
        after = tuple(_planned(before, plan.sites))
    else:
        after = of_summaries(plan.after or plan.before)
    tree = build(before, after, plan.sites)
    reasons = {one.name: one.reason for one in plan.unmatched}
    return replace(tree, planned=planned, unmatched=reasons)


def build(
    before: Sequence[Node], after: Sequence[Node] | None = None, sites: Sequence[SitePlan] = ()
) -> Tree:
    """The boxes of a graph.

    Args:
        before: nodes in the order in which they run.
        after: of the rewritten model; the same if left out.
        sites: what the plan says of operators.
    """
    homes = _Homes(before, before if after is None else after, sites)
    made: dict[Key, _Made] = {("", "", 0): _Made("", "")}
    ways: list[dict[str, tuple[Key, ...]]] = []
    last: tuple[int, int] = (-1, 0)
    placed: dict[Key, int] = {}
    for side, nodes in ((BEFORE, before), (AFTER, before if after is None else after)):
        way: dict[str, tuple[Key, ...]] = {}
        for place, (node, keys) in enumerate(zip(nodes, homes.ways(nodes, side), strict=True)):
            if side == BEFORE:
                placed[keys[-1]] = place
            # What is new stands behind what it runs after.
            last = (placed.get(keys[-1], last[0]), place if side == AFTER else 0)
            way[node.name] = keys
            outer = made["", "", 0]
            for key in keys:
                outer.inside[key] = None
                box = made.setdefault(key, _Made(homes.label(key, outer.path), key[0]))
                # What is given comes first, though it is recorded where it is first read.
                box.order = min(box.order, (-1, place) if node.op == "input" else last)
                box.site = homes.site(key)
                outer = box
            if side == BEFORE:
                outer.before = node
            else:
                outer.after = node
        for node in nodes:
            for name in dict.fromkeys(node.inputs):
                if name in way:
                    _connect(made, way[name], way[node.name], side)
        ways.append(way)
    root, places = _finish(made)
    first, second = ({name: places[keys] for name, keys in way.items()} for way in ways)
    return Tree(root, first, second, single=after is None)


def _connect(
    made: Mapping[Key, _Made], source: Sequence[Key], target: Sequence[Key], side: int
) -> None:
    """Note a value in the innermost box around both ends, and in those that it goes through."""
    ends = zip(source, target, strict=False)
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], ends))
    if common == min(len(source), len(target)):
        return  # of a box to itself
    _note(
        made,
        ("", "", 0) if not common else source[common - 1],
        source[common],
        target[common],
        side,
    )
    for around, inner in pairwise(source[common:]):
        _note(made, around, inner, None, side)
    for around, inner in pairwise(target[common:]):
        _note(made, around, None, inner, side)


def _note(
    made: Mapping[Key, _Made], around: Key, source: Key | None, target: Key | None, side: int
) -> None:
    edges = made[around].edges
    edges[source, target] = edges.get((source, target), 0) | side


def _finish(made: Mapping[Key, _Made]) -> tuple[Box, dict[tuple[Key, ...], tuple[int, ...]]]:
    """Frozen boxes, and the places on every way of keys."""
    places: dict[tuple[Key, ...], tuple[int, ...]] = {}

    def finish(key: Key, keys: tuple[Key, ...], way: tuple[int, ...]) -> Box:
        box = made[key]
        places[keys] = way
        inner = sorted(box.inside, key=lambda each: made[each].order)
        at = {each: place for place, each in enumerate(inner)}
        inside = tuple(finish(each, (*keys, each), (*way, at[each])) for each in inner)
        if box.site is not None:
            inside = tuple(replace(each, status=FACTORIZED) for each in inside)
        edges = sorted(
            (at[a] if a else OUTSIDE, at[b] if b else OUTSIDE, sides)
            for (a, b), sides in box.edges.items()
        )
        sides = BEFORE * (box.before is not None) | AFTER * (box.after is not None)
        for each in inside:
            sides |= each.sides
        frozen = Box(
            label=box.label,
            path=box.path,
            before=box.before,
            after=box.after,
            site=box.site,
            call=key[2],
            function=key[1] not in _NAMED,
            sides=sides,
            inside=inside,
            edges=tuple(Edge(*edge) for edge in edges),
        )
        return replace(frozen, status=_status(frozen))

    return finish(("", "", 0), (), ()), places


def _status(box: Box) -> int:
    if box.is_module:
        return UNCHANGED
    if box.site is not None:
        if box.site.form is None:
            return DENSE
        return NARROWED if box.site.reader and not box.inside else FACTORIZED
    if box.after is None:
        return DROPPED
    if box.before is None:
        return ADDED
    if box.before.op != box.after.op:  # a batch norm that is folded away does nothing
        return DROPPED
    return UNCHANGED if box.before.shape == box.after.shape else NARROWED


class _Homes:
    """Where nodes are: in which boxes, from the outermost on, and what these are called."""

    def __init__(
        self, before: Sequence[Node], after: Sequence[Node], sites: Sequence[SitePlan]
    ) -> None:
        self.sites = {site.name: site for site in sites}
        self.known = {node.path for node in before}
        self.outer: set[str] = set()
        ops: dict[tuple[int, str], set[str]] = defaultdict(set)
        for side, nodes in ((BEFORE, before), (AFTER, after)):
            for node in nodes:
                if side == BEFORE or self.owner(node) is None:
                    self.outer.update(above(_cut(node.path)))
                    ops[side, node.path].add(node.op)
        # One operator under a name, and nothing below, is a leaf, though it may be called twice.
        several = {path for (_, path), found in ops.items() if len(found) > 1}
        self.leaves = {path for _, path in ops if path} - self.outer - several
        self.outer |= several
        self.kept = self._kept(ops)

    def _kept(self, ops: Mapping[tuple[int, str], set[str]]) -> set[str]:
        """Paths of modules that are boxes: lists of blocks are not, their blocks are."""
        children: dict[str, set[str]] = defaultdict(set)
        direct = {"", *(path for _, path in ops if path in self.outer)}
        for path in self.outer:
            if path:
                children[_parent(path)].add(path)
        direct |= {_parent(path) for path in self.leaves}
        return {
            path
            for path in self.outer
            if path in direct
            or not (
                len(children[path]) == 1 or all(_last(each).isdigit() for each in children[path])
            )
        }

    def owner(self, node: Node) -> str | None:
        """The site that a node after the rewrite belongs to, if it is inside of one."""
        if node.path in self.known:
            return None
        return next((path for path in above(node.path) if path in self.sites), None)

    def site(self, key: Key) -> SitePlan | None:
        """What the plan says of a box."""
        return self.sites.get(key[0]) if key[1] == "site" else None

    def label(self, key: Key, outer: str) -> str:
        """What a box is called below the one around it."""
        path, what, _ = key
        below = path.removeprefix(f"{outer}.") if path != outer else ""
        if what in _NAMED:
            return below.removeprefix("body.") or "(itself)"
        return what

    def ways(self, nodes: Sequence[Node], side: int) -> Iterable[tuple[Key, ...]]:
        """The boxes of every node."""
        turn: Counter[tuple[str, str]] = Counter()
        totals = Counter((node.path, node.op) for node in nodes)
        found: dict[str, tuple[Key, ...]] = {}
        for node in nodes:
            owner = self.owner(node) if side == AFTER else None
            source = found.get(node.inputs[0]) if node.inputs and not node.path else None
            # Results of a module that returns several stand beside it, and have no path.
            beside = node.op == "getitem" and source is not None and len(source) > 1
            at = turn[node.path, node.op]
            if owner is not None:
                times = max(1, self.sites[owner].calls)
                total = totals[node.path, node.op]
                call = at * times // total if total % times == 0 else 0
                what = node.op if node.path.endswith(".body") else "part"
                way = (*self.around(owner), (owner, "site", call), (node.path, what, at))
            elif beside:
                assert source is not None
                outer = source[-2]
                at = turn[outer[0], node.op]
                turn[outer[0], node.op] += 1
                way = (*source[:-1], (outer[0], node.op, at))
            else:
                way = self._way(node, at)
            turn[node.path, node.op] += not beside
            found[node.name] = way
            yield way

    def _way(self, node: Node, at: int) -> tuple[Key, ...]:
        site = self.sites.get(node.path)
        if site is not None and node.op == site.op:
            return (*self.around(node.path), (node.path, "site", at))
        if node.path in self.leaves:
            return (*self.around(node.path), (node.path, "leaf", at))
        return (*self.chain(node.path), (node.path, node.op, at))

    def around(self, path: str) -> tuple[Key, ...]:
        """The boxes around a leaf or a site."""
        inner = path if path in self.outer else _parent(path)
        return self.chain(inner)

    def chain(self, path: str) -> tuple[Key, ...]:
        """The boxes of a module and of those around it; the model itself is left out."""
        path = _cut(path)
        outer = [each for each in (path, *above(path)) if each and each in self.kept]
        return tuple((each, "", 0) for each in reversed(outer))


def _planned(before: Sequence[Node], sites: Sequence[SitePlan]) -> Iterable[Node]:
    """The graph after a plan that is not carried out: parts in a row in the places of operators."""
    by_name = {site.name: site for site in sites if site.form is not None}
    shared: dict[str, str] = {}  # name of the node that the layers of a bundle have in common
    for node in before:
        site = by_name.get(node.path)
        if site is None or node.op != site.op or not site.parts:
            yield node
            continue
        axis = -1 if site.op in ("linear", "embedding") else 1
        inputs = (shared[site.bundle],) if site.bundle in shared else node.inputs
        for at, part in enumerate(site.parts):
            last = at + 1 == len(site.parts)
            whole = len(site.parts) == 1 and not part.path
            shape = node.shape
            if shape is not None and part.out_features is not None and len(shape) >= abs(axis):
                sizes = [*shape]
                sizes[axis] = part.out_features
                shape = tuple(sizes)
            path = node.path if whole else f"{node.path}.body"
            if not whole and part.path:
                path += f".{part.path}"
            name = node.name if last else f"{node.name}.{at}"
            yield Node(name, part.op.strip("_"), path, inputs, shape)
            inputs = (name,)
            if part.path.startswith("shared."):
                shared[site.bundle] = name


def _cut(path: str) -> str:
    """A path that is not too deep; what lies deeper is one name."""
    names = path.split(".")
    return path if len(names) <= DEEPEST else ".".join(names[:DEEPEST])


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _last(path: str) -> str:
    return path.rpartition(".")[2]
