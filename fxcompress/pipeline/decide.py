"""From spectra to a plan: the budget is solved, and every decision written down."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fxcompress.budget import Allocation, Choice
from fxcompress.forms import ConvShape, Rank, Template
from fxcompress.forms.target import Ranks
from fxcompress.graph.eligible import MADE_BY_HOOK, PARAMETRIZED, forward_of, made_by_hook
from fxcompress.graph.operator import Operator
from fxcompress.graph.paths import above
from fxcompress.graph.recorder import Weight
from fxcompress.metric import METRICS, Metric
from fxcompress.metric.quadratic import undamped_loss
from fxcompress.operators.modules import canonical_weight
from fxcompress.pipeline.analysis import Analysis, Survey
from fxcompress.pipeline.latency import ROUNDS, Table, table_path
from fxcompress.pipeline.pricing import Counted, Pricing, timed
from fxcompress.pipeline.sites import Site, SiteBundle, decoded, on_meta
from fxcompress.pipeline.solving import solve
from fxcompress.plans.layers import joint_layers, layers
from fxcompress.plans.plan import (
    ZERO,
    BudgetOutcome,
    NodeSummary,
    Part,
    Plan,
    SitePlan,
    Size,
    Unit,
    Unmatched,
    history,
)
from fxcompress.rules import STEPS


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
    joint = {
        name: choice
        for bundle in analysis.bundles
        if bundle.name in allocation.joint
        for name, choice in _joint_choices(bundle, analysis, allocation.joint[bundle.name])
    }
    bundle_of = {site.name: bundle for bundle in analysis.bundles for site in bundle.sites}
    sites = tuple(
        _site_plan(
            site,
            bundle_of.get(site.name),
            analysis,
            joint.get(site.name) or _single(site, analysis, allocation),
            excluded,
        )
        for site in analysis.sites
    )
    if "latency" in pricings:
        sites = _with_seconds(sites, analysis, pricings["latency"])
    saved = sum_sizes([site.before for site in sites]) - sum_sizes([site.after for site in sites])
    planned = Plan(
        model_class=f"{type(analysis.model).__module__}.{type(analysis.model).__qualname__}",
        rules=analysis.rules.filename,
        metric=rules.metric.kind,
        loss_unit=METRICS[rules.metric.kind].unit,
        calibration={
            "batches": analysis.estimate.calibration.batches,
            "predictions": analysis.estimate.calibration.predictions,
            "output": analysis.estimate.calibration.kind,
            "held back": len(analysis.estimate.held_back.batches),
            "seed": rules.metric.seed,
        },
        damping=analysis.estimate.damping if _is_damped(METRICS[rules.metric.kind]) else (),
        budget=BudgetOutcome(
            **first.model_dump(exclude={"rule"}),
            allocation=rules.solver.allocation,
            predicted=allocation.loss,
            fitted=allocation.loss,
            bound=solution.bound,
        ),
        limits=tuple(more),
        sites=sites,
        templates=_used_templates(analysis, sites),
        folded=analysis.folded,
        unmatched=_unmatched(analysis),
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
    sites = {site.name: site for site in analysis.sites}
    entries = []
    for entry in planned.sites:
        if entry.form is not None and entry.name in known:
            module = analysis.model.get_submodule(entry.name)
            dense = canonical_weight(module).detach().to(torch.float64)
            change = _approximated(analysis, sites[entry.name], entry) - dense
            loss = undamped_loss(metric, sites[entry.name].shape, known[entry.name], change)
            entry = entry.model_copy(update={"predicted": loss})
        entries.append(entry)
    predicted = math.fsum(entry.predicted for entry in entries)
    budget = planned.budget.model_copy(update={"predicted": predicted})
    return planned.model_copy(update={"sites": tuple(entries), "budget": budget})


def _approximated(analysis: Analysis, site: Site, entry: SitePlan) -> Tensor:
    """The dense weight (canonical layout, float64) that the form of a site stands for."""
    chosen, rank = entry.choice
    if not entry.bundle:
        return site.approximated(chosen, analysis.decomposed.sites[site.name].target, rank)
    (members,) = (each.sites for each in analysis.bundles if each.name == entry.bundle)
    left, right = analysis.decomposed.bundles[entry.bundle].target.truncations().factors(rank)
    part = torch.split(left, [member.out_features for member in members])[members.index(site)]
    return part.to(torch.float64) @ right.to(torch.float64)


def _is_damped(metric: Metric) -> bool:
    return metric.factors is not None and bool(metric.needs)


def price(analysis: Survey) -> dict[Unit, Pricing]:
    """What operators cost in the unit of every budget.

    Args:
        analysis: has the sites and the budgets.
    """
    pricings: dict[Unit, Pricing] = {}
    for budget in analysis.rules.rules.budgets:
        if budget.unit != "latency":
            pricings[budget.unit] = Counted(budget.unit)
        else:
            tick = analysis.request.show.stage("latency", ROUNDS)
            device = next(analysis.model.parameters()).device
            table = Table(table_path())
            pricings["latency"] = timed(analysis.sites, analysis.bundles, device, table, tick)
            if table.unkept:
                analysis.request.notes.add(table.unkept)
    return pricings


def _with_seconds(
    sites: Sequence[SitePlan], analysis: Analysis, pricing: Pricing
) -> tuple[SitePlan, ...]:
    """The same with what every operator takes before and after."""
    by_name = {site.name: site for site in analysis.sites}
    bundles = {bundle.name: bundle for bundle in analysis.bundles}
    told: set[str] = set()
    out = []
    for entry in sites:
        site = by_name[entry.name]
        before = after = pricing.dense(site)
        if entry.bundle:
            joint = pricing.joint(bundles[entry.bundle], *_at(entry))
            after = 0.0 if entry.bundle in told else float(joint[0])
            told.add(entry.bundle)
        elif entry.form is not None:
            after = float(pricing.single(site, *_at(entry))[0])
        out.append(entry.model_copy(update={"seconds": (before, after)}))
    return tuple(out)


def _at(entry: SitePlan) -> tuple[str, Ranks]:
    form, rank = entry.choice
    return form, np.array([rank], dtype=np.int64)


@dataclass(frozen=True)
class _Chosen:
    """What becomes of one site, by itself or as a member of a bundle."""

    choice: Choice
    predicted: float
    after: Size
    full_rank: Rank
    rank: Rank | None
    parts: tuple[Part, ...] = ()
    bundle: str = ""
    member: int = 0


def _single(site: Site, analysis: Analysis, allocation: Allocation) -> _Chosen:
    choice = allocation.choices[site.name]
    if choice.form is None or choice.rank is None:
        return _Chosen(choice, 0.0, site.dense_size(), site.shape.full_rank, None)
    form = site.forms[choice.form]
    full = form.full_rank(site.shape)
    rank = decoded(full, choice.rank)
    parts = layers(form.empty(on_meta(site.shape), rank))
    size = site.size(choice.form, rank)
    return _Chosen(choice, choice.loss, size, full, rank, parts)


def _joint_choices(
    bundle: SiteBundle, analysis: Analysis, choice: Choice
) -> Iterator[tuple[str, _Chosen]]:
    assert choice.form is not None
    assert choice.rank is not None
    form = bundle.forms[choice.form]
    body = form.empty([on_meta(shape) for shape in bundle.shapes], choice.rank)
    predicted = analysis.decomposed.bundles[bundle.name].predicted(choice.loss, choice.rank)
    sizes = bundle.sizes(choice.form, choice.rank, body)
    for index, (site, parts) in enumerate(zip(bundle.sites, joint_layers(body), strict=True)):
        yield (
            site.name,
            _Chosen(
                choice,
                predicted[index],
                sizes[index],
                form.full_rank(bundle.shapes),
                choice.rank,
                parts,
                bundle.name,
                index,
            ),
        )


def _site_plan(
    site: Site,
    bundle: SiteBundle | None,
    analysis: Analysis,
    chosen: _Chosen,
    excluded: Mapping[str, frozenset[str]],
) -> SitePlan:
    choice = chosen.choice
    found = analysis.decomposed.bundles if chosen.bundle else analysis.decomposed.sites
    decomposed = found[chosen.bundle or site.name]
    dense = choice.form is None
    alone = None if choice.form is None or chosen.bundle else site.forms[choice.form]
    view = "matrix" if alone is None else alone.view
    sigma = decomposed.target.truncations(view).sigma
    squares = sigma.square()
    whole = 0.5 * float(squares.sum())
    lost = whole and float(choice.loss) / whole
    shown = np.linspace(0, len(squares) - 1, min(64, len(squares))).round().astype(int)
    forms = tuple(site.forms) if bundle is None else (*bundle.forms, *site.forms)
    names = (site.name,) if bundle is None else (site.name, bundle.name)
    out = {form for name in names for form in excluded.get(name, ())}
    return SitePlan(
        name=site.name,
        weight=site.weight,
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
        parts=chosen.parts,
        predicted=chosen.predicted,
        energy=1.0 if dense else min(max(1.0 - lost, 0.0), 1.0),
        before=site.dense_size(),
        after=chosen.after,
        reason=_dense_reason(site, forms, out, analysis) if dense else "",
        spectrum=tuple(sigma[shown].tolist()),
    )


def _dense_reason(
    site: Site, forms: Sequence[str], excluded: Collection[str], analysis: Analysis
) -> str:
    if site.name in analysis.decomposed.idle and not site.match.limits.unmeasured:
        known = analysis.estimate.calibration.unmeasured
        why = known.get(site.name, "every statistic of it is zero")
        return f"no influence was measured: {why}"
    misfits = [reason for form in site.forms.values() if (reason := form.misfit(site.shape))]
    if misfits and len(misfits) == len(forms):
        return f"no form fits: {'; '.join(dict.fromkeys(misfits))}"
    if excluded and set(forms) <= set(excluded):
        return f"no form worked: {', '.join(sorted(excluded))} given up"
    m, n = site.out_features, site.in_features
    if "pivoted" in forms:
        full = site.shape.full_rank
        return f"left dense by the budget: every rank below {full} loses more than it saves"
    if tuple(forms) == ("low_rank",) and not isinstance(site.shape, ConvShape):
        return (
            f"left dense by the budget: low_rank saves below rank {m * n // (m + n)} only, and "
            "loses more than that is worth"
        )
    return f"left dense by the budget: {_listed(forms)} lose more than they save"


def _listed(words: Sequence[str]) -> str:
    """``a, b and c``."""
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last


def _used_templates(analysis: Analysis, sites: Sequence[SitePlan]) -> dict[str, Template]:
    used = {site.form for site in sites}
    templates = analysis.rules.templates.values()
    return {template.name: template for template in templates if template.name in used}


def _unmatched(analysis: Analysis) -> tuple[Unmatched, ...]:
    """Matrices and larger weights that stay as they are, each with the nearest reason."""
    matched = {site.weight for site in analysis.sites}
    # Of several rules that lost an operator, the one that it came furthest with.
    misses = sorted(analysis.matched.misses, key=lambda miss: -STEPS.index(miss.step))
    reasons = {miss.operator: miss.reason for miss in reversed(misses)}
    for kept in analysis.matched.protected:
        reasons[kept.operators[0]] = f"kept dense by rule {kept.rule_id} ({kept.location})"
    weights = analysis.recording.weights
    # A tied weight is shown as the operator that a rule was about.
    told = {o.weight: o.name for o in reversed(analysis.recording.operators) if o.name in reasons}
    seen: set[str] = set()
    out = []
    for operator in analysis.recording.operators:
        weight = operator.weight
        if weight is None or weight in matched or weight in seen:
            continue
        if told.get(weight, operator.name) != operator.name:
            continue
        if len(weights[weight].shape) < 2:
            continue  # norms and other vectors: nothing to factorize
        seen.add(weight)
        shape = weights[weight].shape
        if operator.op == "linear" and len(shape) == 2:  # (out x in), whichever way it is stored
            shape = tuple(int(operator.attributes[k]) for k in ("out_features", "in_features"))  # type: ignore[arg-type]
        out.append(
            Unmatched(
                name=operator.path or weight,
                op=operator.op,
                weight=weight,
                shape=shape,
                parameters=math.prod(weights[weight].shape),
                reason=reasons.get(operator.name, f"no rule is about operator {operator.op}"),
            )
        )
    return (*out, *_unseen(analysis))


def _unseen(analysis: Analysis) -> list[Unmatched]:
    """Weights that no operator of the graph applies: rules cannot be about them."""
    ran = {o.path: o.op for o in analysis.recording.operators if o.module}
    out = []
    for name, facts in analysis.recording.weights.items():
        owner = name.rpartition(".")[0]
        if facts.calls or len(facts.shape) < 2:
            continue
        reason = _unseen_reason(analysis.model, name, facts, ran)
        out.append(
            Unmatched(
                name=owner or name,
                op=ran.get(owner, "parameter"),
                weight=name,
                shape=facts.shape,
                parameters=math.prod(facts.shape),
                reason=reason,
            )
        )
    return out


def _unseen_reason(model: nn.Module, name: str, facts: Weight, ran: Mapping[str, str]) -> str:
    """Why no operator has a weight.

    Args:
        model: as it was recorded.
        name: of the weight.
        facts: about it.
        ran: operators of the modules that were called as one, by path.
    """
    owner = name.rpartition(".")[0]
    if any(ran.get(path) == "script_module" for path in (owner, *above(owner))):
        return (
            "it is part of a TorchScript program, which hides its operators: compress the model "
            "before that is scripted"
        )
    if ".parametrizations." in name:
        return PARAMETRIZED.replace("its weight", "it")
    if owner in ran and made_by_hook(model.get_submodule(owner)):
        return MADE_BY_HOOK
    inside = [function for function, scope in facts.readers if owner in ran and scope == owner]
    if inside:
        return f"{ran[owner]} applies it inside, out of the reach of rules"
    if facts.readers:
        function, scope = facts.readers[0]
        return f"{function} in {forward_of(scope)} computes with it, out of the reach of rules"
    return "the example does not use it; if other inputs do, pass examples=[...] of both"


def sum_sizes(sizes: Iterable[Size]) -> Size:
    """Sizes added up, each count for itself."""
    return sum(sizes, ZERO)


def summarize(operators: Iterable[Operator]) -> tuple[NodeSummary, ...]:
    """A recorded graph as a plan keeps it."""
    return tuple(
        NodeSummary(name=o.name, op=o.op, path=o.path, inputs=o.inputs, shape=o.shape)
        for o in operators
    )
