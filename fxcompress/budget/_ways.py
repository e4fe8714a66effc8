"""Search within several budgets: dynamic programming over what the duality gap leaves open."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fxcompress.budget._entities import (
    Entity,
    Floats,
    Resource,
    allocation_from,
    entities_of,
    fits,
    shares_of,
)
from fxcompress.budget.problem import Allocation

STATES = 20_000
"""Partial answers that the search keeps at most; those that regret least."""

COMBINED = 5_000
"""Choices of all members of a bundle that the search combines at most."""


@dataclass(frozen=True, eq=False)
class Ways:
    """The choices of an entity, or of a bundle in both of its modes.

    Attributes:
        loss, cost, regret: of every choice (k), (k x u), (k).
        picks: what each choice consists of.
    """

    loss: Floats
    cost: Floats
    regret: Floats
    picks: list[tuple[tuple[Entity, int], ...]]


def searched(
    resources: Sequence[Resource],
    present: Allocation,
    multipliers: Floats,
    bound: float,
    feasible: bool,
) -> Allocation | None:
    """The best answer by dynamic programming; ``present`` if none is better.

    Args:
        present: within all budgets if ``feasible``.
        multipliers: at which no answer loses less than ``bound``.

    Returns:
        None if nothing is within all budgets, as far as was searched.
    """
    prices = multipliers / shares_of(resources)
    dual = sum(_value(each, prices).min() for each in _modes(resources, prices)) - prices.sum()
    allowed = (present.loss - dual) * (1 + 1e-9) + 1e-12 if feasible else math.inf
    ways = _contested(resources, prices, allowed)
    ways.sort(key=lambda each: len(each.loss))
    last = np.zeros(len(resources))
    rest = [last, *np.cumsum([each.cost.min(0) for each in ways][::-1], axis=0)][::-1][1:]
    cost, loss, regret = np.zeros((1, len(resources))), np.zeros(1), np.zeros(1)
    back = []
    for each, least in zip(ways, rest, strict=True):
        k = len(each.loss)
        costs = (cost[:, None] + each.cost).reshape(-1, len(resources))
        losses = (loss[:, None] + each.loss).ravel()
        regrets = (regret[:, None] + each.regret).ravel()
        kept = np.flatnonzero((costs + least <= 1 + 1e-12).all(1) & (regrets <= allowed))
        kept = kept[np.argsort(regrets[kept], kind="stable")[:STATES]]
        kept = kept[_undominated(costs[kept], losses[kept])]
        cost, loss, regret = costs[kept], losses[kept], regrets[kept]
        back.append((kept // k, kept % k))
    for state in np.argsort(loss, kind="stable").tolist():
        if feasible and loss[state] >= present.loss:
            break
        picks: list[tuple[Entity, int]] = []
        place = state
        for each, (parents, taken) in zip(reversed(ways), reversed(back), strict=True):
            picks += each.picks[int(taken[place])]
            place = int(parents[place])
        found = allocation_from(resources[0], present, picks)
        if fits(resources, found):
            return found
    return present if feasible else None


def _value(entity: Entity, prices: Floats) -> Floats:
    return entity.loss + entity.cost @ prices


def _modes(resources: Sequence[Resource], prices: Floats) -> list[Entity]:
    """The entities of the modes that are best at some prices."""
    joint = set()
    singles = {entity.members: entity for entity in entities_of(resources, ())}
    for whole in entities_of(resources, [bundle.name for bundle in resources[0].bundles]):
        if whole.bundle:
            (members,) = (b.members for b in resources[0].bundles if b.name == whole.bundle)
            apart = sum(_value(singles[(name,)], prices).min() for name in members)
            if len(whole.loss) and _value(whole, prices).min() < apart:
                joint.add(whole.bundle)
    return entities_of(resources, joint)


def _contested(resources: Sequence[Resource], prices: Floats, allowed: float) -> list[Ways]:
    """All choices that regret at most ``allowed`` at some prices."""
    singles = {entity.members: entity for entity in entities_of(resources, ())}
    every = [bundle.name for bundle in resources[0].bundles]
    wholes = {e.bundle: e for e in entities_of(resources, every) if e.bundle}
    ways = []
    for bundle in resources[0].bundles:
        own = [singles.pop((name,)) for name in bundle.members]
        near = [_near(each, prices, allowed) for each in own]
        whole = wholes[bundle.name]
        picks: list[tuple[tuple[Entity, int], ...]] = [
            ((whole, at),) for at in range(len(whole.loss))
        ]
        if math.prod(len(places) for places in near) <= COMBINED:
            combined = itertools.product(*near)
            picks += [tuple(zip(own, places, strict=True)) for places in combined]
        else:  # only each one's best, so that at least that is looked at
            picks.append(tuple((e, int(_value(e, prices).argmin())) for e in own))
        ways.append(_ways(picks, prices, allowed))
    for entity in singles.values():
        picks = [((entity, at),) for at in _near(entity, prices, allowed)]
        ways.append(_ways(picks, prices, allowed))
    return ways


def _near(entity: Entity, prices: Floats, allowed: float) -> list[int]:
    value = _value(entity, prices)
    places: list[int] = np.flatnonzero(value <= value.min() + allowed).tolist()
    return places


def _ways(picks: list[tuple[tuple[Entity, int], ...]], prices: Floats, allowed: float) -> Ways:
    loss = np.array([sum(e.loss[at] for e, at in pick) for pick in picks])
    cost = np.array([sum((e.cost[at] for e, at in pick), 0.0) for pick in picks])
    regret = loss + cost @ prices
    regret = regret - regret.min()
    kept = np.flatnonzero(regret <= allowed)
    return Ways(loss[kept], cost[kept], regret[kept], [picks[at] for at in kept])


def _undominated(cost: Floats, loss: Floats) -> NDArray[np.int64]:
    """Places of the partial answers that no other beats in everything (looked for among few)."""
    order = np.lexsort((*cost.T[::-1], loss))
    if len(order) > 3000:
        return np.sort(order)
    kept: list[int] = []
    for at in order.tolist():
        if not kept or not (cost[kept] <= cost[at]).all(1).any():
            kept.append(at)
    return np.sort(np.array(kept, dtype=np.int64))
