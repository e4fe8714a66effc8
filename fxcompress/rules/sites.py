"""The sites of a graph, indexed for matching: by operator, and by weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fxcompress.graph.operator import Operator

_NOT_CALLS = frozenset({"input", "parameter", "output"})


@dataclass(frozen=True)
class Site:
    """One weight parameter with all the calls of one operator that read it.

    Attributes:
        key: the weight's name; for an operator without weight, a name of its own.
        order: position of the first call in the graph.
        operators: the calls, in graph order.
        tied: what else reads the weight (``"embed_tokens (embedding)"``); empty if nothing.
    """

    key: str
    order: int
    operators: tuple[Operator, ...]
    tied: tuple[str, ...]

    @property
    def first(self) -> Operator:
        """The call that stands for the site in messages."""
        return self.operators[0]


@dataclass(frozen=True)
class SiteIndex:
    """The sites of a graph.

    Attributes:
        by_op: canonical operator name -> its sites, in graph order.
        readers: weight name -> every call that reads it.
    """

    by_op: Mapping[str, tuple[Site, ...]]
    readers: Mapping[str, tuple[Operator, ...]]

    @classmethod
    def of(cls, operators: Sequence[Operator]) -> SiteIndex:
        """Index a graph, in one pass over its operators."""
        readers: dict[str, list[Operator]] = {}
        calls: dict[str, dict[str, list[Operator]]] = {}
        orders: dict[str, int] = {}
        for order, operator in enumerate(operators):
            if operator.op in _NOT_CALLS:
                continue
            key = operator.weight if operator.weight is not None else f"<{operator.name}>"
            orders[operator.name] = order
            if operator.weight is not None:
                readers.setdefault(key, []).append(operator)
            calls.setdefault(operator.op, {}).setdefault(key, []).append(operator)
        by_op = {
            op: tuple(
                Site(key, orders[site[0].name], tuple(site), _tied(site, readers.get(key, site)))
                for key, site in sites.items()
            )
            for op, sites in calls.items()
        }
        return cls(by_op, {key: tuple(found) for key, found in readers.items()})

    def candidates(self, ops: Sequence[str]) -> tuple[Site, ...]:
        """The sites of several operators in graph order; one site per weight."""
        if len(ops) == 1:
            return self.by_op.get(ops[0], ())
        merged: dict[str, Site] = {}
        for site in sorted(
            (site for op in ops for site in self.by_op.get(op, ())), key=lambda site: site.order
        ):
            known = merged.get(site.key)
            if known is None:
                merged[site.key] = site
            else:
                calls = known.operators + site.operators
                merged[site.key] = Site(site.key, known.order, calls, known.tied)
        return tuple(merged.values())


def _tied(site: Sequence[Operator], readers: Sequence[Operator]) -> tuple[str, ...]:
    # A module called twice is one use of its weight; two modules that share it are a tie.
    first = site[0]
    others = {
        f"{reader.path or reader.name} ({reader.op})": None
        for reader in readers
        if reader.op != first.op or reader.path != first.path
    }
    return tuple(others)
