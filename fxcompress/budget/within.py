"""Several budgets at once: ``min Σ D_l(x_l)  subject to  Σ c_lu(x_l) <= B_u`` for every u.

For weights w >= 0 that add up to 1, whatever meets all budgets also meets the one budget
``Σ_l Σ_u w_u c_lu / B_u <= 1`` (a surrogate constraint, Glover 1975), which :func:`allocate` solves
nearly exactly; its lower bound is one for the whole problem, and at least as good as the Lagrangian
one of the same weights.  So:

1. *Weights.*  Starting from equal ones, the weight of a budget that is exceeded is raised and
   that of one with room is lowered, by factors that shrink when the direction changes.  The best
   bound and all answers are kept.
2. *Repair.*  An answer that exceeds a budget is moved to cheaper choices, always the one that
   costs least loss for the excess it removes, until it fits.
3. *Fill.*  What room is left goes to better choices, always the one with the largest loss reduction
   for the room it takes, until no single move fits; then pairs of moves, one up and one down, that
   lower the loss together are made while there are any.
4. *Search.*  An answer better than the present one, of gap ``loss - bound``, can give no site a
   choice that is worse by more than the gap than its best at the multipliers.  What is left is
   searched by dynamic programming over undominated partial answers, both modes of a bundle
   included: exact unless they outgrow :data:`fxcompress.budget._ways.STATES`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np

from fxcompress.budget._entities import (
    Floats,
    Resource,
    cost_of,
    costs_of,
    fits,
    joint_members,
    shares_of,
)
from fxcompress.budget._moves import Moves
from fxcompress.budget._ways import searched
from fxcompress.budget.problem import Allocation, Bundle, Candidate, Option
from fxcompress.budget.solver import allocate
from fxcompress.errors import BudgetError

ROUNDS = 30
"""Weights that are tried at most."""


@dataclass(frozen=True)
class Together:
    """An allocation within several budgets.

    Attributes:
        allocation: the choices; costs, budget and multiplier are those of the first resource.
        costs: total cost by resource, never above its budget.
        multipliers: λ_u in nats per unit of cost, by resource; 0 for one that does not bind.
        bound: no allocation within all budgets loses less.
    """

    allocation: Allocation
    costs: Mapping[str, float]
    multipliers: Mapping[str, float]
    bound: float


def allocate_within(resources: Sequence[Resource]) -> Together:
    """Choose form and rank of every site so that the total loss is low within all budgets.

    Args:
        resources: at least one, with distinct names.

    Returns:
        The allocation, and how far from the least loss it can be (``bound``).  With one resource
        it is that of :func:`allocate`, and so it is where that meets the other budgets, too.

    Raises:
        BudgetError: a budget cannot be met, by itself or together with the others.
        ValueError: names are not distinct, or the problems differ in more than costs.
    """
    _check(resources)
    tried: list[tuple[Allocation, Floats]] = []
    bound, multipliers = 0.0, np.zeros(len(resources))
    for at in range(len(resources)):  # whoever binds alone decides alone
        weights = np.zeros(len(resources))
        weights[at] = 1.0
        found = _surrogate(resources, weights)
        if found.bound >= bound:
            bound, multipliers = found.bound, _multipliers(resources, weights, found)
        used = used_by(resources, found)
        if fits(resources, found):
            return _result(resources, found, found.bound, _multipliers(resources, weights, found))
        tried.append((found, used))
    weights, steps, last = np.full(len(resources), 1.0), np.full(len(resources), 1.0), None
    for _ in range(ROUNDS):
        found = _surrogate(resources, weights / weights.sum())
        used = used_by(resources, found)
        tried.append((found, used))
        if found.bound > bound:
            bound = found.bound
            multipliers = _multipliers(resources, weights / weights.sum(), found)
        sign = np.sign(used - 1.0)
        if last is not None:
            steps = np.minimum(steps * np.where(sign == last, 1.2, 0.5), 2.0)
        last = sign
        weights = weights * np.exp(steps * sign * np.minimum(1.0, np.abs(used - 1.0) * 10))
        weights = np.maximum(weights / weights.max(), 1e-9)
        if float(steps.max()) < 1e-4:
            break
    best: Allocation | None = None
    # Those that exceed least come close to the optimum once repaired.
    tried.sort(key=lambda pair: (float(np.maximum(pair[1] - 1.0, 0).sum()), pair[0].loss))
    for found, _ in tried[:4]:
        moved = Moves(resources, found).settled()
        if moved is not None and (best is None or moved.loss < best.loss):
            best = moved
    best = searched(resources, best or tried[0][0], multipliers, bound, best is not None)
    if best is None:
        raise BudgetError(_impossible([resource.name for resource in resources]))
    return _result(resources, best, min(bound, best.loss), multipliers)


def _check(resources: Sequence[Resource]) -> None:
    names = [resource.name for resource in resources]
    if len(set(names)) < len(names) or not names:
        raise ValueError(f"resources need distinct names, not {names}")
    first = resources[0]
    for resource in resources[1:]:
        pairs: list[tuple[Candidate | Bundle, Candidate | Bundle]] = [
            *zip(first.candidates, resource.candidates, strict=True),
            *zip(first.bundles, resource.bundles, strict=True),
        ]
        for one, other in pairs:
            same = one.name == other.name and len(one.options) == len(other.options)
            if not same or any(
                a.form != b.form
                or not np.array_equal(a.ranks, b.ranks)
                or not np.array_equal(a.loss, b.loss)
                for a, b in zip(one.options, other.options, strict=True)
            ):
                raise ValueError(
                    f"{other.name!r} in {resource.name!r} differs from {one.name!r} in "
                    f"{first.name!r} in more than its costs"
                )


def _surrogate(resources: Sequence[Resource], weights: Floats) -> Allocation:
    """The answer for the weighted sum of all budgets.

    Raises:
        BudgetError: what costs least in that sum exceeds it, so that no answer meets them all.
    """
    scales = (weights * shares_of(resources)).tolist()

    def mixed(options: Sequence[tuple[Option, ...]]) -> tuple[Option, ...]:
        return tuple(
            replace(each[0], cost=sum(s * o.cost for s, o in zip(scales, each, strict=True)))
            for each in zip(*options, strict=True)
        )

    candidates = [
        replace(
            each[0],
            dense_cost=math.fsum(s * c.dense_cost for s, c in zip(scales, each, strict=True)),
            options=mixed([c.options for c in each]),
        )
        for each in zip(*(r.candidates for r in resources), strict=True)
    ]
    bundles = [
        replace(each[0], options=mixed([b.options for b in each]))
        for each in zip(*(r.bundles for r in resources), strict=True)
    ]
    try:
        return allocate(candidates, float(weights.sum()), bundles)
    except BudgetError as error:
        used = [r.name for r, w in zip(resources, weights, strict=True) if w > 0]
        raise BudgetError(_impossible(used)) from error


def _impossible(names: Sequence[str]) -> str:
    together = f"the budgets of {', '.join(names)} cannot be met together"
    return (
        f"{together if len(names) > 1 else f'the budget of {names[0]} cannot be met'}: raise keep, "
        "allow lower ranks (min_rank, multiple_of) or match more operators"
    )


def _multipliers(resources: Sequence[Resource], weights: Floats, found: Allocation) -> Floats:
    return found.multiplier * weights * shares_of(resources)


def used_by(resources: Sequence[Resource], found: Allocation) -> Floats:
    """The share of each budget that is used."""
    totals = [math.fsum(costs_of(resource, found)) for resource in resources]
    return cast("Floats", np.array(totals) * shares_of(resources))


def _result(
    resources: Sequence[Resource], found: Allocation, bound: float, multipliers: Floats
) -> Together:
    first = resources[0]
    names = {candidate.name: candidate for candidate in first.candidates}
    together = joint_members(first, found)
    wholes = {bundle.name: bundle for bundle in first.bundles}
    choices = {
        name: replace(choice, cost=0.0)
        if name in together
        else replace(choice, cost=cost_of(names[name].dense_cost, names[name].options, choice))
        for name, choice in found.choices.items()
    }
    joint = {
        name: replace(choice, cost=cost_of(math.nan, wholes[name].options, choice))
        for name, choice in found.joint.items()
    }
    costs = {resource.name: math.fsum(costs_of(resource, found)) for resource in resources}
    by_name = dict(zip(costs, multipliers.tolist(), strict=True))
    allocation = Allocation(
        choices, by_name[first.name], found.loss, costs[first.name], first.budget, bound, joint
    )
    return Together(allocation, costs, by_name, bound)
