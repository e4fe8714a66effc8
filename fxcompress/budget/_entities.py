"""What several budgets are about: resources, and the choices of sites in all of them at once."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fxcompress.budget._sites import common_options
from fxcompress.budget.problem import Allocation, Bundle, Candidate, Choice, Option

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Resource:
    """One limited quantity: the sites with their costs in its unit.

    Attributes:
        name: unique, ``"parameters"``.
        budget: limit on the total cost; finite, not negative.
        candidates: equal in all resources but for their costs; a site that a resource is not
            about costs nothing in it, dense or not.
        bundles: likewise.
    """

    name: str
    budget: float
    candidates: tuple[Candidate, ...]
    bundles: tuple[Bundle, ...] = ()


@dataclass(frozen=True, eq=False)
class Entity:
    """A site, a group or a bundle that is rewritten as a whole, with all of its choices.

    Attributes:
        loss: of every choice (k).
        cost: as shares of the budgets (k x u).
        choices: form and rank of each; None for dense.
        members: the candidates; of a bundle none.
        bundle: its name, empty for a site or a group.
    """

    loss: Floats
    cost: Floats
    choices: tuple[tuple[str, int] | None, ...]
    members: tuple[str, ...]
    bundle: str = ""


def entities_of(resources: Sequence[Resource], joint: Collection[str]) -> list[Entity]:
    """What can be moved, given which bundles are joint."""
    shares = shares_of(resources).tolist()
    wholes = [b for b in resources[0].bundles if b.name in joint]
    together = {name for bundle in wholes for name in bundle.members}
    groups: dict[tuple[str, str], list[tuple[Candidate, ...]]] = {}
    for each in zip(*(resource.candidates for resource in resources), strict=True):
        one = each[0]
        if one.name not in together:
            alone = one.group is None
            key = ("site", one.name) if alone else ("group", str(one.group))
            groups.setdefault(key, []).append(each)
    entities = []
    for members in groups.values():
        by_resource = [*zip(*members, strict=True)]
        options = [
            these[0].options if len(these) == 1 else common_options(these) for these in by_resource
        ]
        dense = [math.fsum(candidate.dense_cost for candidate in these) for these in by_resource]
        names = tuple(each[0].name for each in members)
        entities.append(_entity(options, dense, shares, names, ""))
    return entities + [
        _entity([b.options for b in whole], None, shares, (), whole[0].name)
        for whole in zip(*(resource.bundles for resource in resources), strict=True)
        if whole[0].name in joint
    ]


def _entity(
    options: Sequence[tuple[Option, ...]],
    dense: Sequence[float] | None,
    shares: Sequence[float],
    members: tuple[str, ...],
    bundle: str,
) -> Entity:
    first = options[0]
    choices: list[tuple[str, int] | None] = [
        (option.form, int(rank)) for option in first for rank in option.ranks
    ]
    loss = [option.loss for option in first]
    columns = []
    for at, (share, these) in enumerate(zip(shares, options, strict=True)):
        parts = [option.cost for option in these]
        if dense is not None:
            parts.append(np.array([dense[at]]))
        columns.append(share * np.concatenate(parts))
    if dense is not None:
        choices.append(None)
        loss.append(np.zeros(1))
    return Entity(np.concatenate(loss), np.stack(columns, 1), tuple(choices), members, bundle)


def allocation_from(
    resource: Resource, like: Allocation, picks: Iterable[tuple[Entity, int]]
) -> Allocation:
    """The allocation of some choices, which are about all candidates; costs are left at 0."""
    options = {candidate.name: candidate.options for candidate in resource.candidates}
    members = {bundle.name: bundle.members for bundle in resource.bundles}
    choices: dict[str, Choice] = {}
    joint: dict[str, Choice] = {}
    for entity, at in picks:
        form, rank = entity.choices[at] or (None, None)
        if entity.bundle:
            joint[entity.bundle] = Choice(form, rank, float(entity.loss[at]), 0.0)
            names = members[entity.bundle]
            choices.update(dict.fromkeys(names, Choice(form, rank, 0.0, 0.0)))
            continue
        for name in entity.members:
            choices[name] = Choice(form, rank, _loss(options[name], form, rank), 0.0)
    loss = math.fsum(choice.loss for choice in (*choices.values(), *joint.values()))
    ordered = {candidate.name: choices[candidate.name] for candidate in resource.candidates}
    return replace(like, choices=ordered, joint=joint, loss=loss)


def _loss(options: Sequence[Option], form: str | None, rank: int | None) -> float:
    if form is None or rank is None:
        return 0.0
    (option,) = (option for option in options if option.form == form)
    return float(option.loss[np.searchsorted(option.ranks, rank)])


def shares_of(resources: Sequence[Resource]) -> Floats:
    """What one unit of cost is of each budget; of a budget of 0 it is some large number."""
    wholes = [sum(c.dense_cost for c in resource.candidates) for resource in resources]
    pairs = zip(resources, wholes, strict=True)
    return np.array([1.0 / max(r.budget, 1e-9 * whole, 1e-200) for r, whole in pairs])


def costs_of(resource: Resource, found: Allocation) -> list[float]:
    """What every choice costs in a resource."""
    together = joint_members(resource, found)
    costs = [
        cost_of(candidate.dense_cost, candidate.options, found.choices[candidate.name])
        for candidate in resource.candidates
        if candidate.name not in together
    ]
    joint = (bundle for bundle in resource.bundles if bundle.name in found.joint)
    return costs + [cost_of(math.nan, b.options, found.joint[b.name]) for b in joint]


def joint_members(resource: Resource, found: Allocation) -> set[str]:
    """Candidates that are rewritten as members of a bundle."""
    return {name for b in resource.bundles if b.name in found.joint for name in b.members}


def cost_of(dense: float, options: Sequence[Option], choice: Choice) -> float:
    """What a choice costs; ``dense`` for leaving the site as it is."""
    if choice.form is None or choice.rank is None:
        return dense
    (option,) = (option for option in options if option.form == choice.form)
    return float(option.cost[np.searchsorted(option.ranks, choice.rank)])


def fits(resources: Sequence[Resource], found: Allocation) -> bool:
    """Whether all budgets are met, by the correctly rounded sums of costs."""
    return all(math.fsum(costs_of(r, found)) <= r.budget for r in resources)
