"""The sites of a graph, indexed for matching by operator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from fxcompress.graph.operator import Operator

_NOT_CALLS = frozenset({"input", "parameter", "output"})


@dataclass(frozen=True)
class Site:
    """One weight parameter with the calls of one operator that read it.

    Attributes:
        key: the weight's name; for an operator without weight, a name of its own.
        order: position of the first call in the graph.
        operators: the calls, in graph order. They are of one operator, except where a rule
            asks for several operators and they share the weight.
        signature: equal for sites of equal operators with equal attributes.
        tied: calls of other operators or other modules that read the same weight.
        path: module path of the first call.
    """

    key: str
    order: int
    operators: tuple[Operator, ...]
    signature: int
    tied: tuple[Operator, ...]
    path: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", self.operators[0].path)

    @property
    def first(self) -> Operator:
        """The call that stands for the site in messages."""
        return self.operators[0]

    @property
    def ties(self) -> str:
        """What else reads the weight: ``"embed_tokens (embedding)"``."""
        names = dict.fromkeys(f"{other.path or other.name} ({other.op})" for other in self.tied)
        return ", ".join(names)

    def only(self, op: str) -> Site | None:
        """The site with its calls of one operator only; None if it has none."""
        if all(operator.op == op for operator in self.operators):
            return self
        calls = tuple(operator for operator in self.operators if operator.op == op)
        return replace(self, operators=calls) if calls else None


@dataclass(frozen=True)
class SiteIndex:
    """The sites of a graph.

    Attributes:
        by_op: canonical operator name -> its sites, in graph order.
    """

    by_op: Mapping[str, tuple[Site, ...]]

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
            readers.setdefault(key, []).append(operator)
            calls.setdefault(operator.op, {}).setdefault(key, []).append(operator)
        signatures: dict[str, int] = {}
        by_op = {
            op: tuple(
                Site(
                    key,
                    orders[site[0].name],
                    tuple(site),
                    signatures.setdefault(_description(op, site), len(signatures)),
                    _tied(site[0], readers[key]),
                )
                for key, site in sites.items()
            )
            for op, sites in calls.items()
        }
        return cls(by_op)

    def candidates(self, ops: Sequence[str]) -> tuple[Site, ...]:
        """The sites of several operators in graph order; one site per weight."""
        if len(ops) == 1:
            return self.by_op.get(ops[0], ())
        found = [site for op in ops for site in self.by_op.get(op, ())]
        merged: dict[str, Site] = {}
        for site in sorted(found, key=lambda site: site.order):
            known = merged.get(site.key)
            if known is None:
                merged[site.key] = site
            else:
                # No other site has these calls together: minus its order is a signature of its own.
                calls = known.operators + site.operators
                merged[site.key] = replace(known, operators=calls, signature=-1 - known.order)
        return tuple(merged.values())


def _description(op: str, calls: Sequence[Operator]) -> str:
    # repr tells 1 from True and from 1.0, which are equal as keys.
    return f"{op} {[dict(call.attributes) for call in calls]}"


def _tied(first: Operator, readers: Sequence[Operator]) -> tuple[Operator, ...]:
    # A module called twice is one use of its weight; two modules that share it are a tie.
    return tuple(reader for reader in readers if reader.op != first.op or reader.path != first.path)
