"""From a plan to a model: bodies are built, checked, and put where the operators were."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn

from fxcompress.errors import BudgetError, RecordError, RewriteError
from fxcompress.forms import Body, Fitted, FormError, Rank, find_form, fit
from fxcompress.forms.narrow import rows_of
from fxcompress.forms.ordered import blocks_of
from fxcompress.graph.paths import containing
from fxcompress.graph.recorder import Recording, record
from fxcompress.operators.applied import operator_at, operator_path
from fxcompress.operators.modules import canonical_weight, shape_of
from fxcompress.operators.shape import channels_of
from fxcompress.operators.stacked import release_memory
from fxcompress.pipeline.agreement import parted
from fxcompress.pipeline.analysis import Analysis
from fxcompress.pipeline.decide import foreseen, make_plan, summarize
from fxcompress.pipeline.decomposition import widened
from fxcompress.pipeline.measure import measure_whole
from fxcompress.pipeline.sites import Group, Site
from fxcompress.pipeline.speed import measured_speed
from fxcompress.plans.plan import BudgetOutcome, Limit, Plan, SitePlan, Size, total_size
from fxcompress.plans.units import UNITS, CountedUnit
from fxcompress.rewrite import (
    ProjectedAttention,
    apply_plan,
    own_parameters,
    skeleton,
    verify,
)

M = TypeVar("M", bound=nn.Module)


def rewrite(model: M, analysis: Analysis, *, inplace: bool = False) -> tuple[M, Plan]:
    """Plan, build, substitute and check; a site that fails is planned again without that form.

    So the budget still holds after a failure: the ranks of all other sites are found anew.

    Raises:
        BudgetError: the budget cannot be met.
        RewriteError: the rewritten model does not run.
    """
    dense = skeleton(model)  # before anything is changed in place
    given_up = _GivenUp()
    while True:
        planned = given_up.plan(analysis)
        bodies, failures = _build(analysis, planned)
        if not failures:
            analysis.request.show.stage("verify", None)
            rewritten = skeleton(model)
            planned = _as_built(analysis, planned, bodies)
            apply_plan(rewritten, planned, bodies)
            after, failures = _rerecord(rewritten, analysis, planned)
        if not failures:
            break
        given_up.add(failures)
    notes = given_up.notes
    if inplace:
        apply_plan(model, planned, bodies)
        release_memory(model)
        rewritten = model
    else:
        rewritten = own_parameters(rewritten, model)
    planned = foreseen(analysis, planned)
    measured = measure_whole(
        analysis.model, rewritten, analysis.estimate.held_back.batches,
        analysis.rules.rules.metric.output, analysis.request,
    )  # fmt: skip
    if measured is not None:
        notes += parted(planned, measured)
    foretold = planned.model_after
    counted = Size.of(
        lambda unit: unit.of_model(rewritten, after) if unit.per_row else foretold[unit.word]
    )
    more = after.macs - planned.model_after.macs
    if more > analysis.size.macs // 100:
        notes.append(
            f"the rewritten model does {more:,} multiply-accumulates more than its layers need on "
            "the recorded batch: something in its forward reads the weight of a rewritten layer, "
            "which computes it"
        )
    # All processes take the time: a forward may wait for the others.
    timed = measured_speed(dense, rewritten, planned, analysis)
    speed, slow = analysis.request.processes.shared(timed)
    return rewritten, planned.model_copy(
        update={
            "model_after": counted,
            "speed": speed,
            "after": summarize(after.operators),
            "held_back": measured,
            "expanded": tuple(
                name
                for name, module in rewritten.named_modules()
                if isinstance(module, ProjectedAttention)
            ),
            "warnings": (*analysis.notes, *notes, *slow),
        }
    )


def _as_built(analysis: Analysis, planned: Plan, bodies: Mapping[str, Body]) -> Plan:
    """The plan with the orders that bodies put channels in; it had counted the largest ones."""
    units = {key: (group, form, rank) for key, group, form, rank in _units(analysis, planned)}
    saved: dict[str, Size] = {}
    entries = []
    for entry in planned.sites:
        if entry.name in units:
            group, form, rank = units[entry.name]
            if group.forms[form].places():
                body = bodies[entry.name]
                order = blocks_of(body.heads[0])
                (after,) = group.sizes(form, rank, body, order)
                saved[entry.name] = entry.after - after
                entry = entry.model_copy(update={"order": order, "after": after})
        entries.append(entry)

    def cost(limit: Limit | BudgetOutcome, rule: str) -> dict[str, float]:
        """What is saved counts for a budget of all, or of one rule."""
        mine = [s.name for s in entries if s.name in saved and rule in ("", s.rule)]
        counted = isinstance(UNITS[limit.unit], CountedUnit)
        less = sum(saved[name][limit.unit] for name in mine) if counted else 0
        return {"cost": limit.cost - less}

    return planned.model_copy(
        update={
            "sites": tuple(entries),
            "model_after": planned.model_after - total_size(saved.values()),
            "budget": planned.budget.model_copy(update=cost(planned.budget, "")),
            "limits": tuple(one.model_copy(update=cost(one, one.rule)) for one in planned.limits),
        }
    )


@dataclass(frozen=True)
class _Failure:
    form: str
    reason: str


@dataclass
class _GivenUp:
    """Forms that failed, by site, and what there is to say about it."""

    excluded: dict[str, frozenset[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, failures: Mapping[str, _Failure]) -> None:
        for name, failure in failures.items():
            self.excluded[name] = self.excluded.get(name, frozenset()) | {failure.form}
            self.notes.append(f"{name}: {failure.form} was given up: {failure.reason}")

    def plan(self, analysis: Analysis) -> Plan:
        """A plan without them."""
        try:
            return make_plan(analysis, self.excluded)
        except BudgetError as error:
            if not self.notes:
                raise
            raise BudgetError("\n".join([str(error), *self.notes])) from error


@dataclass(frozen=True, eq=False)
class Student:
    """A compressed model that is trained, not kept: forms stand in for others that train better.

    Attributes:
        model: shares all parameters but those of rewritten sites with what it was made from.
        plan: with the forms and ranks that were asked for.
        parameters: of the bodies.
        weights: of every rewritten site its weight and bias as a module stores them.
    """

    model: nn.Module
    plan: Plan
    parameters: Sequence[nn.Parameter]
    weights: Callable[[], Iterator[tuple[Site, Tensor, Tensor | None]]]


def student(model: nn.Module, analysis: Analysis) -> Student:
    """Plan, build and substitute, without the checks of :func:`rewrite`.

    Args:
        model: as it was analysed; only read.
        analysis: of it.

    Raises:
        BudgetError: the budget cannot be met.
    """
    given_up = _GivenUp()
    while True:
        planned = given_up.plan(analysis)
        units = [*_units(analysis, planned)]
        instead = {key: group.forms[form].form.trains_as or form for key, group, form, _ in units}
        bodies, failures = _build(analysis, planned, instead)
        if not failures:
            break
        given_up.add(failures)
    made = skeleton(model)
    apply_plan(made, _trained(planned, instead), bodies)
    nn.Module.train(made, False)

    def weights() -> Iterator[tuple[Site, Tensor, Tensor | None]]:
        for name, entries in planned.groups.items():
            group, body = analysis.group(name), bodies[name]
            if body.kept is None:
                form = _form(group, instead[name], planned)
                found = [*zip(form.weights(body), form.biases(body), strict=True)]
            else:
                found = [
                    _widened(analysis, group, entry.member, body.kept, narrow(group, entry))
                    for entry in entries
                ]
            for site, (weight, bias) in zip(group.sites, found, strict=True):
                yield site, site.shape.stored(weight), bias

    def narrow(group: Group, entry: SitePlan) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of what is left of an operator."""
        if entry.then is None:
            layer, site = operator_at(made, entry.name), group.sites[entry.member]
            return canonical_weight(layer), layer.bias if site.shape.bias else None  # type: ignore[return-value]
        left = group.left_of(*entry.narrowing)
        form, body = _form(left, instead[entry.name], planned), bodies[entry.name]
        (weight,), (bias,) = form.weights(body), form.biases(body)
        return weight, bias

    parameters: list[nn.Parameter] = []
    for key, group, _, _ in units:
        body = bodies[key]
        if body.kept is None:
            parameters += [parameter for part in body.parts for parameter in part.parameters()]
            continue
        for site in group.sites:
            if site.name not in bodies:
                layer = operator_at(made, site.name)
                names = ("weight", "bias") if site.shape.bias else ("weight",)
                parameters += [layer.get_parameter(each) for each in names]
    return Student(made, planned, parameters, weights)


