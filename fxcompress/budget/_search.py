"""Search for a better allocation among the few choices that one can contain.

It is dynamic programming over *partial allocations*: one choice for each of the sites seen so
far.  Of these only the undominated are kept, and only those that can still lead to something
better than the allocation at hand.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from fxcompress.budget._frontier import Floats, Frontier, total_cost, total_loss

# Partial allocations that a search may look at, shared out among its sites: about a second.
SEARCH_LIMIT = 1 << 22


class Partials:
    """Undominated partial allocations, by cost: each costlier one loses less than all before.

    Attributes:
        costs, losses: shape ``(k,)``, relative to whatever the caller subtracts.
        regrets: shape ``(k,)``: how much worse than the best they are at λ, in nats.
    """

    def __init__(self) -> None:
        self.costs, self.losses, self.regrets = np.zeros(1), np.zeros(1), np.zeros(1)
        self._steps: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []

    def extend(
        self,
        choices: NDArray[np.int64],
        cost: Floats,
        loss: Floats,
        regret: Floats,
        *,
        allowed: float,
        limit: int,
    ) -> None:
        """Give one more site each of its choices in turn.

        Args:
            choices, cost, loss, regret: shape ``(c,)``, of the site.
            allowed: partial allocations that regret more are dropped, in nats.
            limit: how many may be looked at; those of least regret are.
        """
        costs, losses, regrets = self.costs, self.losses, self.regrets
        room = max(1, limit // choices.size)
        if costs.size > room:
            kept = np.sort(np.argsort(regrets, kind="stable")[:room])
            costs, losses, regrets = costs[kept], losses[kept], regrets[kept]
        else:
            kept = np.arange(costs.size)
        costs = np.add.outer(costs, cost).ravel()
        losses = np.add.outer(losses, loss).ravel()
        regrets = np.add.outer(regrets, regret).ravel()
        # By cost, each costlier one better than all before; none that regrets too much.
        order = np.flatnonzero(regrets <= allowed)
        order = order[np.lexsort((losses[order], costs[order]))]
        least = np.minimum.accumulate(losses[order])
        order = order[np.append(True, least[1:] < least[:-1])]
        self.costs, self.losses, self.regrets = costs[order], losses[order], regrets[order]
        self._steps.append((kept[order // choices.size], choices[order % choices.size]))

    def choices(self, state: int) -> Iterator[int]:
        """The choices of one partial allocation, the last site first."""
        for parents, chosen in reversed(self._steps):
            yield int(chosen[state])
            state = int(parents[state])


def contested(
    site: Frontier, multiplier: float, allowed: float
) -> tuple[NDArray[np.int64], Floats]:
    """The choices that regret at most ``allowed``, and their regrets, in nats.

    Regret: how much worse than the site's best a choice is at λ.  The loss of an allocation
    within the budget is at least the dual value plus its regrets.
    """
    value = site.loss + multiplier * site.cost
    regret = np.append(value, multiplier * site.top_cost)
    regret -= regret.min()
    choices = np.flatnonzero(regret <= allowed)
    return choices, regret[choices]


def allowed_regret(present: float, bound: float) -> float:
    """What an allocation better than the present one can regret; the margin is for rounding."""
    return max(present - bound, 0.0) * (1.0 + 1e-9)


def search(
    sites: Sequence[Frontier],
    picks: Sequence[int],
    budget: float,
    multiplier: float,
    *,
    present: float,
    bound: float,
) -> list[int] | None:
    """Look for a better allocation.

    Args:
        picks: choices to start from.
        multiplier: λ of the dual, in nats per unit of cost.
        present: the loss that is to be beaten, in nats.
        bound: the dual value at λ, in nats.

    Returns:
        Choices with a loss below ``present``, within the budget; None if none were found.
    """
    allowed = allowed_regret(present, bound)
    found: list[tuple[int, NDArray[np.int64], Floats]] = []
    for at, site in enumerate(sites):
        choices, regret = contested(site, multiplier, allowed)
        if choices.size > 1 or choices[0] != picks[at]:
            found.append((at, choices, regret))
    # Small ones first, while the list of partial allocations grows.
    found.sort(key=lambda entry: entry[1].size)

    partials = Partials()  # relative to `picks`
    for at, choices, regret in found:
        site, pick = sites[at], picks[at]
        listed = choices.tolist()
        cost = np.array([site.cost_at(choice) for choice in listed]) - site.cost_at(pick)
        loss = np.array([site.loss_at(choice) for choice in listed]) - site.loss_at(pick)
        limit = SEARCH_LIMIT // len(found)
        partials.extend(choices, cost, loss, regret, allowed=allowed, limit=limit)

    # The costliest that fits is the best: losses fall along the list.
    left = math.fsum([budget, -total_cost(sites, picks)]) + 4.0 * math.ulp(budget)
    for end in range(int(np.searchsorted(partials.costs, left, side="right")) - 1, -1, -1):
        better = list(picks)
        for (at, _, _), choice in zip(reversed(found), partials.choices(end), strict=True):
            better[at] = choice
        if total_loss(sites, better) >= present:
            return None
        if total_cost(sites, better) <= budget:
            return better
    return None
