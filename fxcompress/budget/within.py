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
   included: exact unless they outgrow :data:`STATES`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
from numpy.typing import NDArray

from fxcompress.budget._sites import common_options
from fxcompress.budget.problem import Allocation, Bundle, Candidate, Choice, Option
from fxcompress.budget.solver import allocate
from fxcompress.errors import BudgetError

ROUNDS = 30
"""Weights that are tried at most."""

PAIRS = 2_000_000
"""Pairs of moves that are looked at in one sweep at most."""

STATES = 20_000
"""Partial answers that the search keeps at most; those that regret least."""

COMBINED = 5_000
"""Choices of all members of a bundle that the search combines at most."""

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
        used = _used(resources, found)
        if _fits(resources, found):
            return _result(resources, found, found.bound, _multipliers(resources, weights, found))
        tried.append((found, used))
    weights, steps, last = np.full(len(resources), 1.0), np.full(len(resources), 1.0), None
    for _ in range(ROUNDS):
        found = _surrogate(resources, weights / weights.sum())
        used = _used(resources, found)
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
        moved = _Moves(resources, found).settled()
        if moved is not None and (best is None or moved.loss < best.loss):
            best = moved
    best = _searched(resources, best or tried[0][0], multipliers, bound, best is not None)
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
    scales = (weights * _shares(resources)).tolist()

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
    return found.multiplier * weights * _shares(resources)


def _shares(resources: Sequence[Resource]) -> Floats:
    """What one unit of cost is of each budget; of a budget of 0 it is some large number."""
    wholes = [sum(c.dense_cost for c in resource.candidates) for resource in resources]
    pairs = zip(resources, wholes, strict=True)
    return np.array([1.0 / max(r.budget, 1e-9 * whole, 1e-200) for r, whole in pairs])


def _costs(resource: Resource, found: Allocation) -> list[float]:
    """What every choice costs in a resource."""
    together = _joint_members(resource, found)
    costs = [
        _cost(candidate.dense_cost, candidate.options, found.choices[candidate.name])
        for candidate in resource.candidates
        if candidate.name not in together
    ]
    joint = (bundle for bundle in resource.bundles if bundle.name in found.joint)
    return costs + [_cost(math.nan, b.options, found.joint[b.name]) for b in joint]


def _joint_members(resource: Resource, found: Allocation) -> set[str]:
    """Candidates that are rewritten as members of a bundle."""
    return {name for b in resource.bundles if b.name in found.joint for name in b.members}


def _cost(dense: float, options: Sequence[Option], choice: Choice) -> float:
    if choice.form is None or choice.rank is None:
        return dense
    (option,) = (option for option in options if option.form == choice.form)
    return float(option.cost[np.searchsorted(option.ranks, choice.rank)])


def _used(resources: Sequence[Resource], found: Allocation) -> Floats:
    """The share of each budget that is used."""
    totals = [math.fsum(_costs(resource, found)) for resource in resources]
    return cast("Floats", np.array(totals) * _shares(resources))


def _fits(resources: Sequence[Resource], found: Allocation) -> bool:
    return all(math.fsum(_costs(r, found)) <= r.budget for r in resources)


def _result(
    resources: Sequence[Resource], found: Allocation, bound: float, multipliers: Floats
) -> Together:
    first = resources[0]
    names = {candidate.name: candidate for candidate in first.candidates}
    together = _joint_members(first, found)
    wholes = {bundle.name: bundle for bundle in first.bundles}
    choices = {
        name: replace(choice, cost=0.0)
        if name in together
        else replace(choice, cost=_cost(names[name].dense_cost, names[name].options, choice))
        for name, choice in found.choices.items()
    }
    joint = {
        name: replace(choice, cost=_cost(math.nan, wholes[name].options, choice))
        for name, choice in found.joint.items()
    }
    costs = {resource.name: math.fsum(_costs(resource, found)) for resource in resources}
    by_name = dict(zip(costs, multipliers.tolist(), strict=True))
    allocation = Allocation(
        choices, by_name[first.name], found.loss, costs[first.name], first.budget, bound, joint
    )
    return Together(allocation, costs, by_name, bound)


@dataclass(frozen=True, eq=False)
class _Entity:
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


