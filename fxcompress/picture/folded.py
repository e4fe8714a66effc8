"""Boxes that are alike are one: blocks of one structure, whatever their ranks.

Every structure is there once, so that a model of thousands of blocks is as small as the number of
different ones.  Blocks in a row are drawn as one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fxcompress.picture.boxes import FACTORIZED, OUTSIDE, STATUSES, Box, Edge, Tree
from fxcompress.picture.nodes import Node, shape_text
from fxcompress.plans.plan import Part, SitePlan
from fxcompress.rules.matching.folding import split_indices


@dataclass(frozen=True)
class Entry:
    """A box, or several alike in a row, as it is drawn.

    Attributes:
        labels: of each of them below the box around them.
        places: of each among the boxes there.
        before, after: the operator in words on either side; empty for a module, and where there
            is none.
        shape, shape_after: of its value.
        status: place in :data:`STATUSES`.
        sides: where it exists.
        site: whether a rule matched it: the plan says more of it, by its path.
        function: whether its label is that of a function.
        call: which call of the operator it is, from 0.
        kinds: places in :attr:`Folded.kinds` of what is inside: one, or one for each of the boxes
            if what took the place of operators has other steps in some; none if nothing is inside.
    """

    labels: tuple[str, ...]
    places: tuple[int, ...]
    before: str
    after: str
    shape: str
    shape_after: str
    status: int
    sides: int
    site: bool
    function: bool
    call: int
    kinds: tuple[int, ...]

    @property
    def is_module(self) -> bool:
        """Whether the entry is a module, no operator."""
        return not self.before and not self.after


@dataclass(frozen=True)
class Kind:
    """What is inside of boxes that are alike.

    Attributes:
        entries: in the order in which they run.
        edges: among them.
        counts: how many operators of every status there are, at any depth.
    """

    entries: tuple[Entry, ...]
    edges: tuple[Edge, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Folded:
    """A graph whose alike boxes are one; the last kind is that of the model."""

    kinds: tuple[Kind, ...]

    @property
    def root(self) -> int:
        """Place of the model's kind."""
        return len(self.kinds) - 1


def fold_tree(tree: Tree) -> Folded:
    """A graph with every structure once."""
    known: dict[tuple[tuple[Entry, ...], tuple[Edge, ...]], int] = {}
    kinds: list[Kind] = []
    like: list[int] = []  # of every kind, the first that it looks like, bodies left out

    def kind_of(box: Box) -> tuple[int, ...]:
        if not box.inside:
            return ()
        singles = [_entry(each, box, at, kind_of(each)) for at, each in enumerate(box.inside)]
        entries = _runs(singles, like)
        # Places are those of this box; in an alike one they are the same.
        key = entries, _folded_edges(box.edges, entries)
        if key not in known:
            known[key] = len(kinds)
            kinds.append(Kind(*key, _counts(entries, kinds)))
            rough = tuple(_rough(entry, like) for entry in entries)
            like.append(looks.setdefault((rough, key[1]), len(like)))
        return (known[key],)

    looks: dict[tuple[tuple[Entry, ...], tuple[Edge, ...]], int] = {}
    if not kind_of(tree.root):
        kinds.append(Kind((), (), (0,) * len(STATUSES)))
    return Folded(tuple(kinds))


def _rough(entry: Entry, like: Sequence[int]) -> Entry:
    """An entry without what is inside of operators."""
    kinds = tuple(like[kind] for kind in entry.kinds[:1]) if entry.is_module else ()
    return replace(entry, kinds=kinds)


def _counts(entries: Sequence[Entry], kinds: Sequence[Kind]) -> tuple[int, ...]:
    counts = [0] * len(STATUSES)
    for entry in entries:
        if not entry.is_module:
            counts[entry.status] += 1
            continue
        for status, number in enumerate(kinds[entry.kinds[0]].counts if entry.kinds else ()):
            counts[status] += number * len(entry.labels)
    return tuple(counts)


def run_label(labels: Sequence[str]) -> str:
    """What boxes in a row are called: ``"layers.0 … 29"``.

    >>> run_label(["layers.0", "layers.1", "layers.2"]), run_label(["norm"])
    ('layers.0 … 2', 'norm')
    """
    if len(labels) == 1:
        return labels[0]
    literals, indices = split_indices(labels[0])
    _, final = split_indices(labels[-1])
    shown = [
        f"{a} … {b}{after}" if a != b else f"{a}{after}"
        for a, b, after in zip(indices, final, literals[1:], strict=True)
    ]
    return literals[0] + "".join(shown)


def _runs(entries: Sequence[Entry], like: Sequence[int]) -> tuple[Entry, ...]:
    """Entries in a row that differ in one index, which counts up, as one."""
    runs: list[list[Entry]] = []
    for entry in entries:
        if runs and _follows(runs[-1][-1], entry, like):
            runs[-1].append(entry)
        else:
            runs.append([entry])
    return tuple(run[0] if len(run) == 1 else _joined(run) for run in runs)


def _joined(run: Sequence[Entry]) -> Entry:
    kinds = [entry.kinds[0] for entry in run]
    return replace(
        run[0],
        labels=tuple(entry.labels[0] for entry in run),
        places=tuple(entry.places[0] for entry in run),
        kinds=tuple(kinds if len({*kinds}) > 1 else kinds[:1]),
    )


