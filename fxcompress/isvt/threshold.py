"""One thresholding: all weights to the ranks that a budget allows, in their metrics.

It is the proximal step of ``λ Σ_l cost_l(rank W_l)`` (arXiv 2507.09428, section 4) with the λ that
meets the budget, for the forms and costs of the rules: the stages decompose and budget of
``compile``, on the weights as they are now.

    prox(W) = argmin_V  ½ ‖V - W‖²_M + λ cost(rank V)        # one weight
            = the components of W with ½ σ² > λ (cost(r) - cost(r - 1))     # cost linear

Weights that moved little are decomposed from where they were (:mod:`fxcompress.metric.subspace`).
The ranks are then those of the full decomposition if no component that was not looked at could
be worth its cost, and the weights lose no more than those of the full decomposition but for
:data:`TOLERANCE` if the components were settled; a site for which either is not certain is
decomposed in full.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import cast

import numpy as np
from torch import Tensor

from fxcompress.errors import RuleError
from fxcompress.forms.target import Certificate, Losses, Ranks
from fxcompress.metric import METRICS, Calibration, QuadraticForm
from fxcompress.metric.metric import by_group
from fxcompress.metric.moments import Moments
from fxcompress.pipeline.analysis import Analysis
from fxcompress.pipeline.decomposition import (
    Decomposed,
    Decomposition,
    decompose,
    decompose_narrowed,
    metric_from,
    stacked,
    weight_left,
)
from fxcompress.pipeline.estimate import Estimate
from fxcompress.pipeline.pricing import Costs, Pricing
from fxcompress.pipeline.sites import Site, decoded
from fxcompress.pipeline.solving import Solution, solve
from fxcompress.pipeline.survey import Survey
from fxcompress.rules import LoadedRules

Metrics = Mapping[str, QuadraticForm]
"""The metric at every site, by its name."""

ITERATIONS = (1, 3)
"""Products with ``S Sᵀ`` that are tried before a weight is decomposed in full."""


SLACK = 1e-6
"""Of λ: it lies between the values of two components, and is known to rounding only."""

TOLERANCE = 0.01
"""What all weights together may lose beyond the least at their ranks, relative to that."""


def require_lasting_metric(loaded: LoadedRules) -> None:
    """Refuse a metric that would have to be measured anew whenever weights change.

    Raises:
        RuleError: the rules ask for one.
    """
    kind = loaded.rules.metric.kind
    if METRICS[kind].directions:
        raise RuleError(
            f"metric {kind} measures losses along the components of the weights, which change "
            "while they are trained: choose metric: {kind: kfac}"
        )


def metrics_of(
    survey: Survey, moments: Mapping[str, Moments], damping: tuple[float, float]
) -> dict[str, QuadraticForm]:
    """The metric at every site, to be used again and again.

    Args:
        survey: has the sites and says which metric.
        moments: by site name.
        damping: of the input and of the output factor.

    Raises:
        ValueError: a moment is not finite.
    """
    metric_of = metric_from(dict(moments), METRICS[survey.rules.rules.metric.kind], damping)
    found = {}
    for site in survey.sites:
        own = metric_of(site)
        found[site.name] = own if by_group(site.shape) else own.for_matrices()
    return found


@dataclass(frozen=True, eq=False)
class Thresholded:
    """The outcome of a thresholding; no weight is changed yet.

    Attributes:
        analysis: with the weights as they were, and the rules with the budget of this time.
        solution: what becomes of each site and bundle.
        starts: where to start the next time, by the name of a site or bundle.
        full: names of those that were decomposed in full.
    """

    analysis: Analysis
    solution: Solution
    starts: Mapping[str, Tensor]
    full: frozenset[str]

    @property
    def multiplier(self) -> float | None:
        """λ of the first budget."""
        return self.solution.limits[0].multiplier

    @property
    def predicted(self) -> float:
        """``½ ‖V - W‖²_M``, summed over sites."""
        return self.solution.allocation.loss

    @property
    def cost(self) -> float:
        """In the unit of the first budget, never above its limit."""
        return self.solution.limits[0].cost

    def ranks(self) -> dict[str, int | None]:
        """Rank of every site, as the solver encodes it, that of its bundle if it has one."""
        return {
            site.name: group.narrowing.width if group.narrowing else choice.rank
            for group, choice in self.solution.decided(self.analysis.groups)
            for site in group.sites
        }

    def weights(self) -> Iterator[tuple[Site, Tensor]]:
        """Every site that does not stay as it is, with its new weight (canonical layout)."""
        analysis = self.analysis
        for group, choice in self.solution.decided(analysis.groups):
            if group.narrowing is not None:
                hidden = analysis.group(group.narrowing.hidden)
                weight = weight_left(
                    analysis.model, hidden, analysis.decomposed, group, choice.form, choice.rank
                )
                if weight is not None:
                    yield hidden.sites[group.narrowing.member], weight
                continue
            if choice.form is None or choice.rank is None:
                continue
            form = group.forms[choice.form]
            rank = decoded(form.full_rank(), choice.rank)
            factors = form.factors(analysis.decomposed.groups[group.name].target, rank)
            found = zip(group.sites, form.products(factors), strict=True)
            yield from ((site, weight) for site, weight in found if weight is not None)


def threshold(
    survey: Survey,
    metrics: Metrics,
    rules: LoadedRules,
    pricings: Mapping[str, Pricing],
    starts: Mapping[str, Tensor] = MappingProxyType({}),
    *,
    tick: Callable[[], None] = lambda: None,
) -> Thresholded:
    """Choose ranks for the weights as they are now.

    Args:
        survey: has sites and bundles, and a model that has the weights.
        metrics: in which they are approximated.
        rules: with the budget of this time.
        pricings: for the unit of every budget.
        starts: of the last thresholding; without them all weights are decomposed in full.
        tick: called after every site.

    Raises:
        ValueError: a weight is not finite.
        BudgetError: the budget cannot be met.
    """
    survey = replace(survey, rules=rules)
    if len(rules.rules.budgets) > 1 or rules.rules.solver.allocation != "global":
        starts = {}  # there is no one multiplier to tell by what may be missing
    metrics = {
        **metrics,
        **{
            group.name: metric
            for group in survey.several
            if (metric := stacked(group, metrics)) is not None
        },
    }
    groups = {group.name: group for group in survey.groups if group.name in metrics}

    def decomposed(name: str, iterations: int | None) -> Decomposed:
        metric, basis = metrics[name], starts.get(name)
        if basis is not None and iterations is not None:
            metric = metric.starting_from(basis, iterations)
        return decompose(survey.model, groups[name], metric)

    found: dict[str, Decomposed] = {}
    left: dict[str, Decomposed] = {}
    for name, group in groups.items():
        found[name] = decomposed(name, ITERATIONS[0])
        around = [metrics[site.name] for site in group.sites]
        left |= decompose_narrowed(group, found[name], around)
        tick()
    full = {name for name in found if name not in starts}
    for iterations in (*ITERATIONS[1:], None, None):
        analysis = _analysis(survey, found, left, metrics)
        solution = solve(analysis, pricings, {})
        more = _uncertain(analysis, solution, pricings)
        if not more:
            break
        # Another λ may cast doubt on others: the last time, nothing that is doubtful is left.
        for name in more:
            found[name] = decomposed(name, iterations)
        if iterations is None:
            full |= more
    else:
        full = {*found}
        found = {name: decomposed(name, None) for name in found}
        analysis = _analysis(survey, found, left, metrics)
        solution = solve(analysis, pricings, {})
    return Thresholded(
        analysis, solution, dict(_starts(analysis, metrics, solution)), frozenset(full)
    )  # fmt: skip


def _analysis(
    survey: Survey,
    found: Mapping[str, Decomposed],
    left: Mapping[str, Decomposed],
    metrics: Metrics,
) -> Analysis:
    idle = tuple(name for name in found if metrics[name].null)
    return Analysis.of(survey, Estimate(Calibration({})), Decomposition({**found, **left}, idle))


def _uncertain(analysis: Analysis, solution: Solution, pricings: Mapping[str, Pricing]) -> set[str]:
    """Sites and bundles that may be worth another rank, or lose too much more than they have to.

    With λ given, the choice at every part is then the best one but for what it loses in excess;
    so no choices within the budget lose less than these by more than the duality gap and that.
    """
    pricing, multiplier = next(iter(pricings.values())), solution.limits[0].multiplier
    out, excess = set(), {}
    for part in analysis.groups:
        decomposed = analysis.decomposed.groups[part.name]
        if part.hidden:
            continue  # its channels are ordered anew every time
        certificate = decomposed.target.truncations().certificate
        if certificate is None:
            continue
        ranks = {form: part.ranks(form) for form in part.forms}
        costs = {form: pricing.at(part, form, ranks[form]) for form in part.forms}
        found = (
            None
            if multiplier is None
            else _excess(decomposed.losses, certificate, ranks, costs, multiplier)
        )
        if found is None:
            out.add(part.name)
        else:
            excess[part.name] = found
    allowed = TOLERANCE * solution.allocation.loss
    for name in sorted(excess, key=excess.__getitem__):
        allowed -= excess[name]
        if allowed < 0:
            out.add(name)
    return out


def _excess(
    losses: Mapping[str, Losses],
    own: Certificate,
    ranks: Mapping[str, Ranks],
    costs: Mapping[str, Costs],
    multiplier: float,
) -> float | None:
    """What the best of the ranks that were found may lose beyond the least, in any form.

    None if in some form another rank may be better: with ``σ_i² <= bound_i²`` (Weyl), going on
    from rank k to r gains ``½ Σ_{k<i<=r} bound_i²`` at most, and costs ``λ (cost(r) - cost(k))``.
    What rounding alone could make of that is not worth another decomposition, and is counted.
    """
    out = 0.0
    for form, permitted in ranks.items():
        if not len(permitted):
            continue
        value = losses[form] + multiplier * costs[form]
        best = int(np.argmin(value))
        rise = multiplier * (costs[form][best + 1 :] - costs[form][best])

        def gain(rounded: bool, permitted: Ranks = permitted, best: int = best) -> Losses:
            bounds = own.bounds(int(permitted[-1]), rounded=rounded).square().cpu().numpy()
            gained = 0.5 * np.concatenate([[0.0], np.cumsum(bounds)])
            return cast("Losses", gained[permitted[best + 1 :]] - gained[permitted[best]])

        if not (gain(rounded=False) <= rise * (1 + SLACK)).all():
            return None
        doubt = float((gain(rounded=True) - rise).max(initial=0.0))
        out = max(out, own.excess(int(permitted[best])) + doubt)
    return out


def _starts(
    analysis: Analysis, metrics: Metrics, solution: Solution
) -> Iterator[tuple[str, Tensor]]:
    """Bases of all that was cut, in metrics that can start from one."""
    found = analysis.decomposed.groups
    choices = solution.allocation.choices
    joint = (g for g in analysis.several if g.name in choices and not g.hidden)
    chosen = {**choices, **{site.name: choices[g.name] for g in joint for site in g.sites}}
    grouped = {site.name for site in analysis.sites if site.match.group is not None}
    for name, decomposed in found.items():
        choice = chosen.get(name) if name in metrics else None
        if choice is None or choice.form is None or not choice.rank:
            continue
        if name in grouped:  # one rank for several: no component is judged by itself
            continue
        if analysis.group(name).hidden:  # channels are ordered anew every time
            continue
        basis = metrics[name].start(decomposed.target.truncations(), choice.rank)
        if basis is not None:
            yield name, basis
