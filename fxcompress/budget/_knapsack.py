"""A budget problem as the multiple-choice knapsack that the allocators see.

Entities have ways, of which one is taken, and each way has slots, which are given one choice each.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from fxcompress.budget._slots import Slot, slots_of
from fxcompress.budget.problem import Allocation, Candidate, Choice, Entity, Mode
from fxcompress.errors import BudgetError

Pick: TypeAlias = tuple[int, tuple[int, ...]]
"""What an entity takes: one of its ways, and a choice for each slot of that."""


@dataclass(frozen=True, eq=False)
class Way:
    """A mode, or the only way to treat a candidate or group.

    Attributes:
        loss: of the mode itself, in nats.
        cost: of the mode itself, in the unit of each budget.
        slots: what is left to choose.
    """

    loss: float
    cost: tuple[float, ...]
    slots: tuple[Slot, ...]

    def losses(self, choices: Sequence[int]) -> Iterator[float]:
        """Losses that choices for all slots consist of, in nats."""
        yield self.loss
        for slot, choice in zip(self.slots, choices, strict=True):
            yield slot.loss_at(choice)

    def costs(self, choices: Sequence[int], budget: int = 0) -> Iterator[float]:
        """Costs that choices for all slots consist of, in the unit of one budget."""
        yield self.cost[budget]
        for slot, choice in zip(self.slots, choices, strict=True):
            yield from slot.costs(choice, budget)


Ways: TypeAlias = tuple[Way, ...]
"""The ways of one entity: alternatives have several, of which one is taken."""


@dataclass(frozen=True, eq=False)
class Knapsack:
    """Entities, groups merged, and the budgets they share.

    Attributes:
        entities: the ways of each.
        budgets: limits on the total costs.
    """

    entities: tuple[Ways, ...]
    budgets: tuple[float, ...]

    def costs(self, picks: Sequence[Pick], budget: int = 0) -> Iterator[float]:
        """Costs that picks for all entities consist of, in the unit of one budget."""
        for ways, (way, choices) in zip(self.entities, picks, strict=True):
            yield from ways[way].costs(choices, budget)

    def cost(self, picks: Sequence[Pick], budget: int = 0) -> float:
        """Total cost, correctly rounded: the number that a budget limits."""
        return math.fsum(self.costs(picks, budget))

    def loss(self, picks: Sequence[Pick]) -> float:
        """Total loss in nats, correctly rounded."""
        return math.fsum(
            loss
            for ways, (way, choices) in zip(self.entities, picks, strict=True)
            for loss in ways[way].losses(choices)
        )

    def fits(self, picks: Sequence[Pick]) -> bool:
        """Whether all budgets are met."""
        return all(self.cost(picks, at) <= budget for at, budget in enumerate(self.budgets))


def knapsack_of(problems: Sequence[Sequence[Entity]], budgets: Sequence[float]) -> Knapsack:
    """Check a problem, merge its groups, and drop what is dominated.

    Args:
        problems: for every budget the entities with their costs in its unit.
        budgets: the limits.

    Raises:
        BudgetError: if the members of a group have no (form, rank) in common.
        ValueError: if two candidates or two alternatives have one name, or alternatives and another
            entity have members of one group.
    """
    _check_names(problems[0])
    _check_groups(problems[0])
    entities: list[Ways] = []
    alone = []
    for each in zip(*problems, strict=True):
        candidates = tuple(entity for entity in each if isinstance(entity, Candidate))
        if candidates:
            alone.append(candidates)
        else:
            # The modes of alternatives, each as it is for every budget.
            modes = zip(*(e.modes for e in each if not isinstance(e, Candidate)), strict=True)
            entities.append(tuple(map(_way, modes)))
    free = (0.0,) * len(problems)
    entities += [(Way(0.0, free, (slot,)),) for slot in slots_of(alone)]
    return Knapsack(tuple(entities), tuple(map(float, budgets)))


def _way(modes: tuple[Mode, ...]) -> Way:
    slots = slots_of(list(zip(*(mode.members for mode in modes), strict=True)))
    return Way(modes[0].loss, tuple(mode.cost for mode in modes), tuple(slots))


def _check_names(entities: Sequence[Entity]) -> None:
    owner: dict[str, str] = {}
    alternatives: set[str] = set()
    for entity in entities:
        if isinstance(entity, Candidate):
            if entity.name in owner:
                raise ValueError(f"two candidates have the name {entity.name!r}")
            owner[entity.name] = ""
            continue
        if entity.name in alternatives:
            raise ValueError(f"two alternatives have the name {entity.name!r}")
        alternatives.add(entity.name)
        for name in {member.name: None for mode in entity.modes for member in mode.members}:
            if name in owner:
                where = f"in alternatives {owner[name]!r}" if owner[name] else "a candidate"
                raise ValueError(
                    f"alternatives {entity.name!r}: their member {name!r} is {where} already"
                )
            owner[name] = entity.name


def _check_groups(entities: Sequence[Entity]) -> None:
    owner: dict[str, str] = {}
    for entity in entities:
        if isinstance(entity, Candidate):
            groups, name = [entity.group], ""
        else:
            groups, name = [m.group for mode in entity.modes for m in mode.members], entity.name
        for group in groups:
            if group is not None and owner.setdefault(group, name) != name:
                raise ValueError(
                    f"group {group!r} has members in {entity.name!r} and elsewhere: let all of "
                    "them be candidates by themselves, or be in the same alternatives"
                )


def best_picks(knapsack: Knapsack, prices: Sequence[float]) -> list[Pick]:
    """What every entity takes at λ: the least ``loss + λ·cost``, then the least cost."""
    return [best_pick(ways, prices) for ways in knapsack.entities]


def best_pick(ways: Ways, prices: Sequence[float]) -> Pick:
    """What one entity takes at λ."""

    def rank(loss: float, costs: tuple[float, ...]) -> tuple[float, float]:
        priced = math.fsum(price * cost for price, cost in zip(prices, costs, strict=True))
        return loss + priced, priced

    return _pick(ways, lambda slot: slot.best(prices), rank)


def cheapest_picks(knapsack: Knapsack) -> list[Pick]:
    """What costs least, then loses least; for one budget only."""
    return [_pick(w, lambda _: 0, lambda loss, cost: (cost[0], loss)) for w in knapsack.entities]


def top_picks(knapsack: Knapsack) -> list[Pick]:
    """What loses least, then costs least; for one budget only."""
    return [
        _pick(w, lambda slot: slot.last, lambda loss, cost: (loss, cost[0]))
        for w in knapsack.entities
    ]


def _pick(
    ways: Ways,
    choose: Callable[[Slot], int],
    rank: Callable[[float, tuple[float, ...]], tuple[float, float]],
) -> Pick:
    """The first way for which the difference of loss and costs to no other has a rank below 0."""
    found = [(at, tuple(map(choose, way.slots))) for at, way in enumerate(ways)]
    best = found[0]
    for other in found[1:]:
        loss, costs = beyond(ways, other, best)
        if rank(loss, costs) < (0.0, 0.0):
            best = other
    return best


def beyond(ways: Ways, one: Pick, other: Pick) -> tuple[float, tuple[float, ...]]:
    """Loss and costs of one pick minus those of another, correctly rounded."""
    here, there = ways[one[0]], ways[other[0]]
    loss = math.fsum([*here.losses(one[1]), *(-x for x in there.losses(other[1]))])
    return loss, tuple(
        math.fsum([*here.costs(one[1], at), *(-x for x in there.costs(other[1], at))])
        for at in range(len(here.cost))
    )


def check_budget(knapsack: Knapsack) -> None:
    """Raise BudgetError for a budget that is malformed, or below what the cheapest choices cost."""
    (budget,) = knapsack.budgets
    if not 0.0 <= budget < math.inf:
        raise BudgetError(f"the budget must be finite and not negative, not {budget}")
    least = knapsack.cost(cheapest_picks(knapsack))
    if least > budget:
        raise BudgetError(
            f"the smallest total cost these rules allow is {_number(least)}, the budget is "
            f"{_number(budget)}; raise the budget, or allow lower ranks (min_rank, multiple_of) "
            "or match more operators"
        )


def least_cost(entities: Sequence[Entity]) -> float:
    """The smallest budget that can be met.

    Raises:
        BudgetError: if it is not finite, or the members of a group have no (form, rank) in common.
        ValueError: as :func:`fxcompress.budget.allocate`.
    """
    knapsack = knapsack_of([entities], [sys.float_info.max])
    check_budget(knapsack)
    return knapsack.cost(cheapest_picks(knapsack))


def allocation_of(
    entities: Sequence[Entity],
    knapsack: Knapsack,
    picks: Sequence[Pick],
    *,
    multiplier: float,
    bound: float,
) -> Allocation:
    """The answer, with the entities in their own order, and costs in the unit of the first budget.

    Args:
        entities: as given for the first budget.
    """
    found: dict[str, Choice] = {}
    for ways, (way, choices) in zip(knapsack.entities, picks, strict=True):
        for slot, choice in zip(ways[way].slots, choices, strict=True):
            found.update(slot.choices(choice))
    # Alternatives come first in the knapsack, in their order.
    several = (entity.name for entity in entities if not isinstance(entity, Candidate))
    taken = {name: way for name, (way, _) in zip(several, picks, strict=False)}
    ordered: dict[str, Choice] = {}
    modes: dict[str, str] = {}
    losses: list[float] = []
    for entity in entities:
        if isinstance(entity, Candidate):
            ordered[entity.name] = found[entity.name]
        else:
            mode = entity.modes[taken[entity.name]]
            modes[entity.name] = mode.name
            losses.append(mode.loss)
            ordered.update((member.name, found[member.name]) for member in mode.members)
    loss = math.fsum([*losses, *(choice.loss for choice in ordered.values())])
    return Allocation(
        choices=ordered,
        multiplier=multiplier,
        loss=loss,
        cost=knapsack.cost(picks),
        budget=knapsack.budgets[0],
        # Mathematically the bound lies in between; only rounding can put it outside.
        bound=min(max(bound, 0.0), loss),
        modes=modes,
    )


def _number(value: float) -> str:
    """A cost in full: integers without exponent, other numbers so that they read back."""
    return str(int(value)) if value.is_integer() and value < 1e18 else repr(value)