def _follows(entry: Entry, other: Entry, like: Sequence[int]) -> bool:
    """Whether a module is the next one of a list, and alike."""
    if not (entry.is_module and other.is_module and entry.kinds and other.kinds):
        return False
    if like[entry.kinds[0]] != like[other.kinds[0]] or entry.sides != other.sides:
        return False
    words, indices = split_indices(entry.labels[0])
    others, following = split_indices(other.labels[0])
    steps = [after - before for before, after in zip(indices, following, strict=False)]
    return words == others and [step for step in steps if step] == [1]


def _folded_edges(edges: Sequence[Edge], entries: Sequence[Entry]) -> tuple[Edge, ...]:
    at = {place: number for number, entry in enumerate(entries) for place in entry.places}
    at[OUTSIDE] = OUTSIDE
    found: dict[tuple[int, int], int] = {}
    for edge in edges:
        pair = at[edge.source], at[edge.target]
        if pair[0] != pair[1]:
            found[pair] = found.get(pair, 0) | edge.sides
    return tuple(Edge(*pair, sides) for pair, sides in sorted(found.items()))


def _entry(box: Box, around: Box, place: int, kinds: tuple[int, ...]) -> Entry:
    site, inner = box.site, around.site
    before, after = ("" if each is None else each.text for each in (box.before, box.after))
    shape = shape_text(box.before.shape) if box.before else ""
    shape_after = shape_text(box.after.shape) if box.after else ""
    if site is not None:
        before = _before_text(site)
        after = _after_text(site, box)
        shape_after = _changed(box.before, box.after) if box.after else shape
    elif inner is not None and box.after is not None:
        after = _part_text(box, inner)
        shape_after = _body_shape(box.after, inner)
    elif box.before and box.after:
        shape_after = _changed(box.before, box.after)
    return Entry(
        labels=(box.label,),
        places=(place,),
        before=before,
        after=after,
        shape=shape,
        shape_after=shape_after,
        status=box.status,
        sides=box.sides,
        site=site is not None,
        function=box.function,
        call=0 if inner is not None else box.call,  # the box around tells it
        kinds=kinds,
    )


def _before_text(site: SitePlan) -> str:
    return site.operator + (", bias" if site.bias else "")


def _after_text(site: SitePlan, box: Box) -> str:
    """``"pivoted"`` of what has a body, ``"linear 64→k"`` of an operator with fewer channels."""
    before = _before_text(site)
    if site.form is None:
        return before
    if box.status == FACTORIZED or box.inside:
        return site.form_text
    if not site.parts:
        return site.form_text
    part, n, m = site.parts[0], site.in_features, site.out_features
    ends = "→".join(
        "k" if now != was else f"{was}"
        for now, was in ((part.in_features, n), (part.out_features, m))
    )
    return before.replace(f"{n}→{m}", ends, 1)


def _part_text(box: Box, site: SitePlan) -> str:
    """``"linear 48→r"``: a layer of what took an operator's place, in terms of its rank."""
    assert box.after is not None
    part = next((part for part in site.parts if part.path and part.path == box.label), None)
    if part is None or part.in_features is None:
        return box.after.op
    words = [part.op, f"{_size(part, 0, site)}→{_size(part, 1, site)}"]
    return " ".join([*words, *(["×".join(map(str, part.kernel))] if part.kernel else [])])


def _size(part: Part, end: int, site: SitePlan) -> str:
    size = (part.in_features, part.out_features)[end]
    return _in_ranks(size or 0, site, (site.in_features, site.out_features))


def _in_ranks(size: int, site: SitePlan, wholes: Sequence[int]) -> str:
    """A number of channels by the rank: ``r`` (``r1`` and ``r2`` of two), ``64-r``, or itself."""
    ranks = site.then.ranks if site.then else site.ranks
    names = ["r"] if len(ranks) == 1 else [f"r{at + 1}" for at in range(len(ranks))]
    for name, rank in zip(names, ranks, strict=True):
        if size == rank:
            return name
    for name, rank in zip(names, ranks, strict=True):
        for whole in wholes:
            if size == whole - rank:
                return f"{whole}-{name}"
    if size in wholes or not site.reader:
        return str(size)
    return "k"


def _body_shape(node: Node, site: SitePlan) -> str:
    """The shape of a value in what took an operator's place; empty where it depends on more."""
    if node.shape is None or node.op in ("parameter", "unflatten", "index_select"):
        return ""
    axis = len(node.shape) - 1 if site.op in ("linear", "embedding") else 1
    if not 0 <= axis < len(node.shape):
        return shape_text(node.shape)
    sizes: list[int | str] = [*node.shape]
    wholes = site.in_features, site.out_features
    sizes[axis] = _in_ranks(node.shape[axis], site, wholes)
    return shape_text(tuple(sizes))


def _changed(before: Node | None, after: Node | None) -> str:
    """The shape after, k in place of what is fewer."""
    if after is None or after.shape is None:
        return ""
    if before is None or before.shape is None or len(before.shape) != len(after.shape):
        return shape_text(after.shape)
    pairs = zip(before.shape, after.shape, strict=True)
    return shape_text(tuple(now if was == now else "k" for was, now in pairs))
