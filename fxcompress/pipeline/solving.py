"""The budgets of a rule file, put to the solver."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fxcompress.budget import (
    Allocation,
    Bundle,
    Option,
    Resource,
    allocate,
    allocate_uniform,
    allocate_within,
    least_cost,
)
from fxcompress.errors import BudgetError
from fxcompress.pipeline.analysis import Analysis
from fxcompress.pipeline.pricing import Pricing, Problem, problems
from fxcompress.plans.plan import Limit, Unit
from fxcompress.report.quantities import amount
from fxcompress.rules import Budget


@dataclass(frozen=True)
class Solution:
    """What the solver found.

    Attributes:
        allocation: a choice for every site and bundle.
        bound: no choices within the budgets have a lower predicted loss; None for uniform ranks.
        limits: the budgets in the order of the file, then those of single rules.
    """

    allocation: Allocation
    bound: float | None
    limits: tuple[Limit, ...]


@dataclass(frozen=True)
class _Demand:
    """One budget, of all operators or of those of one rule."""

    limit: Limit
    problem: Problem

    @property
    def name(self) -> str:
        of = f" of rule {self.limit.rule}" if self.limit.rule else f" of {self.limit.of}"
        return f"{self.limit.unit}{of}"


def solve(
    analysis: Analysis,
    pricings: Mapping[Unit, Pricing],
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
    units = list(pricings)
    found = problems(
        analysis.sites, analysis.bundles, analysis.decomposed, [*pricings.values()], excluded
    )
    by_unit = dict(zip(units, found, strict=True))
    demands = [_demand(analysis, budget, by_unit[budget.unit]) for budget in rules.budgets]
    demands += [
        _rule_demand(analysis, rule.id, rule.rewrite.keep, unit, by_unit[unit])
        for rule in rules.rules
        if rule.rewrite != "none" and rule.rewrite.keep is not None
        for unit in units
    ]
    glob = rules.solver.allocation == "global"
    if len(demands) == 1:
        (only,) = demands
        choose = allocate if glob else allocate_uniform
        allocation = choose(only.problem.candidates, only.limit.limit, only.problem.bundles)
        multiplier = allocation.multiplier if glob else None
        limit = only.limit.model_copy(update={"cost": allocation.cost, "multiplier": multiplier})
        return Solution(allocation, allocation.bound if glob else None, (limit,))
    if not glob:
        raise BudgetError(
            "allocation: uniform keeps the same fraction everywhere, which is one budget; with "
            "several, or with keep in a rule, choose allocation: global"
        )
    resources = [
        Resource(d.name, d.limit.limit, d.problem.candidates, d.problem.bundles) for d in demands
    ]
    together = allocate_within(resources)
    limits = tuple(
        d.limit.model_copy(
            update={"cost": together.costs[d.name], "multiplier": together.multipliers[d.name]}
        )
        for d in demands
    )
    return Solution(together.allocation, together.bound, limits)


def _demand(analysis: Analysis, budget: Budget, problem: Problem) -> _Demand:
    """A budget for all matched operators, which by itself can be met."""
    dense = sum(candidate.dense_cost for candidate in problem.candidates)
    if budget.of == "model":
        whole = float(getattr(analysis.size, budget.unit))
        rest = float(getattr(analysis.folded_size, budget.unit)) - dense
    else:
        whole, rest = dense, 0.0
    limit = budget.keep * whole - rest
    least = least_cost(problem.candidates, problem.bundles)
    if least > limit:
        kept = sum(
            not site.match.limits.unmeasured
            for site in analysis.sites
            if site.name in analysis.decomposed.idle
        )
        raise BudgetError(_impossible(budget, whole, rest + least) + _unmeasured(kept))
    return _Demand(
        Limit(
            keep=budget.keep, of=budget.of, unit=budget.unit, limit=limit, cost=dense,
            dense=dense, multiplier=None,
        ),
        problem,
    )  # fmt: skip


def _impossible(budget: Budget, base: float, needed: float) -> str:
    """What is the least budget that can be met, if this one cannot."""
    of = "of the model" if budget.of == "model" else "of the matched operators"
    steps = math.ceil(1e4 * needed / base)
    while steps / 1e4 * base < needed:  # rounding
        steps += 1
    unit = budget.unit
    what = "" if unit == "latency" else f"{unit} "
    return (
        f"the budget cannot be met: keep {budget.keep:g} of {amount(base, unit)} {what}{of} allows "
        f"{amount(budget.keep * base, unit)}, and these rules need at least "
        f"{amount(needed, unit)} (keep: {steps / 1e4:g}); raise keep, allow lower ranks (min_rank, "
        "multiple_of) or match more operators"
    )


def _unmeasured(count: int) -> str:
    if not count:
        return ""
    return (
        f"; {count} of the matched operators stay dense, as no influence of them on the output was "
        "measured (the warnings of a plan with a higher keep name them)"
    )


def _rule_demand(
    analysis: Analysis, rule: str, keep: float, unit: Unit, problem: Problem
) -> _Demand:
    """A budget for what one rule matches: everything else costs nothing in it."""
    own = {site.name for site in analysis.sites if site.match.rule_id == rule}
    candidates = tuple(
        c if c.name in own else replace(c, dense_cost=0.0, options=_free(c.options))
        for c in problem.candidates
    )
    bundles = tuple(
        b if own.issuperset(b.members) else Bundle(b.name, b.members, _free(b.options))
        for b in problem.bundles
    )
    dense = sum(candidate.dense_cost for candidate in candidates)
    limit = Limit(
        keep=keep, of="matched", unit=unit, limit=keep * dense, cost=dense, dense=dense,
        multiplier=None, rule=rule,
    )  # fmt: skip
    return _Demand(limit, Problem(candidates, bundles))


def _free(options: Sequence[Option]) -> tuple[Option, ...]:
    return tuple(replace(option, cost=np.zeros_like(option.cost)) for option in options)
