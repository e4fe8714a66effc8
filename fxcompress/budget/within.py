"""Several budgets at once: ``min Σ D_l(x_l)  subject to  Σ c_lu(x_l) <= B_u`` for every u.

Whoever binds alone decides alone: the answer within one budget, if it meets all others, is the
answer.  Otherwise every budget has a multiplier λ_u, and the steps are those of one budget
(:mod:`fxcompress.budget.solver`), with the dual maximised by cutting planes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fxcompress.budget._dual import maximum_of_several
from fxcompress.budget._instance import allocation_of, instance_of
from fxcompress.budget.problem import Allocation, Candidate, Choice, Entity, Mode, Option, Resource
from fxcompress.budget.solver import allocate, completed
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
        it is that of :func:`allocate`, and so it is where that meets the other budgets, too.

    Raises:
        BudgetError: a budget cannot be met, by itself or together with the others.
        ValueError: names are not distinct, or the problems differ in more than costs.
    """
    _check(resources)
    names = [resource.name for resource in resources]
    bound = 0.0
    for at, resource in enumerate(resources):
        try:
            found = allocate(resource.entities, resource.budget)
        except BudgetError as error:
            raise BudgetError(_impossible([resource.name])) from error
        bound = max(bound, found.bound)
        if all(_priced(each, found).cost <= each.budget for each in resources):
            prices = [0.0] * len(resources)
            prices[at] = found.multiplier
            return _result(resources, found, prices, found.bound)
    instance = instance_of([r.entities for r in resources], [r.budget for r in resources])
    dual = maximum_of_several(instance)
    picks = None if dual is None else completed(instance, dual)
    if dual is None or picks is None:
        raise BudgetError(_impossible(names))
    bound = max(bound, dual.bound)
    found = allocation_of(
        resources[0].entities, instance, picks, multiplier=dual.prices[0], bound=bound
    )
    return _result(resources, found, dual.prices, found.bound)


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


def _priced(resource: Resource, found: Allocation) -> Allocation:
    """An allocation with the costs of a resource."""
    costs = []
    choices: dict[str, Choice] = {}
    for entity in resource.entities:
        members: Sequence[Candidate] = ()
        if isinstance(entity, Candidate):
            members = (entity,)
        else:
            (mode,) = (each for each in entity.modes if each.name == found.modes[entity.name])
            members = mode.members
            costs.append(mode.cost)
        for member in members:
            choice = found.choices[member.name]
            choices[member.name] = replace(choice, cost=_cost(member, choice))
    costs += [choice.cost for choice in choices.values()]
    return replace(found, choices=choices, cost=math.fsum(costs), budget=resource.budget)


def _cost(candidate: Candidate, choice: Choice) -> float:
    if choice.rank is None:
        return candidate.dense_cost or 0.0
    (option,) = (option for option in candidate.options if option.form == choice.form)
    return float(option.cost[np.searchsorted(option.ranks, choice.rank)])


def _result(
    resources: Sequence[Resource], found: Allocation, prices: Sequence[float], bound: float
) -> Together:
    priced = [_priced(resource, found) for resource in resources]
    names = [resource.name for resource in resources]
    return Together(
        replace(priced[0], multiplier=prices[0], bound=bound),
        {name: each.cost for name, each in zip(names, priced, strict=True)},
        dict(zip(names, prices, strict=True)),
        bound,
    )