def _units(analysis: Analysis, planned: Plan) -> Iterator[tuple[str, Group, str, Rank]]:
    """All that a body is built for: what its key is, the operators, a form and its rank.

    A narrowed hidden value has one by the name of its group, and each of its operators that takes
    another form beside that has one by its own name, after it.
    """
    for name, entries in planned.groups.items():
        group = analysis.group(name)
        yield name, group, *entries[0].choice
        for entry in entries:
            if entry.then is not None:
                left = group.left_of(*entry.narrowing)
                yield entry.name, left, entry.then.form, entry.then.rank


def _trained(planned: Plan, instead: Mapping[str, str]) -> Plan:
    """The plan with the forms whose bodies are trained in the place of those that were chosen."""
    sites = []
    for site in planned.sites:
        then = site.then and site.then.model_copy(update={"form": instead[site.name]})
        sites.append(site.model_copy(update={"form": instead.get(site.group), "then": then}))
    return planned.model_copy(update={"sites": tuple(sites)})


def _widened(
    analysis: Analysis,
    group: Group,
    member: int,
    kept: Tensor,
    narrow: tuple[Tensor, Tensor | None],
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias for all channels of a hidden value, given those of the channels kept."""
    weight, bias = narrow
    site = group.sites[member]
    wide, own = widened(group, member, kept, weight, site.weight_in(analysis.model)), None
    if site is not group.sites[-1]:
        own = _bias(analysis, site)
    if bias is None or own is None:
        return wide, bias
    places = rows_of(kept, site.out_features, group.sites[-1].in_features)
    return wide, own.index_copy(0, places, bias)


def _form(group: Group, name: str, planned: Plan) -> Fitted:
    """A form for the operators of a group, whether its rule offers it or not."""
    return fit(find_form(name, group.sites[0].op, planned.templates), group.shapes)


def _build(
    analysis: Analysis, planned: Plan, instead: Mapping[str, str] | None = None
) -> tuple[dict[str, Body], dict[str, _Failure]]:
    """A body for every group that is rewritten, and the failures by its name.

    Args:
        analysis: has the decomposed weights.
        planned: what to build.
        instead: form of each group that is built for training, unchecked.
    """
    tick = analysis.request.show.stage("rewrite", len(planned.rewritten))
    bodies: dict[str, Body] = {}
    failures: dict[str, _Failure] = {}
    for key, group, chosen, rank in _units(analysis, planned):
        form = group.forms[chosen]
        built = _form(group, instead[key], planned) if instead else form
        modules = _operators(analysis, group, bodies)
        bodies[key] = body = built.empty(rank)
        try:
            factors = form.factors(analysis.decomposed.groups[group.name].target, rank)
            built.fill(body, factors, [getattr(module, "bias", None) for module in modules])
            if not instead:
                for site, bias in zip(group.sites, form.biases(body), strict=True):
                    _require_still_bias(operator_at(analysis.model, site.name), bias)
                if group.hidden:
                    _verify_hidden(analysis, group, body, factors)
                else:
                    exact = form.products([factor.to(torch.float64) for factor in factors])
                    for index, (module, weight) in enumerate(zip(modules, exact, strict=True)):
                        assert weight is not None
                        inputs = _inputs(analysis, group, index, bodies)
                        _verify(module, inputs, body.member(index), weight)
        except FormError as error:
            failures[group.name] = _Failure(chosen, str(error))
        analysis.room.cool()
        for _ in group.sites if group.narrowing is None else ():
            tick()
    return bodies, failures


def _operators(analysis: Analysis, group: Group, bodies: Mapping[str, Body]) -> list[nn.Module]:
    """What bodies take the place of: layers of the model, or what narrowing one leaves."""
    if group.narrowing is not None:
        head = bodies[group.narrowing.hidden].heads[group.narrowing.member]
        return [head.get_submodule("layer")]
    return [operator_at(analysis.model, site.name) for site in group.sites]


def _inputs(analysis: Analysis, group: Group, index: int, bodies: Mapping[str, Body]) -> Tensor:
    """What an operator of a group was given in the recorded pass, or would be."""
    place = group.narrowing
    if place is None:
        return _sample(analysis, group.sites[index])
    hidden, kept = analysis.group(place.hidden), bodies[place.hidden].kept
    assert kept is not None
    return _kept_inputs(analysis, hidden, hidden.sites[place.member], kept)


def _kept_inputs(analysis: Analysis, hidden: Group, site: Site, kept: Tensor) -> Tensor:
    """What an operator around a hidden value is given when only some of its channels are left."""
    inputs = _sample(analysis, site)
    if site is hidden.sites[-1] or site.shape.is_channelwise:
        inputs = inputs.index_select(channels_of(site.shape), kept)
    return inputs


def _require_still_bias(original: nn.Module, bias: Tensor | None) -> None:
    """A bias that is frozen must not move with a weight that learns.

    Args:
        original: the operator.
        bias: of the body that takes its place, as its form tells it.

    Raises:
        FormError: it would: it is computed from factors.
    """
    frozen = original._parameters.get("bias")
    weight = original._parameters.get("weight")
    if frozen is None or frozen.requires_grad or weight is None or not weight.requires_grad:
        return
    if not isinstance(bias, nn.Parameter):
        raise FormError("its bias is frozen, and this form mixes it with the weight, which learns")


def _verify(operator: nn.Module, inputs: Tensor, body: nn.Module, weight: Tensor) -> None:
    """Compare a body with its operator given the weight that the body stands for."""
    shape, operator = shape_of(operator), copy.deepcopy(operator).double()
    wide = inputs.double() if inputs.is_floating_point() else inputs
    with torch.no_grad():
        operator.weight = nn.Parameter(shape.stored(weight))
        exact = operator(wide)
    verify(body, exact, inputs, channels_of(shape))


def _verify_hidden(analysis: Analysis, group: Group, body: Body, factors: Sequence[Tensor]) -> None:
    """Compare what makes channels with its part that is kept, and the consumer with its new weight.

    Args:
        analysis: has the operators.
        group: what makes channels, and the consumer last.
        body: for them.
        factors: the channels that are kept, the consumer's weight, and parts of the other weights.
    """
    kept, refitted, *rows = factors
    for site, head, factor in zip(group.sites, body.heads, (*rows, refitted), strict=True):
        exact = copy.deepcopy(head.get_submodule("layer")).double()
        shape, last = shape_of(exact), site is group.sites[-1]
        inputs, bias = _kept_inputs(analysis, group, site, kept), _bias(analysis, site)
        weight = factor if last else shape.of_outputs(factor)
        places = rows_of(kept, site.out_features, group.sites[-1].in_features)
        with torch.no_grad():
            exact.weight = nn.Parameter(shape.stored(weight.double()))
            if bias is not None:
                exact.bias = nn.Parameter((bias if last else bias[places]).double())
            outputs = exact(inputs.double())
        verify(head, outputs, inputs, channels_of(site.shape))


def _bias(analysis: Analysis, site: Site) -> Tensor | None:
    """The bias of an operator as the model has it, detached."""
    bias: Tensor | None = getattr(operator_at(analysis.model, site.name), "bias", None)
    return None if bias is None else bias.detach()


def _sample(analysis: Analysis, site: Site) -> Tensor:
    met = analysis.recording.samples.get(site.weight)
    usable = met is not None and (met.dtype == site.shape.dtype or not met.is_floating_point())
    if met is not None and usable and len(met):
        return met
    # The recorded input had another type (autocast): any values of the right type will do.
    return site.shape.example()


def _rerecord(
    rewritten: nn.Module, analysis: Analysis, planned: Plan
) -> tuple[Recording, dict[str, _Failure]]:
    """The graph that really runs now, and the sites whose body does not."""
    try:
        after = record(rewritten, analysis.examples, forward=analysis.request.forward)
    except RecordError as error:
        paths = ", ".join(entry.name for entry in planned.rewritten[:5])
        raise RewriteError(
            f"the model does not run with its layers rewritten ({paths}, ...); a part of it may "
            "insist on the class or on the parameters of a layer: take that one out of the rules "
            f"(unless: [{{name: ...}}])\n{error.__cause__!r}"
        ) from error
    failures = {}
    within = containing(after.called)
    for entry in planned.rewritten:
        if not _runs(after, within, operator_path(rewritten, entry.name)):
            failures[entry.group] = _Failure(
                str(entry.form), "the model runs past it, so the rewritten layer would save nothing"
            )
    return after, failures


def _runs(after: Recording, within: Collection[str], site: str) -> bool:
    """Whether a rewritten operator is called: its facade, or its nodes in an fx graph.

    That its parameters are read is not enough: a model that runs past a layer may compute its
    weight.

    Args:
        after: of the rewritten model.
        within: the paths that contain one that was called.
        site: its path.
    """
    return site in after.called or (f"{site}.body" not in after.called and site in within)
