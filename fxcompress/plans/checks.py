"""Whether a plan that was read is one that could have been made: everything in it that can be told.

A plan may come from a stranger, or from a text editor.  What it says of an operator follows from
the operator itself (``"linear 576→1536"``), the form and the rank, and sums follow from the sites;
so all of it is computed anew and compared.  Nothing is built but bodies on the meta device, which
take no memory.  What is measured (losses, times) or counted on a recorded example has to be
plausible only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from fxcompress.forms import Fitted, JointForm, Rank, Shape, find_form, fit
from fxcompress.forms.narrow import narrowed
from fxcompress.operators.modules import parse_shape
from fxcompress.operators.per_channel import PerChannel
from fxcompress.pipeline.agreement import units
from fxcompress.plans.layers import left, site_layers
from fxcompress.plans.plan import Fidelity, Held, Limit, Part, Plan, SitePlan, Size, total_size
from fxcompress.plans.units import UNITS, CountedUnit

Flaw = tuple[str, str]
"""Where (``"sites[3].rank"``), and what is wrong there."""

META = torch.device("meta")
CLOSE = 1e-6
"""Relative difference of sums of rounded numbers that is let pass."""

MOST_ROWS = 2**40


def plan_problems(plan: Plan, *, parts: bool = True) -> Iterator[Flaw]:
    """What is wrong with a plan and with the earlier ones in it, one after the other.

    Args:
        plan: read from a file.
        parts: whether to build bodies on the meta device, to compare their parts; whoever builds
            them anyway compares with :func:`body_problems`.
    """
    rewritten: set[str] = set()
    for earlier in plan.earlier:
        rewritten |= {site.name for site in earlier.rewritten}
    for index, site in enumerate(plan.sites):
        if site.name in rewritten:
            yield f"sites[{index}].name", f"{site.name} was rewritten before"
    for index, earlier in enumerate(plan.earlier):
        place = f"earlier[{index}]."
        if earlier.earlier:
            yield f"{place}earlier", "an earlier plan holds none itself"
        yield from _placed(place, _step_problems(earlier, parts))
    yield from _step_problems(plan, parts)


def body_problems(
    plan: Plan, parts: Callable[[Sequence[SitePlan]], Sequence[tuple[Part, ...]]]
) -> Iterator[Flaw]:
    """Sites whose parts are not those of their bodies.

    Args:
        plan: without :func:`plan_problems`.
        parts: of a site, or of all members of a bundle.
    """
    places = {site.name: f"sites[{index}].parts" for index, site in enumerate(plan.sites)}
    for sites in plan.groups.values():
        for site, found in zip(sites, parts(sites), strict=True):
            if site.parts != found:
                yield places[site.name], "they are not what the form consists of"


def _placed(prefix: str, problems: Iterator[Flaw]) -> Iterator[Flaw]:
    return ((f"{prefix}{place}", message) for place, message in problems)


def _step_problems(plan: Plan, parts: bool) -> Iterator[Flaw]:
    shapes: dict[str, Shape] = {}
    sound = True
    for index, site in enumerate(plan.sites):
        for place, message in _site_problems(site, plan, shapes):
            sound = False
            yield f"sites[{index}].{place}", message
    for name, template in plan.templates.items():
        if template.name != name:
            yield f"templates.{name}.name", f"it is '{template.name}'"
    if not sound:
        return  # the rest is about sums and bundles of sites
    for name, sites in plan.bundles.items():
        index = plan.sites.index(sites[0])
        for place, message in _bundle_problems(sites, plan, shapes):
            sound = False
            yield f"sites[{index}].{place}", f"bundle {name}: {message}"
    if not sound:
        return
    if parts:
        yield from body_problems(plan, lambda sites: _parts(plan, sites, shapes))
    yield from _folded_problems(plan, shapes)
    yield from _total_problems(plan)
    yield from _budget_problems(plan)
    trade = plan.tradeoff
    if trade is not None and trade.costs[trade.now] > plan.budget.limit * (1 + CLOSE):
        yield "tradeoff.now", "it costs more than the budget"
    if plan.fidelity is not None:
        yield from _placed("fidelity.", _fidelity_problems(plan, plan.fidelity))


# ---- sites ----------------------------------------------------------------------------


def _site_problems(site: SitePlan, plan: Plan, shapes: dict[str, Shape]) -> Iterator[Flaw]:
    """Of one site; its shape is added to ``shapes``."""
    try:
        shape = parse_shape(site.operator, site.bias, getattr(torch, site.dtype), META)
    except ValueError as error:
        yield "operator", str(error)
        return
    shapes[site.name] = shape
    said = (site.op, site.in_features, site.out_features)
    if said != (shape.op, shape.in_features, shape.out_features):
        yield "op", f"op, in_features and out_features are not those of {site.operator}"
        return
    if not 0 <= site.energy <= 1:
        yield "energy", "it is a share"
    if site.held and not site.bundle:
        yield "held", "it is for the last site of a bundle"
    yield from _size_problems("before", site.before, lambda unit: unit.of_operator(shape), shape)
    if site.form is None:
        yield from _dense_problems(site, shape)
    elif not site.bundle:
        yield from _single_problems(site, plan, shape)


def _dense_problems(site: SitePlan, shape: Shape) -> Iterator[Flaw]:
    if site.full_rank != shape.full_rank:
        yield "full_rank", f"{site.full_rank}, and {site.operator} has {shape.full_rank}"
    if site.after != site.before:
        yield "after", "it is not as before, and the site stays dense"
    if site.bundle or site.order or site.parts or site.predicted:
        yield "form", "bundle, order, parts and predicted are for sites that are rewritten"


def _single_problems(site: SitePlan, plan: Plan, shape: Shape) -> Iterator[Flaw]:
    form, rank = site.choice
    found = _fitted(form, site.op, plan, [shape], order=site.order)
    if found is None or site.op not in found.form.operators:
        yield "form", f"{form} is no form for one {site.op}"
        return
    if form not in site.forms:
        yield "forms", f"they lack the form {form}"
    if misfit := found.misfit():
        yield "form", misfit
        return
    if problem := _order_problem(site, found):
        yield "order", problem
        return
    yield from _rank_problems(site, found.full_rank())
    if site.full_rank != found.full_rank():
        return
    ranks = np.array([rank], dtype=np.int64)
    yield from _size_problems(
        "after", site.after, lambda unit: int(unit.of_form(found, ranks)[0]), shape
    )
    for unit in site.before.units:
        dense = site.before[unit.word]
        if unit.per_row and shape.takes == "rows" and dense >= 0:
            rows = dense // unit.of_operator(shape)
            if rows < MOST_ROWS:
                counted = fit(found.form, [shape.counted_on(rows, ())])
                if site.after[unit.word] != int(unit.of_form(counted, ranks)[0]):
                    yield f"after.{unit.word}", f"they are not those of {form} at rank {rank}"


def _order_problem(site: SitePlan, found: Fitted) -> str | None:
    """Why the body of a form cannot put channels in the order of a site, or None."""
    if not site.order or (site.order <= found.places() and found.places() % site.order == 0):
        return None
    return f"{found.form.name} does not put its channels in order in {site.order} blocks"


def _rank_problems(site: SitePlan, full: Rank) -> Iterator[Flaw]:
    if site.full_rank != full:
        yield "full_rank", f"{site.full_rank}, and {site.operator} has {full} as {site.form}"


def _size_problems(
    place: str, size: Size, count: Callable[[CountedUnit], int], shape: Shape
) -> Iterator[Flaw]:
    """Of counts that follow from the shape, and of those that are per row of an unknown number.

    Args:
        place: ``"before"`` or ``"after"``.
        size: what the plan says.
        count: what it is in a unit, for one row.
        shape: of the operator.
    """
    for unit in size.units:
        here, number = f"{place}.{unit.word}", size[unit.word]
        if not unit.per_row:
            if number != (expected := count(unit)):
                yield here, f"{number}, and it has {expected}"
        elif number < 0:
            yield here, f"{number}"
        elif place == "before" and shape.takes == "rows" and number % count(unit):
            yield here, f"{number}, no multiple of the {count(unit)} of one row"


def _fitted(
    form: str,
    op: str,
    plan: Plan,
    shapes: Sequence[Shape],
    held: Sequence[Held] = (),
    order: int = 0,
) -> Fitted | None:
    """A form for operators; None if there is none of that name for them."""
    known = [PerChannel(each.name, each.parameters, each.bytes) for each in held]
    try:
        return fit(find_form(form, op, plan.templates), shapes, known, order=order)
    except (KeyError, ValueError):
        return None


def _bundle_problems(
    sites: Sequence[SitePlan], plan: Plan, shapes: dict[str, Shape]
) -> Iterator[Flaw]:
    first, own = sites[0], [shapes[site.name] for site in sites]
    if first.form is None:
        yield "bundle", "a site that stays dense is in none"
        return
    form, rank = first.choice
    found = _fitted(form, first.op, plan, own, sites[-1].held)
    if found is None and all(site.op == "linear" for site in sites):
        yield "form", f"{form} is no form for several operators"
        return
    if found is None or not isinstance(rank, int):
        yield "op", f"{form} is for other operators, and has one rank"
        return
    if form in plan.templates and len(plan.templates[form].roles) != len(sites):
        yield "form", f"{form} is for {len(plan.templates[form].roles)} operators"
        return
    if reason := _unconnected(own, found):
        yield "in_features", reason
        return
    if any(form not in site.forms for site in sites):
        yield "forms", f"they lack the form {form}"
    if any(site.order and site.then is None for site in sites):
        yield "order", f"{form} puts no input in order"
        return
    if misfit := found.misfit():
        yield "form", misfit
        return
    full = found.full_rank()
    yield from _rank_problems(first, full)
    if [site.member for site in sites] != list(range(len(sites))):
        yield "member", "its sites are not counted from 0"
    if any(site.full_rank != full for site in sites) or len({site.rank for site in sites}) > 1:
        yield "rank", "its sites differ in rank"
        return
    ranks = np.array([rank], dtype=np.int64)
    after = total_size(site.after for site in sites)
    fixed = [unit for unit in after.units if not unit.per_row]
    expected = {unit.word: int(unit.of_form(found, ranks)[0]) for unit in fixed}
    then = [site for site in sites if site.then is not None]
    if then and not (isinstance(found.form, JointForm) and found.form.hidden):
        yield "then", f"{form} leaves no operators with fewer channels"
        return
    for site in then:
        assert site.then is not None
        shape = narrowed(own, rank)[site.member]
        beside = _fitted(site.then.form, site.op, plan, [shape], order=site.order)
        if beside is None or site.op not in beside.form.operators:
            yield "then", f"{site.then.form} is no form for one {site.op}"
            return
        if misfit := beside.misfit() or _order_problem(site, beside):
            yield "then", misfit
            return
        if site.then.full_rank != (full := beside.full_rank()):
            yield "then", f"full_rank is {site.then.full_rank}, and {shape} has {full}"
            return
        ranks = np.array([site.then.rank], dtype=np.int64)
        for unit in fixed:
            expected[unit.word] += int(unit.of_form(beside, ranks)[0]) - unit.of_operator(shape)
    if any(after[unit.word] != expected[unit.word] for unit in fixed):
        yield "after", "they are not what the form has at this rank"


def _unconnected(shapes: Sequence[Shape], found: Fitted) -> str | None:
    """Why operators are not on one input, or do not produce what the last one reads."""
    if len({shape.dtype for shape in shapes}) > 1:
        return "its sites differ in type or input"
    if isinstance(found.form, JointForm) and found.form.hidden:
        if any(shape.out_features % shapes[-1].in_features for shape in shapes[:-1]):
            return "its last site reads other channels"
        grouped = any(s.matrix[0] > 1 and not s.is_channelwise for s in shapes[:-1])
        return "its sites have groups of channels" if grouped or shapes[-1].matrix[0] > 1 else None
    alike = len({shape.in_features for shape in shapes}) == 1
    return None if alike else "its sites differ in type or input"


def _parts(
    plan: Plan, sites: Sequence[SitePlan], shapes: dict[str, Shape]
) -> list[tuple[Part, ...]]:
    """Of the bodies of a site or a bundle, without memory."""
    form, rank = sites[0].choice
    own = [shapes[site.name] for site in sites]
    found = fit(find_form(form, sites[0].op, plan.templates), own, order=sites[0].own_order)
    bodies = {sites[0].group: found.empty(rank)}
    for site in sites:
        if site.then is not None:
            bodies[site.name] = left(site, plan, found).empty(site.then.rank)
    return site_layers(sites, bodies)


# ---- what is about several sites ------------------------------------------------------


def _folded_problems(plan: Plan, shapes: dict[str, Shape]) -> Iterator[Flaw]:
    seen: set[str] = set()
    for index, pair in enumerate(plan.folded):
        place = f"folded[{index}]"
        if {pair.convolution, pair.norm} & seen or pair.convolution == pair.norm:
            yield place, "one of both is folded already"
        seen |= {pair.convolution, pair.norm}
        shape = shapes.get(pair.convolution)
        if shape is None or shape.takes != "patches":
            yield f"{place}.convolution", f"{pair.convolution} is no convolution among the sites"


def _total_problems(plan: Plan) -> Iterator[Flaw]:
    before = total_size(site.before for site in plan.sites)
    after = total_size(site.after for site in plan.sites)
    for name, size in (("model_before", plan.model_before), ("model_after", plan.model_after)):
        if min(size.root.values()) < 0:
            yield name, "it has a negative count"
    fixed = [unit.word for unit in plan.model_before.units if not unit.per_row]
    if any(plan.model_before[unit] < before[unit] for unit in fixed):
        yield "model_before", "it is less than the sites have together"
    if plan.folded:
        return  # norms that are gone count, too, and stand nowhere
    for unit in fixed:
        expected = plan.model_before[unit] - (before[unit] - after[unit])
        if plan.model_after[unit] != expected:
            yield f"model_after.{unit}", f"{plan.model_after[unit]}, and it has {expected}"


def _budget_problems(plan: Plan) -> Iterator[Flaw]:
    predicted = math.fsum(site.predicted for site in plan.sites)
    if not _close(plan.budget.predicted, predicted):
        yield "budget.predicted", f"{plan.budget.predicted}, and the sites have {predicted}"
    first = Limit(**plan.budget.model_dump(include={*Limit.model_fields} - {"rule"}))
    for index, limit in enumerate((first, *plan.limits)):
        place = f"limits[{index - 1}]" if index else "budget"
        if not 0 < limit.keep <= 1:
            yield f"{place}.keep", f"{limit.keep} is not within 0..1"
        if limit.cost > limit.limit and not _close(limit.cost, limit.limit):
            yield f"{place}.cost", f"{limit.cost} is above the limit {limit.limit}"
        if limit.of == "matched" and not _close(limit.limit, limit.keep * limit.dense):
            yield f"{place}.limit", f"{limit.limit}, and it is {limit.keep * limit.dense}"
        if not isinstance(UNITS[limit.unit], CountedUnit) or limit.rule:
            continue
        for key, size in (("dense", "before"), ("cost", "after")):
            expected = sum(getattr(site, size)[limit.unit] for site in plan.sites)
            if not _close(getattr(limit, key), expected):
                yield f"{place}.{key}", f"{getattr(limit, key)}, and the sites have {expected}"


def _close(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=CLOSE, abs_tol=1e-12)


def _fidelity_problems(plan: Plan, fidelity: Fidelity) -> Iterator[Flaw]:
    if {one.name: one.sites for one in fidelity.sites} != units(plan) or len(fidelity.sites) != len(
        units(plan)
    ):
        yield "sites", "they are not what is rewritten"
