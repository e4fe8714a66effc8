"""From a plan to a model: bodies are built, checked, and put where the operators were."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, fx, nn

from fxcompress.errors import BudgetError, RecordError, RewriteError
from fxcompress.forms import ConvShape, FormError, JointBody, JointForm, find_form
from fxcompress.forms.form import dense_bias_of, dense_weight_of
from fxcompress.graph.paths import containing
from fxcompress.graph.recorder import Recording, record
from fxcompress.pipeline.agreement import parted
from fxcompress.pipeline.analysis import Analysis
from fxcompress.pipeline.decide import foreseen, make_plan, summarize
from fxcompress.pipeline.measure import measure_whole
from fxcompress.pipeline.sites import Site, SiteBundle
from fxcompress.plans.plan import Plan, SitePlan
from fxcompress.rewrite import (
    Bodies,
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
    given_up = _GivenUp()
    while True:
        planned = given_up.plan(analysis)
        bodies, failures = _build(analysis, planned)
        if not failures:
            analysis.request.show.stage("verify", None)
            rewritten = skeleton(model)
            apply_plan(rewritten, planned, bodies)
            after, failures = _rerecord(rewritten, analysis, planned)
        if not failures:
            break
        given_up.add(failures)
    notes = given_up.notes
    if inplace:
        apply_plan(model, planned, bodies)
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
    counted = planned.model_after.model_copy(update={"macs": after.macs})
    more = after.macs - planned.model_after.macs
    if more > analysis.size.macs // 100:
        notes.append(
            f"the rewritten model does {more:,} multiply-accumulates more than its layers need: "
            "something in its forward reads the weight of a rewritten layer, which computes it"
        )
    return rewritten, planned.model_copy(
        update={
            "model_after": counted,
            "after": summarize(after.operators),
            "held_back": measured,
            "expanded": tuple(
                name
                for name, module in rewritten.named_modules()
                if isinstance(module, ProjectedAttention)
            ),
            "warnings": (*analysis.notes, *notes),
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
    sites = {site.name: site for site in analysis.sites}
    given_up = _GivenUp()
    while True:
        planned = given_up.plan(analysis)
        instead = {entry.name: _trained(entry, sites) for entry in planned.rewritten}
        trained = planned.model_copy(
            update={
                "sites": tuple(
                    site.model_copy(update={"form": instead.get(site.name)})
                    for site in planned.sites
                )
            }
        )
        bodies, failures = _build(analysis, planned, instead)
        if not failures:
            break
        given_up.add(failures)
    made = skeleton(model)
    apply_plan(made, trained, bodies)
    nn.Module.train(made, False)

    joined = planned.bundles

    def weights() -> Iterator[tuple[Site, Tensor, Tensor | None]]:
        for name, body in bodies.single.items():
            site, form = sites[name], find_form(instead[name], sites[name].op, planned.templates)
            weight = form.weight(body, site.shape)
            yield site, site.shape.stored(weight), form.bias(body, site.shape)
        for name, joint in bodies.joint.items():
            for index, entry in enumerate(joined[name]):
                site, member = sites[entry.name], joint.member(index)
                bias = dense_bias_of(member, site.in_features) if site.shape.bias else None
                weight = dense_weight_of(member, site.in_features)
                yield site, site.shape.stored(weight), bias

    parts = [
        *bodies.single.values(),
        *(part for joint in bodies.joint.values() for part in (joint.shared, *joint.heads)),
    ]
    parameters = [parameter for part in parts for parameter in part.parameters()]
    return Student(made, planned, parameters, weights)


def _trained(entry: SitePlan, sites: Mapping[str, Site]) -> str:
    """The form whose body is trained in the place of the one that was chosen."""
    chosen, _ = entry.choice
    return chosen if entry.bundle else sites[entry.name].forms[chosen].trains_as or chosen


def _build(
    analysis: Analysis, planned: Plan, instead: Mapping[str, str] | None = None
) -> tuple[Bodies, dict[str, _Failure]]:
    """A body for every rewritten site or bundle, and the failures by its name.

    Args:
        analysis: has the decomposed weights.
        planned: what to build.
        instead: form of each site by itself that is built for training, unchecked.
    """
    joined = planned.bundles
    bundles = {bundle.name: bundle for bundle in analysis.bundles if bundle.name in joined}
    entries = {entry.name: entry for entry in planned.rewritten}
    alone = [s for s in analysis.sites if s.name in entries and not entries[s.name].bundle]
    tick = analysis.request.show.stage("rewrite", len(entries))
    single: dict[str, fx.GraphModule] = {}
    joint: dict[str, JointBody] = {}
    failures: dict[str, _Failure] = {}

    for site in alone:
        chosen, rank = entries[site.name].choice
        form = site.forms[chosen]
        built = find_form(instead[site.name], site.op, planned.templates) if instead else form
        single[site.name] = body = built.empty(site.shape, rank)
        try:
            factors = form.factors(analysis.decomposed.sites[site.name].target, rank)
            built.fill(body, factors, getattr(_module(analysis, site), "bias", None))
            if not instead:
                _require_still_bias(_module(analysis, site), form.bias(body, site.shape))
                exact = [factor.to(torch.float64) for factor in factors]
                _verify(analysis, site, body, form.product(site.shape, exact))
        except FormError as error:
            failures[site.name] = _Failure(chosen, str(error))
        tick()
    for name, bundle in bundles.items():
        chosen, rank = entries[bundle.sites[0].name].choice
        joint_form = bundle.forms[chosen]
        assert isinstance(rank, int)
        joint[name] = joint_body = joint_form.empty(bundle.shapes, rank)
        try:
            _fill_joint(analysis, bundle, joint_form, joint_body, rank, check=not instead)
        except FormError as error:
            failures[name] = _Failure(chosen, str(error))
        for _ in bundle.sites:
            tick()
    return Bodies(single, joint), failures


def _module(analysis: Analysis, site: Site) -> nn.Module:
    return analysis.model.get_submodule(site.name)


def _fill_joint(
    analysis: Analysis,
    bundle: SiteBundle,
    form: JointForm,
    body: JointBody,
    rank: int,
    *,
    check: bool,
) -> None:
    rows = [site.out_features for site in bundle.sites]
    left, right = analysis.decomposed.bundles[bundle.name].target.truncations().factors(rank)
    lefts = torch.split(left, rows)
    modules = [_module(analysis, site) for site in bundle.sites]
    form.fill(body, lefts, right, [getattr(module, "bias", None) for module in modules])
    if not check:
        return
    for module, head in zip(modules, body.heads, strict=True):
        _require_still_bias(module, form.bias(head))
    for index, (site, part) in enumerate(zip(bundle.sites, lefts, strict=True)):
        product = part.to(torch.float64) @ right.to(torch.float64)
        _verify(analysis, site, body.member(index), product)


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


def _verify(analysis: Analysis, site: Site, body: nn.Module, weight: Tensor) -> None:
    """Compare a body with its operator given the weight that the body stands for."""
    inputs = _sample(analysis, site)
    operator = copy.deepcopy(analysis.model.get_submodule(site.name)).double()
    wide = inputs.double() if inputs.is_floating_point() else inputs
    with torch.no_grad():
        operator.weight = nn.Parameter(site.shape.stored(weight))
        exact = operator(wide)
    channels = -site.shape.dims - 1 if isinstance(site.shape, ConvShape) else -1
    verify(body, exact, inputs, channels)


def _sample(analysis: Analysis, site: Site) -> Tensor:
    met = analysis.recording.samples.get(site.weight)
    usable = met is not None and (met.dtype == site.shape.dtype or not met.is_floating_point())
    if met is not None and usable and len(met):
        return met
    # The recorded input had another type (autocast): any values of the right type will do.
    generator = torch.Generator().manual_seed(0)
    shape = site.shape
    size: tuple[int, ...] = (16, shape.in_features)
    if isinstance(shape, ConvShape):
        size = (2, shape.in_channels, *shape.inputs[0][1:])
    return torch.randn(size, generator=generator).to(shape.device, shape.dtype)


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
        if not _runs(after, within, entry.name):
            failures[entry.bundle or entry.name] = _Failure(
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
