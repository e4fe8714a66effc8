"""Folding: thirty blocks that are alike become one line.

Paths differ from block to block in their indices only::

    model.layers.0.mlp, model.layers.1.mlp, ..., model.layers.29.mlp
        -> model.layers.{0..29}.mlp

Blocks are alike if their *structure* is: the same children with the same operators, shapes,
forms and rules.  Ranks and indices are left out, so what an index set stands for is exact
and ranks are shown as ranges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fxcompress.plans.plan import SitePlan
from fxcompress.rules.matching.folding import Literals, fold, split_indices

Structure = tuple[tuple[object, ...], ...]


@dataclass(frozen=True)
class Row:
    """One child of a block, in all blocks of a group that are alike.

    Attributes:
        name: its name within the block, ``"up_proj"``; ``"{0..7}"`` if several children of one
            block are alike and have only numbers for names.
        per_block: how many children of one block it stands for, usually 1.
        sites: all of its sites, in graph order, never empty.
    """

    name: str
    per_block: int
    sites: tuple[SitePlan, ...]

    @property
    def label(self) -> str:
        """The name as it is shown; blocks may be sites themselves."""
        return self.name or "(itself)"


@dataclass(frozen=True)
class BlockGroup:
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


def fold_blocks(sites: Sequence[SitePlan]) -> tuple[BlockGroup, ...]:
    """Group the blocks (parents of sites) whose structure is equal, in graph order.

    Sites that are rewritten together are in one block: the innermost module around all of them.
    A block that differs, say because one of its sites stayed dense and is not among
    ``sites``, goes to a group of its own or to that of the blocks that differ likewise.
    """
    around, blocks = _around(sites), dict[str, list[SitePlan]]()
    for site in sites:
        blocks.setdefault(around.get(site.bundle, parent(site.name)), []).append(site)
    alike: dict[tuple[Literals, Structure], list[str]] = {}
    for path, children in blocks.items():
        literals, _ = split_indices(path)
        alike.setdefault((literals, structure(children, path)), []).append(path)
    return tuple(
        BlockGroup(
            patterns=fold(paths),
            count=len(paths),
            rows=_rows([(path, blocks[path]) for path in paths]),
        )
        for paths in alike.values()
    )


def _around(sites: Sequence[SitePlan]) -> dict[str, str]:
    """The path of the innermost module around the sites of every bundle."""
    around: dict[str, str] = {}
    for site in sites:
        if site.bundle:
            inside = parent(site.name)
            around[site.bundle] = common(around.get(site.bundle, inside), inside)
    return around


def common(module: str, other: str) -> str:
    """The path of the innermost module around two, of which it may be one.

    >>> common("layer.0.intermediate", "layer.0.output")
    'layer.0'
    """
    while module and not f"{other}.".startswith(f"{module}."):
        module = parent(module)
    return module


def structure(children: Sequence[SitePlan], block: str) -> Structure:
    """What makes blocks alike: everything about their sites but ranks and what follows from them.

    >>> structure([up_proj], "model.layers.0.mlp")                              # doctest: +SKIP
    (('up_proj', None, 'linear 576→1536', False, 'float32', 'pivoted', 'mlp', 'rules.yaml:22'),)
    """
    first: dict[str, int] = {}
    for position, site in enumerate(children):
        first.setdefault(site.bundle, position)
    return tuple(
        (below(site.name, block), first[site.bundle] if site.bundle else None, *_kind(site))
        for site in children
    )


def parent(path: str) -> str:
    """Path of the enclosing module, empty for the root's children."""
    return path.rpartition(".")[0]


def below(path: str, block: str) -> str:
    """A path as it is within a block around it."""
    return path.removeprefix(f"{block}.")


def child_name(path: str) -> str:
    """Last component of a path."""
    return path.rpartition(".")[2]


def _kind(site: SitePlan) -> tuple[object, ...]:
    return (
        site.operator,
        site.bias,
        site.dtype,
        site.form and site.form_text,
        site.rule,
        site.location,
    )


def _rows(blocks: Sequence[tuple[str, Sequence[SitePlan]]]) -> tuple[Row, ...]:
    """Children by position, which their structure makes the same in every block.

    The members of a list of equal layers have only numbers for names; they share a row.
    """
    path, first = blocks[0]
    positions: dict[tuple[object, ...], list[int]] = {}
    for position, site in enumerate(first):
        name = below(site.name, path)
        # Two weights of one module share its name, so the position tells named children apart.
        numbered = not site.reader and name.isdigit() and split_indices(name)[1]
        key = ("#", *_kind(site)) if numbered else (position,)
        positions.setdefault(key, []).append(position)
    return tuple(
        Row(
            name=fold(below(first[at].name, path) for at in together)[0],
            per_block=len(together),
            sites=tuple(block[at] for _, block in blocks for at in together),
        )
        for together in positions.values()
    )
