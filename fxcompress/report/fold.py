"""Folding: thirty blocks that are alike become one line.

Paths differ from block to block in their indices only::

    model.layers.0.mlp, model.layers.1.mlp, ..., model.layers.29.mlp
        -> model.layers.{0..29}.mlp

Blocks are alike if their *structure* is: the same children with the same operators, shapes,
forms and rules.  Ranks and indices are left out, so what an index set stands for is exact
and ranks are shown as ranges.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fxcompress.plan import SitePlan

# A padded number ("01") is a name, not an index: folding must be reversible.
_INDEX = re.compile(r"(?<![0-9])(?:0|[1-9][0-9]{0,8})(?![0-9])")

Literals = tuple[str, ...]
Indices = tuple[int, ...]
Box = tuple[frozenset[int], ...]
Structure = tuple[tuple[object, ...], ...]


@dataclass(frozen=True)
class Row:
    """The same child of every block of a group.

    Attributes:
        name: its name within the block, ``"up_proj"``; ``"{0..7}"`` if several children of one
            block are alike and have only numbers for names.
        per_block: how many children of one block it stands for, usually 1.
        sites: all of its sites, in graph order, never empty.
    """

    name: str
    per_block: int
    sites: tuple[SitePlan, ...]


@dataclass(frozen=True)
class Group:
    """Blocks with one structure.

    Attributes:
        patterns: folded paths, ``("model.layers.{0..29}.mlp",)``; several if the indices do not
            form a grid; ``("",)`` for the root.
        count: number of blocks.
        rows: the children, in graph order.
    """

    patterns: tuple[str, ...]
    count: int
    rows: tuple[Row, ...]


def split_indices(path: str) -> tuple[Literals, Indices]:
    """Take the indices out of a path.

    >>> split_indices("layers.1.blocks.12.mlp")
    (('layers.', '.blocks.', '.mlp'), (1, 12))
    """
    literals = tuple(_INDEX.split(path))
    return literals, tuple(int(match.group()) for match in _INDEX.finditer(path))


def index_set(indices: Iterable[int]) -> str:
    """Write a set of indices with its runs shortened.

    >>> index_set([0, 1, 2, 3, 5, 7, 8]), index_set([4])
    ('{0..3,5,7..8}', '4')
    """
    ordered = sorted(set(indices))
    runs: list[tuple[int, int]] = []
    for index in ordered:
        if runs and index == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], index)
        else:
            runs.append((index, index))
    text = ",".join(str(first) if first == last else f"{first}..{last}" for first, last in runs)
    return text if len(ordered) == 1 else f"{{{text}}}"


def fold_paths(paths: Iterable[str]) -> tuple[str, ...]:
    """Fold paths to as few patterns as their index sets need, in order of appearance.

    >>> fold_paths(["h.0.fc", "h.1.fc", "head", "h.3.fc"])
    ('h.{0..1,3}.fc', 'head')
    >>> fold_paths(["layers.0.blocks.0", "layers.0.blocks.1", "layers.1.blocks.0"])
    ('layers.0.blocks.{0..1}', 'layers.1.blocks.0')
    """
    found: dict[Literals, set[Indices]] = {}
    for path in paths:
        literals, indices = split_indices(path)
        found.setdefault(literals, set()).add(indices)
    return tuple(
        _pattern(literals, box) for literals, points in found.items() for box in _boxes(points)
    )


def fold_blocks(sites: Sequence[SitePlan]) -> tuple[Group, ...]:
    """Group the blocks (parents of sites) whose structure is equal, in graph order.

    A block that differs, say because one of its sites stayed dense and is not among
    ``sites``, goes to a group of its own or to that of the blocks that differ likewise.
    """
    blocks: dict[str, list[SitePlan]] = {}
    for site in sites:
        blocks.setdefault(parent(site.name), []).append(site)
    alike: dict[tuple[Literals, Structure], list[str]] = {}
    for path, children in blocks.items():
        literals, _ = split_indices(path)
        alike.setdefault((literals, structure(children)), []).append(path)
    return tuple(
        Group(
            patterns=fold_paths(paths),
            count=len(paths),
            rows=_rows([blocks[path] for path in paths]),
        )
        for paths in alike.values()
    )


def structure(children: Sequence[SitePlan]) -> Structure:
    """What makes blocks alike: everything about their sites but ranks and what follows from them.

    >>> structure([up_proj])                                        # doctest: +SKIP
    (('up_proj', 'linear 576→1536', False, 'float32', 'pivoted', 'mlp', 'rules.yaml:22'),)
    """
    return tuple((child_name(site.name), *_kind(site)) for site in children)


def parent(path: str) -> str:
    """Path of the enclosing module, empty for the root's children."""
    return path.rpartition(".")[0]


def child_name(path: str) -> str:
    """Last component of a path."""
    return path.rpartition(".")[2]


def _kind(site: SitePlan) -> tuple[object, ...]:
    return (
        site.operator,
        site.bias,
        site.dtype,
        site.form,
        site.rule,
        site.location,
    )


def _rows(blocks: Sequence[Sequence[SitePlan]]) -> tuple[Row, ...]:
    """Children by position, which their structure makes the same in every block.

    The members of a list of equal layers have only numbers for names; they share a row.
    """
    positions: dict[tuple[object, ...], list[int]] = {}
    for position, site in enumerate(blocks[0]):
        name = child_name(site.name)
        # Two weights of one module share its name, so the position tells named children apart.
        key = ("#", *_kind(site)) if _INDEX.fullmatch(name) else (position,)
        positions.setdefault(key, []).append(position)
    return tuple(
        Row(
            name=fold_paths(child_name(blocks[0][at].name) for at in together)[0],
            per_block=len(together),
            sites=tuple(block[at] for block in blocks for at in together),
        )
        for together in positions.values()
    )


def _boxes(points: set[Indices]) -> list[Box]:
    """Cover a set of index tuples exactly with products of index sets.

    A grid needs one; of the two directions to slice the others in, the better is taken.
    """
    forward = _slices(points)
    mirrored = _slices({point[::-1] for point in points})
    backward = [box[::-1] for box in mirrored]
    best = forward if len(forward) <= len(backward) else backward
    return sorted(best, key=lambda box: [min(indices) for indices in box])


def _slices(points: set[Indices]) -> list[Box]:
    if points == {()}:
        return [()]
    rests: dict[int, set[Indices]] = {}
    for first, *rest in points:
        rests.setdefault(first, set()).add(tuple(rest))
    firsts: dict[frozenset[Indices], list[int]] = {}
    for first, those in rests.items():
        firsts.setdefault(frozenset(those), []).append(first)
    return [
        (frozenset(heads), *box) for those, heads in firsts.items() for box in _slices(set(those))
    ]


def _pattern(literals: Literals, box: Box) -> str:
    middle = (
        index_set(indices) + literal for indices, literal in zip(box, literals[1:], strict=True)
    )
    return literals[0] + "".join(middle)
