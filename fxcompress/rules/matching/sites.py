"""The sites of a graph, indexed for matching by operator."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from operator import attrgetter

from fxcompress.graph.operator import Operator

NOT_CALLS = frozenset({"input", "parameter", "output"})
"""Nodes of the graph that are no operators to a rule."""


@dataclass(frozen=True)
class WeightCalls:
    """One weight parameter with the calls of one operator that read it.

    Attributes:
        key: the weight's name; for an operator without weight, a name of its own.
        order: position of the first call in the graph.
        operators: the calls, in graph order. They are of one operator, except where a rule
            asks for several operators and they share the weight.
        signature: equal for sites of equal operators with equal attributes.
        tied: calls of other operators or other modules that read the same weight.
        path: module path of the first call.
        lone: True for one call of a weight that nothing else reads, as most are.
    """

    key: str
    order: int
    operators: tuple[Operator, ...]
    signature: int
    tied: tuple[Operator, ...]
    path: str = field(init=False)
    lone: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", self.operators[0].path)
        object.__setattr__(self, "lone", len(self.operators) == 1 and not self.tied)

    @property
    def first(self) -> Operator:
        """The call that stands for the site in messages."""
        return self.operators[0]

    @property
    def ties(self) -> str:
        """What else reads the weight: ``"embed_tokens (embedding)"``."""
        names = dict.fromkeys(f"{other.path or other.name} ({other.op})" for other in self.tied)
        return ", ".join(names)

    def only(self, ops: Collection[str]) -> WeightCalls | None:
        """The site with its calls of some operators only; None if it has none."""
        if all(operator.op in ops for operator in self.operators):
            return self
        calls = tuple(operator for operator in self.operators if operator.op in ops)
        return replace(self, operators=calls) if calls else None


@dataclass(frozen=True)
class SiteIndex:
    """The sites of a graph.

    Attributes:
        by_op: canonical operator name -> its sites, in graph order.
        orders: name of an operator -> its position in the graph.
    """

    by_op: Mapping[str, tuple[WeightCalls, ...]]
    orders: Mapping[str, int]

    @classmethod
    def of(cls, operators: Sequence[Operator]) -> SiteIndex:
        """Index a graph, in one pass over its operators."""
        readers: dict[str, list[Operator]] = {}
        calls: dict[str, dict[str, list[Operator]]] = {}
        orders: dict[str, int] = {}
        for order, operator in enumerate(operators):
            if operator.op in NOT_CALLS:
                continue
            key = operator.weight if operator.weight is not None else f"<{operator.name}>"
            orders[operator.name] = order
            readers.setdefault(key, []).append(operator)
            calls.setdefault(operator.op, {}).setdefault(key, []).append(operator)
        signatures: dict[str, int] = {}
        by_op = {
            op: tuple(
                WeightCalls(
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
        return cls(by_op, orders)

    @cached_property
    def homes(self) -> Mapping[int, WeightCalls]:
        """Position of an operator -> the site that it is a call of."""
        return {
            self.orders[call.name]: site
            for sites in self.by_op.values()
            for site in sites
            for call in site.operators
        }

    def call(self, position: int) -> WeightCalls:
        """One operator as a site of its own, which it is unless it is one of several calls."""
        site = self.homes[position]
        if len(site.operators) == 1:
            return site
        operator = next(call for call in site.operators if self.orders[call.name] == position)
        # The calls of a site need not be alike; minus a position is a signature of its own.
        return replace(site, order=position, operators=(operator,), signature=-1 - position)

    def calls_of(self, ops: Sequence[str]) -> Sequence[WeightCalls]:
        """The calls of several operators, each as a site of its own, in graph order."""
        if len(ops) == 1:
            return self.calls.get(ops[0], ())
        found = [site for op in dict.fromkeys(ops) for site in self.calls.get(op, ())]
        return sorted(found, key=attrgetter("order"))

    @cached_property
    def calls(self) -> Mapping[str, Sequence[WeightCalls]]:
        """Canonical operator name -> its calls, each as a site of its own, in graph order."""
        return {
            op: sorted(
                (self.call(self.orders[call.name]) for site in sites for call in site.operators),
                key=attrgetter("order"),
            )
            for op, sites in self.by_op.items()
        }

    def candidates(self, ops: Sequence[str]) -> tuple[WeightCalls, ...]:
        """The sites of several operators in graph order; one site per weight."""
        if len(ops) == 1:
            return self.by_op.get(ops[0], ())
        found = [site for op in dict.fromkeys(ops) for site in self.by_op.get(op, ())]
        merged: dict[str, WeightCalls] = {}
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
