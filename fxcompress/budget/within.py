"""Several budgets at once: ``min Σ D_l(x_l)  subject to  Σ c_lu(x_l) <= B_u`` for every u.

Every budget has a multiplier λ_u, 0 for one that does not bind, and the steps are those of one
budget (:mod:`fxcompress.budget.solver`), with the dual maximised by cutting planes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fxcompress.budget._dual import maximum, maximum_of_several
from fxcompress.budget._knapsack import allocation_of, check_budget, knapsack_of
from fxcompress.budget.problem import Allocation, Candidate, Entity, Mode, Option, Resource
from fxcompress.budget.solver import completed
from fxcompress.errors import BudgetError


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
        it is that of :func:`allocate`.

    Raises:
        BudgetError: a budget cannot be met, by itself or together with the others.
        ValueError: names are not distinct, or the problems differ in more than costs.
    """
    _check(resources)
    names = [resource.name for resource in resources]
    for resource in resources:
        alone = knapsack_of([resource.entities], [resource.budget])
        try:
            check_budget(alone)
        except BudgetError as error:
            raise BudgetError(_impossible([resource.name])) from error
    knapsack = knapsack_of([r.entities for r in resources], [r.budget for r in resources])
    dual = maximum(knapsack) if len(resources) == 1 else maximum_of_several(knapsack)
    picks = None if dual is None else completed(knapsack, dual)
    if dual is None or picks is None:
        raise BudgetError(_impossible(names))
    found = allocation_of(
        resources[0].entities, knapsack, picks, multiplier=dual.prices[0], bound=dual.bound
    )
    costs = {name: knapsack.cost(picks, at) for at, name in enumerate(names)}
    return Together(found, costs, dict(zip(names, dual.prices, strict=True)), found.bound)


def _check(resources: Sequence[Resource]) -> None:
    names = [resource.name for resource in resources]
    if len(set(names)) < len(names) or not names:
        raise ValueError(f"resources need distinct names, not {names}")
    first = resources[0]
    for resource in resources[1:]:
        for one, other in zip(first.entities, resource.entities, strict=True):
            if not _alike(one, other):
                raise ValueError(
                    f"{other.name!r} in {resource.name!r} differs from {one.name!r} in "
                    f"{first.name!r} in more than its costs"
                )


def _alike(one: Entity | Mode | Option, other: Entity | Mode | Option) -> bool:
    """Whether two things differ in nothing but their costs."""
    if isinstance(one, Option) and isinstance(other, Option):
        same = one.form == other.form and np.array_equal(one.ranks, other.ranks)
        return same and np.array_equal(one.loss, other.loss)
    if isinstance(one, Option) or isinstance(other, Option) or one.name != other.name:
        return False
    if isinstance(one, Mode) and isinstance(other, Mode) and one.loss != other.loss:
        return False
    parts, others = _parts(one), _parts(other)
    return len(parts) == len(others) and all(map(_alike, parts, others))


def _parts(one: Entity | Mode) -> Sequence[Entity | Mode | Option]:
    if isinstance(one, Candidate):
        return one.options
    return one.members if isinstance(one, Mode) else one.modes


def _impossible(names: Sequence[str]) -> str:
    together = f"the budgets of {', '.join(names)} cannot be met together"
    return (
        f"{together if len(names) > 1 else f'the budget of {names[0]} cannot be met'}: raise keep, "
        "allow lower ranks (min_rank, multiple_of) or match more operators"
    )
