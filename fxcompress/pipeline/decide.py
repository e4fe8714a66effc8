"""From spectra to a plan: the budget is solved, and every decision written down."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial

import numpy as np
import torch
from torch import Tensor

from fxcompress.budget import Choice
from fxcompress.forms import Rank, Template
from fxcompress.graph.operator import Operator
from fxcompress.metric import METRICS
from fxcompress.pipeline.analysis import Analysis
from fxcompress.pipeline.decomposition import narrowing_loss, weight_left
from fxcompress.pipeline.latency import ROUNDS, Table, table_path
from fxcompress.pipeline.pricing import Counted, Pricing, timed
from fxcompress.pipeline.sites import Group, Narrowing, Site, decoded, encoded, on_meta
from fxcompress.pipeline.solving import Solution, solve
from fxcompress.pipeline.speed import batch_of
from fxcompress.pipeline.survey import Survey
from fxcompress.pipeline.tradeoff import closest, near_text, tradeoff
from fxcompress.pipeline.unmatched import unmatched
from fxcompress.plans.layers import layers
from fxcompress.plans.plan import (
    BudgetOutcome,
    Held,
    Made,
    NodeSummary,
    Part,
    Plan,
    SitePlan,
    Size,
    Then,
    history,
    total_size,
)
from fxcompress.plans.tradeoff import Closest
from fxcompress.plans.units import UNITS, CountedUnit
from fxcompress.rewrite import planned_weight
from fxcompress.version import __version__


def make_plan(analysis: Analysis, excluded: Mapping[str, frozenset[str]]) -> Plan:
    """Choose a form and a rank, or neither, for every site, within the budgets of the rules.

    Args:
        analysis: of the stages before.
        excluded: forms that failed, per site name; they are not chosen again.

    Raises:
        BudgetError: the budgets cannot be met; the message says the least that can.
    """
    pricings = price(analysis)
    tick = analysis.request.show.stage("budget", None)
    rules = analysis.rules.rules
    solution = solve(analysis, pricings, excluded)
    allocation, (first, *more) = solution.allocation, solution.limits
    chosen = {
        each.site.name: each
        for group, choice in solution.decided(analysis.groups)
        for each in _chosen(group, analysis, choice)
    }
    sites = tuple(
        _site_plan(chosen[site.name], analysis, excluded, solution) for site in analysis.sites
    )
    if "latency" in pricings:
        sites = _with_seconds(sites, analysis, pricings["latency"])
    saved = total_size(site.before for site in sites) - total_size(site.after for site in sites)
    planned = Plan(
        model_class=f"{type(analysis.model).__module__}.{type(analysis.model).__qualname__}",
        rules=analysis.rules.filename,
        made=Made(
            version=__version__,
            torch=str(torch.__version__),
            date=datetime.now(UTC).date().isoformat(),
        ),
        metric=rules.metric.kind,
        loss_unit=METRICS[rules.metric.kind].unit,
        calibration={
            "batches": analysis.estimate.calibration.batches,
            "predictions": analysis.estimate.calibration.predictions,
            "output": analysis.estimate.calibration.kind,
            "held back": analysis.estimate.held_back.total,
            "seed": rules.metric.seed,
            **({"processes": analysis.spread} if analysis.spread else {}),
        },
        damping=analysis.estimate.damping if any(METRICS[rules.metric.kind].damped) else (),
        batch=batch_of(analysis.examples),
        budget=BudgetOutcome(
            **first.model_dump(exclude={"rule"}),
            allocation=rules.solver.allocation,
            predicted=allocation.loss,
            fitted=allocation.loss,
            bound=solution.bound,
        ),
        limits=tuple(more),
        tradeoff=tradeoff(solution.frontier, analysis.groups),
        sites=sites,
        templates=_used_templates(analysis, sites),
        folded=analysis.folded,
        unmatched=unmatched(analysis),
        model_before=analysis.size,
        model_after=analysis.folded_size - saved,
        before=summarize(analysis.before),
        earlier=history(analysis.model),
    )
    tick()
    return planned


def foreseen(analysis: Analysis, planned: Plan) -> Plan:
    """The plan with its losses predicted by the moments of the batches held back.

    The moments that it was made by are fitted to it: where data are few it looks far better in
    their eyes than it is.

    Args:
        analysis: has the decompositions and the moments.
        planned: of it; as it is if nothing was held back.
    """
    known = analysis.estimate.held_back.moments
    if not known:
        return planned
    metric = METRICS[analysis.rules.rules.metric.kind]
    losses: dict[str, float] = {}
    for name, entries in planned.groups.items():
        weights = _approximated(analysis, name, entries)
        for entry, weight in zip(entries, weights, strict=True):
            if entry.name not in known:
                continue
            site = analysis.group(name).sites[entry.member]
            losses[entry.name] = 0.0  # of a weight that stays as it is
            if weight is not None:
                change = weight - site.weight_in(analysis.model).to(torch.float64)
                losses[entry.name] = metric.undamped_loss(site.shape, known[site.name], change)
        analysis.room.cool()
    sites = tuple(
        entry.model_copy(update={"predicted": losses.get(entry.name, entry.predicted)})
        for entry in planned.sites
    )
    predicted = math.fsum(entry.predicted for entry in sites)
    budget = planned.budget.model_copy(update={"predicted": predicted})
    return planned.model_copy(update={"sites": sites, "budget": budget})


def _approximated(
    analysis: Analysis, name: str, entries: Sequence[SitePlan]
) -> Sequence[Tensor | None]:
    """The dense weights (canonical layout, float64) that stand for some sites of a group.

    None for one that stays as it is.
    """
    group, found = analysis.group(name), analysis.decomposed
    form, rank = entries[0].choice
    if all(entry.then is None for entry in entries):
        all_of_them = group.approximated(form, found.groups[name].target, rank)
        return [all_of_them[entry.member] for entry in entries]
    weights: list[Tensor | None] = []
    for entry in entries:
        left, then = group.left_of(*entry.narrowing), entry.then
        code = None if then is None else int(encoded(np.array([then.rank]))[0])
        weights.append(
            weight_left(analysis.model, group, found, left, then.form if then else None, code)
        )
    return weights


def price(analysis: Survey) -> dict[str, Pricing]:
    """What operators cost in the unit of every budget.

    Args:
        analysis: has the sites and the budgets.
    """
    pricings: dict[str, Pricing] = {}
    for budget in analysis.rules.rules.budgets:
        unit = UNITS[budget.unit]
        if isinstance(unit, CountedUnit):
            pricings[budget.unit] = Counted(unit)
        else:
            pricings["latency"], unkept = analysis.request.processes.from_first(
                partial(_timed, analysis)
            )
            if unkept:
                analysis.request.notes.add(unkept)
    return pricings


def _timed(analysis: Survey) -> tuple[Pricing, str]:
    """What operators take on this machine, and why it will not be known the next time."""
    tick = analysis.request.show.stage("latency", ROUNDS)
    device = next(analysis.model.parameters()).device
    table = Table(table_path())
    return timed(analysis.groups, device, table, tick), table.unkept


def _with_seconds(
    sites: Sequence[SitePlan], analysis: Analysis, pricing: Pricing
) -> tuple[SitePlan, ...]:
    """Sites with the seconds that their operators take before and after.

    What several take together counts for the first.
    """
    told: set[str] = set()
    factorized = {entry.group for entry in sites if entry.then is not None}
    out = []
    for entry in sites:
        before = after = pricing.dense(analysis.group(entry.name))
        if entry.group in factorized:  # every one of them takes its own time
            left = analysis.group(entry.group).left_of(*entry.narrowing)
            after = pricing.dense(left)
            if entry.then is not None:
                at = np.array([entry.then.rank], dtype=np.int64)
                after = float(pricing.at(left, entry.then.form, at)[0])
        elif entry.form is not None:
            form, rank = entry.choice
            at = np.array([rank], dtype=np.int64)
            again = entry.group in told
            after = 0.0 if again else float(pricing.at(analysis.group(entry.group), form, at)[0])
            told.add(entry.group)
        out.append(entry.model_copy(update={"seconds": (before, after)}))
    return tuple(out)


@dataclass(frozen=True)
class _Chosen:
    """What becomes of one site, by itself or together with others.

    Attributes:
        choice: of its group.
        predicted: its part of the loss.
        after: its size.
        full_rank: of the form.
        rank: of the form; None if the site stays dense.
        parts: that its body consists of.
        member: its place in the group.
        then: the form of what is left of it, if the group is narrowed and it has one.
    """

    site: Site
    group: Group
    choice: Choice
    predicted: float
    after: Size
    full_rank: Rank
    rank: Rank | None
    parts: tuple[Part, ...] = ()
    member: int = 0
    then: Then | None = None

    @property
    def bundle(self) -> str:
        """Name of the group if it has several sites."""
        return self.group.name if len(self.group.sites) > 1 else ""


def _chosen(group: Group, analysis: Analysis, choice: Choice) -> Iterator[_Chosen]:
    """What becomes of the sites of a group."""
    if group.narrowing is not None:
        yield _narrowed(group, group.narrowing, analysis, choice)
        return
    if choice.form is None or choice.rank is None:
        for site in group.sites:
            size = site.dense_size()
            yield _Chosen(site, group, choice, 0.0, size, site.shape.full_rank, None)
        return
    form = group.forms[choice.form]
    full = form.full_rank()
    rank = decoded(full, choice.rank)
    body = on_meta(form).empty(rank)
    predicted = analysis.decomposed.groups[group.name].predicted(choice.loss, choice.rank)
    sizes = group.sizes(choice.form, rank, body)
    for member, (site, parts) in enumerate(zip(group.sites, layers(body), strict=True)):
        yield _Chosen(
            site, group, choice, predicted[member], sizes[member], full, rank, parts, member
        )


def _narrowed(left: Group, place: Narrowing, analysis: Analysis, choice: Choice) -> _Chosen:
    """What becomes of a site of a narrowed hidden value, given what is left of it."""
    group = analysis.group(place.hidden)
    form, decomposed = group.forms[place.form], analysis.decomposed.groups[group.name]
    body = on_meta(form).empty(place.width)
    loss = narrowing_loss(group, decomposed, place.form, place.width)
    predicted = decomposed.predicted(loss, place.width)[place.member] + choice.loss
    after, then = group.sizes(place.form, place.width, body)[place.member], None
    parts = layers(body)[place.member]
    if choice.form is not None and choice.rank is not None:
        own = left.forms[choice.form]
        full = own.full_rank()
        then = Then(form=choice.form, rank=decoded(full, choice.rank), full_rank=full)
        inside = on_meta(own).empty(then.rank)
        (own_size,), (parts,) = left.sizes(then.form, then.rank, inside), layers(inside)
        after = after - left.sites[0].dense_size() + own_size
    narrow = replace(choice, form=place.form, rank=place.width, loss=loss)
    return _Chosen(
        group.sites[place.member], group, narrow, predicted, after, form.full_rank(), place.width,
        parts, place.member, then,
    )  # fmt: skip


def _site_plan(
    chosen: _Chosen,
    analysis: Analysis,
    excluded: Mapping[str, frozenset[str]],
    solution: Solution,
) -> SitePlan:
    site, choice = chosen.site, chosen.choice
    dense = choice.form is None
    near = closest(site, analysis, solution) if dense else None
    target = analysis.decomposed.groups[chosen.group.name].target
    found = None if choice.form is None else chosen.group.forms[choice.form].form
    sigma = (target.truncations() if found is None else found.truncations(target)).sigma
    squares = sigma.square()
    whole = 0.5 * float(squares.sum())
    lost = whole and float(choice.loss) / whole
    shown = np.linspace(0, len(squares) - 1, min(64, len(squares))).round().astype(int)
    mine = analysis.groups_of(site.name)
    forms = tuple(form for group in mine for form in group.forms)
    out = {form for group in mine for form in excluded.get(group.name, ())}
    weight, applied = planned_weight(analysis.model, site.weight)
    return SitePlan(
        name=site.name,
        weight=weight,
        applied=applied,
        op=site.op,
        operator=str(site.shape),
        in_features=site.in_features,
        out_features=site.out_features,
        bias=site.shape.bias,
        dtype=str(site.shape.dtype).removeprefix("torch."),
        calls=site.calls,
        rule=site.match.rule_id,
        location=site.match.location,
        forms=forms,
        form=choice.form,
        rank=chosen.rank,
        full_rank=chosen.full_rank,
        bundle=chosen.bundle,
        member=chosen.member,
        then=chosen.then,
        parts=chosen.parts,
        predicted=chosen.predicted,
        energy=1.0 if dense else min(max(1.0 - lost, 0.0), 1.0),
        before=site.dense_size(),
        after=chosen.after,
        reason=_dense_reason(site, forms, out, analysis, near) if dense else "",
        closest=near,
        spectrum=tuple(sigma[shown].tolist()),
        held=_held(chosen),
    )


def _held(chosen: _Chosen) -> tuple[Held, ...]:
    """What goes with the channels that a site reads, if it is the last of a hidden value."""
    last = chosen.rank is not None and chosen.site is chosen.group.sites[-1]
    return tuple(Held(**asdict(each)) for each in chosen.group.held) if last else ()


def _dense_reason(
    site: Site,
    forms: Sequence[str],
    excluded: Collection[str],
    analysis: Analysis,
    near: Closest | None,
) -> str:
    if site.name in analysis.decomposed.idle and not site.match.limits.unmeasured:
        known = analysis.estimate.calibration.unmeasured
        why = known.get(site.name, "every statistic of it is zero")
        return f"no influence was measured: {why}"
    if not forms:
        return f"no form fits: {analysis.refused.get(site.weight, 'its rule offers none for it')}"
    single = analysis.group(site.name).forms.values()
    offered = [form for group in analysis.groups_of(site.name) for form in group.forms.values()]
    misfits = [reason for form in offered if (reason := form.misfit())]
    if misfits and len(misfits) == len(forms):
        return f"no form fits: {'; '.join(dict.fromkeys(misfits))}"
    if excluded and set(forms) <= set(excluded):
        return f"no form worked: {', '.join(sorted(excluded))} given up"
    if near is not None:
        return near_text(near, analysis.rules.rules.budgets[0].unit)
    if all(form.break_even() == 1 for form in single if not form.misfit()):
        saves = "saves" if len(forms) == 1 else "save"
        return f"left dense by the budget: {_listed(forms)} {saves} at no rank"
    return "left dense by the budget: no rank that its rule allows saves as much as it asks for"


def _listed(words: Sequence[str]) -> str:
    """``a, b and c``."""
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last


def _used_templates(analysis: Analysis, sites: Sequence[SitePlan]) -> dict[str, Template]:
    used = {site.form for site in sites}
    templates = analysis.rules.templates.values()
    return {template.name: template for template in templates if template.name in used}


def summarize(operators: Iterable[Operator]) -> tuple[NodeSummary, ...]:
    """A recorded graph as a plan keeps it."""
    return tuple(
        NodeSummary(name=o.name, op=o.op, path=o.path, inputs=o.inputs, shape=o.shape)
        for o in operators
    )