class _Moves:
    """An allocation that is changed move by move; which bundles are joint stays as it is."""

    def __init__(self, resources: Sequence[Resource], found: Allocation) -> None:
        self.resources = resources
        self.found = found
        self.entities = _entities(resources, set(found.joint))
        self.at = [self._place(entity) for entity in self.entities]

    def _place(self, entity: _Entity) -> int:
        choice = (
            self.found.joint[entity.bundle]
            if entity.bundle
            else self.found.choices[entity.members[0]]
        )
        if choice.form is None or choice.rank is None:
            return entity.choices.index(None)
        return entity.choices.index((choice.form, choice.rank))

    def settled(self) -> Allocation | None:
        """Within all budgets, and without a single move or pair of moves that is better."""
        if not self._repair():
            return None
        while True:
            self._fill()
            if not self._exchange():
                return self._allocation()

    def _used(self) -> Floats:
        """The share of each budget that is used, correctly rounded."""
        rows = [entity.cost[at] for entity, at in zip(self.entities, self.at, strict=True)]
        return np.array([math.fsum(column) for column in zip(*rows, strict=True)])

    def _repair(self) -> bool:
        """Remove what exceeds the budgets; False if no move or pair of moves does."""
        for _ in range(50 * len(self.entities) + 50):
            used = self._used()
            excess = _excess(used)
            if not excess:
                return True
            best, where = math.inf, None
            for index, (entity, at) in enumerate(zip(self.entities, self.at, strict=True)):
                removed = excess - _excess(used + entity.cost - entity.cost[at])
                gain = entity.loss - entity.loss[at]
                worth = np.where(removed > 1e-12, gain / np.maximum(removed, 1e-12), math.inf)
                move = int(worth.argmin())
                if worth[move] < best:
                    best, where = float(worth[move]), (index, move)
            if where is not None:
                self.at[where[0]] = where[1]
            elif not self._repair_by_pairs(used):
                return False
        return False

    def _repair_by_pairs(self, used: Floats) -> bool:
        found = self._pairs()
        if found is None:
            return False
        index, move, change, _ = found
        after = np.zeros((len(index), len(index)))
        for column, now in zip(change.T, used, strict=True):
            after += np.maximum(now + column[:, None] + column[None, :] - 1.0, 0.0)
        after[index[:, None] == index[None, :]] = math.inf
        i, j = divmod(int(after.argmin()), len(index))
        if after[i, j] >= float(_excess(used)) - 1e-12:
            return False
        self.at[index[i]], self.at[index[j]] = int(move[i]), int(move[j])
        return True

    def _fill(self) -> None:
        while True:
            room = 1.0 - self._used()
            best, where = 0.0, None
            for index, (entity, at) in enumerate(zip(self.entities, self.at, strict=True)):
                change = entity.cost - entity.cost[at]
                gain = entity.loss[at] - entity.loss
                fits = (change <= room).all(1) & (gain > 0)
                if fits.any():
                    taken = np.maximum(change, 0).sum(1)
                    worth = np.where(fits, gain / np.maximum(taken, 1e-12), 0.0)
                    move = int(worth.argmax())
                    if worth[move] > best:
                        best, where = float(worth[move]), (index, move)
            if where is None or not self._moved([where]):
                return

    def _pairs(self) -> tuple[NDArray[np.int64], NDArray[np.int64], Floats, Floats] | None:
        """All single moves: entity, choice, changes of cost (k x u), and loss that they save.

        None if their pairs are too many to look at.
        """
        sizes = [len(entity.loss) for entity in self.entities]
        if sum(sizes) ** 2 > PAIRS:
            return None
        pairs = list(zip(self.entities, self.at, strict=True))
        return (
            np.repeat(np.arange(len(sizes)), sizes),
            np.concatenate([np.arange(size) for size in sizes]),
            np.concatenate([entity.cost - entity.cost[at] for entity, at in pairs]),
            np.concatenate([entity.loss[at] - entity.loss for entity, at in pairs]),
        )

    def _exchange(self) -> bool:
        """Make the best pair of moves that lowers the loss, if there is one."""
        found = self._pairs()
        if found is None:
            return False
        index, move, change, gain = found
        room = 1.0 - self._used()
        total = gain[:, None] + gain[None, :]
        possible = (index[:, None] != index[None, :]) & (total > 1e-12 * self.found.loss)
        for column, left in zip(change.T, room, strict=True):
            possible &= column[:, None] + column[None, :] <= left
        total = np.where(possible, total, 0.0)
        for flat in np.argsort(-total, axis=None, kind="stable")[:20]:
            i, j = divmod(int(flat), len(index))
            if total[i, j] <= 0:
                return False
            if self._moved([(int(index[i]), int(move[i])), (int(index[j]), int(move[j]))]):
                return True
        return False

    def _moved(self, moves: Sequence[tuple[int, int]]) -> bool:
        """Make moves, unless rounding takes them beyond a budget."""
        before = [(index, self.at[index]) for index, _ in moves]
        for index, move in moves:
            self.at[index] = move
        if _fits(self.resources, self._allocation()):
            return True
        for index, move in before:
            self.at[index] = move
        return False

    def _allocation(self) -> Allocation:
        return _allocation_of(
            self.resources[0], self.found, zip(self.entities, self.at, strict=True)
        )


