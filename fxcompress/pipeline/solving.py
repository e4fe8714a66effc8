"""The budgets of a rule file, put to the solver."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from fxcompress.budget import (
    Allocation,
    Candidate,
    Choice,
    Entity,
    Frontier,
    Resource,
    allocate,
    allocate_uniform,
    allocate_within,
    frontier,
    least_cost,
)
from fxcompress.errors import BudgetError
from fxcompress.pipeline.analysis import Analysis
from fxcompress.pipeline.pricing import Pricing, problems
from fxcompress.pipeline.sites import Group, with_narrowed
from fxcompress.plans.plan import Limit
from fxcompress.plans.units import UNITS
from fxcompress.rules import Budget

STEP = 0.01
"""Of the dense cost, by how much a budget might be changed: one percent."""

ROUNDING = 1e-12
"""Of a sum of amounts, what its order may change."""


@dataclass(frozen=True)
class Near:
    """The choice of one candidate that is best at the prices, dense left out.

    Attributes:
        form, rank: of it; the rank as options have it.
        saved: what it costs less than dense, in the unit of the first budget.
        worth: that of all budgets at their prices, in nats.
        loss: what it loses, in nats.
    """

    form: str
    rank: int
    saved: float
    worth: float
    loss: float


@dataclass(frozen=True)
class Solution:
    """What the solver found.

    Attributes:
        allocation: a choice for every site and bundle.
        bound: no choices within the budgets have a lower predicted loss; None for uniform ranks.
        limits: the budgets in the order of the file, then those of single rules.
        frontier: what other budgets would lose; None of several, and for uniform ranks.
        closest: by the name of a site that could stay dense, what comes closest to being worth it.
    """

    allocation: Allocation
    bound: float | None
    limits: tuple[Limit, ...]
    frontier: Frontier | None = None
    closest: Mapping[str, Near] = field(default_factory=dict)

    def decided(self, groups: Iterable[Group]) -> Iterator[tuple[Group, Choice]]:
        """Groups with what was chosen for them: of every site either its own, or one of several.

        Of a hidden value that is narrowed to a width with forms for what is left, these.
        """
        choices = self.allocation.choices
        return (
            (group, choices[group.name]) for group in with_narrowed(groups) if group.name in choices
        )


@dataclass(frozen=True)
class _Demand:
    """One budget, of all operators or of those of one rule."""

    limit: Limit
    entities: tuple[Entity, ...]

    @property
    def name(self) -> str:
        of = f" of rule {self.limit.rule}" if self.limit.rule else f" of {self.limit.of}"
        return f"{self.limit.unit}{of}"


def solve(
    analysis: Analysis,
    pricings: Mapping[str, Pricing],
    excluded: Mapping[str, Collection[str]],
) -> Solution:
    """Choose within all budgets of the rules.

    Args:
        analysis: sites, bundles and what their forms lose.
        pricings: for the unit of every budget.
        excluded: forms that are not to be chosen, by the name of a site or bundle.

    Raises:
        BudgetError: the budgets cannot be met; the message says the least that can.
    """
    rules = analysis.rules.rules
    found = problems(analysis.groups, analysis.decomposed, [*pricings.values()], excluded)
    by_unit = dict(zip(pricings, found, strict=True))
    demands = [
        _demand(analysis, budget, pricings[budget.unit], by_unit[budget.unit])
        for budget in rules.budgets
    ]
    demands += [
        _rule_demand(analysis, rule.id, rule.rewrite.keep, unit, pricing, by_unit[unit])
        for rule in rules.rules
        if rule.rewrite != "none" and rule.rewrite.keep is not None
        for unit, pricing in pricings.items()
    ]
    glob = rules.solver.allocation == "global"
    if len(demands) == 1:
        (only,) = demands
        choose = allocate if glob else allocate_uniform
        allocation = choose(only.entities, only.limit.limit)
        multiplier = allocation.multiplier if glob else None
        limit = only.limit.model_copy(update={"cost": allocation.cost, "multiplier": multiplier})
        near = _closest([only.entities], [multiplier or 0.0])
        if not glob:
            return Solution(allocation, None, (limit,), closest=near)
        known = frontier(only.entities, only.limit.limit, STEP * only.limit.dense)
        return Solution(allocation, allocation.bound, (limit,), known, near)
    if not glob:
        raise BudgetError(
            "allocation: uniform keeps the same fraction everywhere, which is one budget; with "
            "several, or with keep in a rule, choose allocation: global"
        )
    resources = [Resource(d.name, d.limit.limit, d.entities) for d in demands]
    together = allocate_within(resources)
    limits = tuple(
        d.limit.model_copy(
            update={"cost": together.costs[d.name], "multiplier": together.multipliers[d.name]}
        )
        for d in demands
    )
    near = _closest([d.entities for d in demands], [together.multipliers[d.name] for d in demands])
    return Solution(together.allocation, together.bound, limits, closest=near)


def _closest(problems: Sequence[Sequence[Entity]], prices: Sequence[float]) -> dict[str, Near]:
    """What each candidate that decides for itself would take at the prices instead of dense.

    Args:
        problems: for every budget the entities with their costs in its unit.
        prices: λ of every budget.
    """
    found: dict[str, Near] = {}
    for candidates in zip(*map(_candidates, problems), strict=True):
        first = candidates[0]
        if first.name in found or first.group is not None or first.dense_cost is None:
            continue
        best: Near | None = None
        for options in zip(*(each.options for each in candidates), strict=True):
            if not options[0].ranks.size:
                continue
            saved = np.array(
                [(c.dense_cost or 0.0) - o.cost for c, o in zip(candidates, options, strict=True)]
            )
            worth, loss = np.array(prices) @ saved, options[0].loss
            saving = (saved > 0.0).any(axis=0)
            if not saving.any():
                continue
            at = int(np.argmin(np.where(saving, loss - worth, np.inf)))
            near = Near(
                options[0].form, int(options[0].ranks[at]), float(saved[0][at]), float(worth[at]),
                float(loss[at]),
            )  # fmt: skip
            if best is None or near.loss - near.worth < best.loss - best.worth:
                best = near
        if best is not None:
            found[first.name] = best
    return found


def _candidates(entities: Iterable[Entity]) -> Iterator[Candidate]:
    for entity in entities:
        if isinstance(entity, Candidate):
            yield entity
        else:
            yield from (member for mode in entity.modes for member in mode.members)


def _demand(
    analysis: Analysis, budget: Budget, pricing: Pricing, entities: tuple[Entity, ...]
) -> _Demand:
    """A budget for all matched operators, which by itself can be met."""
    dense = sum(map(pricing.dense, analysis.singles))
    if budget.of == "model":
        whole = float(analysis.size[budget.unit])
        rest = float(analysis.folded_size[budget.unit]) - dense
    else:
        whole, rest = dense, 0.0
    limit = budget.keep * whole - rest
    least = least_cost(entities)
    if math.isclose(least, limit, rel_tol=ROUNDING):  # seconds, summed up in another order
        limit = max(limit, least)
    if least > limit:
        kept = sum(
            not site.match.limits.unmeasured
            for site in analysis.sites
            if site.name in analysis.decomposed.idle
        )
        reasons = [*dict.fromkeys(analysis.refused.values())]
        raise BudgetError(
            _impossible(budget, whole, rest + least) + _unmeasured(kept) + _refused(reasons)
        )
    return _Demand(
        Limit(
            keep=budget.keep, of=budget.of, unit=budget.unit, limit=limit, cost=dense,
            dense=dense, multiplier=None,
        ),
        entities,
    )  # fmt: skip


def _impossible(budget: Budget, base: float, needed: float) -> str:
    """What is the least budget that can be met, if this one cannot."""
    of = "of the model" if budget.of == "model" else "of the matched operators"
    steps = math.ceil(1e4 * needed / base)
    while steps / 1e4 * base < needed:  # rounding
        steps += 1
    unit = UNITS[budget.unit]
    of_what = f" (all {unit.text} are of the recorded batch)" if unit.per_row else ""
    return (
        f"the budget cannot be met: keep {budget.keep:g} of {unit.named(base)} {of} allows "
        f"{unit.amount(budget.keep * base)}, and these rules need at least "
        f"{unit.amount(needed)} (keep: {steps / 1e4:g}); raise keep, allow lower ranks (min_rank, "
        f"multiple_of) or match more operators{of_what}"
    )


def _unmeasured(count: int) -> str:
    if not count:
        return ""
    return (
        f"; {count} of the matched operators stay dense, as no influence of them on the output was "
        "measured (the warnings of a plan with a higher keep name them)"
    )


def _refused(reasons: Sequence[str]) -> str:
    if not reasons:
        return ""
    more = f" (explain tells {len(reasons) - 1} more reasons)" if len(reasons) > 1 else ""
    return f"; not every form is a choice: {reasons[0]}{more}"


def _rule_demand(
    analysis: Analysis,
    rule: str,
    keep: float,
    unit: str,
    pricing: Pricing,
    entities: tuple[Entity, ...],
) -> _Demand:
    """A budget for what one rule matches: everything else costs nothing in it."""
    own = {site.name for site in analysis.sites if site.match.rule_id == rule}
    groups = [g for g in analysis.groups if own.issuperset(site.name for site in g.sites)]
    dense = sum(pricing.dense(group) for group in groups if len(group.sites) == 1)
    limit = Limit(
        keep=keep, of="matched", unit=unit, limit=keep * dense, cost=dense, dense=dense,
        multiplier=None, rule=rule,
    )  # fmt: skip
    names = {group.name for group in with_narrowed(groups)}
    return _Demand(limit, tuple(_only(names, entity) for entity in entities))


def _only(own: Collection[str], entity: Entity) -> Entity:
    """What is not among some candidates costs nothing."""
    if isinstance(entity, Candidate):
        return _only_candidate(own, entity)
    modes = (
        replace(mode, members=tuple(_only_candidate(own, member) for member in mode.members))
        for mode in entity.modes
    )
    return replace(entity, modes=tuple(modes))


def _only_candidate(own: Collection[str], candidate: Candidate) -> Candidate:
    if candidate.name in own:
        return candidate
    dense = None if candidate.dense_cost is None else 0.0
    options = (replace(option, cost=np.zeros_like(option.cost)) for option in candidate.options)
    return replace(candidate, dense_cost=dense, options=tuple(options))