def _allocation_of(
    resource: Resource, like: Allocation, picks: Iterable[tuple[_Entity, int]]
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


@dataclass(frozen=True, eq=False)
class _Ways:
    """The choices of an entity, or of a bundle in both of its modes.

    Attributes:
        loss, cost, regret: of every choice (k), (k x u), (k).
        picks: what each choice consists of.
    """

    loss: Floats
    cost: Floats
    regret: Floats
    picks: list[tuple[tuple[_Entity, int], ...]]


def _searched(
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
    prices = multipliers / _shares(resources)
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
        picks: list[tuple[_Entity, int]] = []
        place = state
        for each, (parents, taken) in zip(reversed(ways), reversed(back), strict=True):
            picks += each.picks[int(taken[place])]
            place = int(parents[place])
        found = _allocation_of(resources[0], present, picks)
        if _fits(resources, found):
            return found
    return present if feasible else None


def _value(entity: _Entity, prices: Floats) -> Floats:
    return entity.loss + entity.cost @ prices


def _modes(resources: Sequence[Resource], prices: Floats) -> list[_Entity]:
    """The entities of the modes that are best at some prices."""
    joint = set()
    singles = {entity.members: entity for entity in _entities(resources, ())}
    for whole in _entities(resources, [bundle.name for bundle in resources[0].bundles]):
        if whole.bundle:
            (members,) = (b.members for b in resources[0].bundles if b.name == whole.bundle)
            apart = sum(_value(singles[(name,)], prices).min() for name in members)
            if len(whole.loss) and _value(whole, prices).min() < apart:
                joint.add(whole.bundle)
    return _entities(resources, joint)


def _contested(resources: Sequence[Resource], prices: Floats, allowed: float) -> list[_Ways]:
    """All choices that regret at most ``allowed`` at some prices."""
    singles = {entity.members: entity for entity in _entities(resources, ())}
    every = [bundle.name for bundle in resources[0].bundles]
    wholes = {e.bundle: e for e in _entities(resources, every) if e.bundle}
    ways = []
    for bundle in resources[0].bundles:
        own = [singles.pop((name,)) for name in bundle.members]
        near = [_near(each, prices, allowed) for each in own]
        whole = wholes[bundle.name]
        picks: list[tuple[tuple[_Entity, int], ...]] = [
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


def _near(entity: _Entity, prices: Floats, allowed: float) -> list[int]:
    value = _value(entity, prices)
    places: list[int] = np.flatnonzero(value <= value.min() + allowed).tolist()
    return places


def _ways(picks: list[tuple[tuple[_Entity, int], ...]], prices: Floats, allowed: float) -> _Ways:
    loss = np.array([sum(e.loss[at] for e, at in pick) for pick in picks])
    cost = np.array([sum((e.cost[at] for e, at in pick), 0.0) for pick in picks])
    regret = loss + cost @ prices
    regret = regret - regret.min()
    kept = np.flatnonzero(regret <= allowed)
    return _Ways(loss[kept], cost[kept], regret[kept], [picks[at] for at in kept])


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


def _excess(used: Floats) -> Floats:
    """By how much budgets are exceeded, all together, in shares of each (... x u to ...)."""
    return cast("Floats", np.maximum(used - 1.0, 0.0).sum(-1))


def _loss(options: Sequence[Option], form: str | None, rank: int | None) -> float:
    if form is None or rank is None:
        return 0.0
    (option,) = (option for option in options if option.form == form)
    return float(option.loss[np.searchsorted(option.ranks, rank)])


def _entities(resources: Sequence[Resource], joint: Collection[str]) -> list[_Entity]:
    """What can be moved, given which bundles are joint."""
    shares = _shares(resources).tolist()
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
) -> _Entity:
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
    return _Entity(np.concatenate(loss), np.stack(columns, 1), tuple(choices), members, bundle)
