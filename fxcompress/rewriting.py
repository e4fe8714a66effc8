"""From a plan to a model: bodies are built, checked, and put where the operators were."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, fx, nn

from fxcompress.analysis import Analysis
from fxcompress.errors import BudgetError, RecordError, RewriteError
from fxcompress.forms import ConvShape, Form, FormError, JointBody, JointForm, Rank
from fxcompress.graph.inputs import Forward
from fxcompress.graph.recorder import Recording, record
from fxcompress.plan import Plan
from fxcompress.planning import make_plan, summarize
from fxcompress.report.progress import Progress
from fxcompress.rewrite import (
    Bodies,
    ProjectedAttention,
    apply_plan,
    own_parameters,
    skeleton,
    verify,
)
from fxcompress.sites import Site, SiteBundle

M = TypeVar("M", bound=nn.Module)


def rewrite(
    model: M,
    analysis: Analysis,
    forward: Forward | None,
    show: Progress,
    *,
    inplace: bool = False,
) -> tuple[M, Plan]:
    """Plan, build, substitute and check; a site that fails is planned again without that form.

    So the budget still holds after a failure: the ranks of all other sites are found anew.

    Raises:
        BudgetError: the budget cannot be met.
        RewriteError: the rewritten model does not run.
    """
    excluded: dict[str, frozenset[str]] = {}
    notes: list[str] = []  # about the rewrite
    while True:
        try:
            planned = make_plan(analysis, excluded, show)
        except BudgetError as error:
            if not notes:
                raise
            raise BudgetError("\n".join([str(error), *notes])) from error
        bodies, failures = _build(analysis, planned, show)
        if not failures:
            show.stage("verify", None)
            rewritten = skeleton(model)
            apply_plan(rewritten, planned, bodies)
            after, failures = _rerecord(rewritten, analysis, planned, forward)
        if not failures:
            break
        for name, failure in failures.items():
            excluded[name] = excluded.get(name, frozenset()) | {failure.form}
            notes.append(f"{name}: {failure.form} was given up: {failure.reason}")
    if inplace:
        apply_plan(model, planned, bodies)
        rewritten = model
    else:
        rewritten = own_parameters(rewritten, model)
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


def _build(analysis: Analysis, planned: Plan, show: Progress) -> tuple[Bodies, dict[str, _Failure]]:
    """A verified body for every rewritten site or bundle, and the failures by its name."""
    bundles = {bundle.name: bundle for bundle in analysis.bundles if bundle.name in planned.bundles}
    entries = {entry.name: entry for entry in planned.rewritten}
    alone = [s for s in analysis.sites if s.name in entries and not entries[s.name].bundle]
    tick = show.stage("rewrite", len(entries))
    single: dict[str, fx.GraphModule] = {}
    joint: dict[str, JointBody] = {}
    failures: dict[str, _Failure] = {}

    for site in alone:
        chosen, rank = entries[site.name].choice
        form = site.forms[chosen]
        single[site.name] = body = form.empty(site.shape, rank)
        try:
            _fill(analysis, site, form, body, rank)
        except FormError as error:
            failures[site.name] = _Failure(chosen, str(error))
        tick()
    for name, bundle in bundles.items():
        chosen, rank = entries[bundle.sites[0].name].choice
        joint_form = bundle.forms[chosen]
        assert isinstance(rank, int)
        joint[name] = joint_body = joint_form.empty(bundle.shapes, rank)
        try:
            _fill_joint(analysis, bundle, joint_form, joint_body, rank)
        except FormError as error:
            failures[name] = _Failure(chosen, str(error))
        for _ in bundle.sites:
            tick()
    return Bodies(single, joint), failures


def _fill(analysis: Analysis, site: Site, form: Form, body: fx.GraphModule, rank: Rank) -> None:
    module = analysis.model.get_submodule(site.name)
    factors = form.factors(analysis.decomposed.sites[site.name].target, rank)
    form.fill(body, factors, getattr(module, "bias", None))
    exact = [factor.to(torch.float64) for factor in factors]
    _verify(analysis, site, body, form.product(site.shape, exact))


def _fill_joint(
    analysis: Analysis, bundle: SiteBundle, form: JointForm, body: JointBody, rank: int
) -> None:
    rows = [site.out_features for site in bundle.sites]
    left, right = analysis.decomposed.bundles[bundle.name].target.truncations().factors(rank)
    lefts = torch.split(left, rows)
    modules = [analysis.model.get_submodule(site.name) for site in bundle.sites]
    form.fill(body, lefts, right, [getattr(module, "bias", None) for module in modules])
    for index, (site, part) in enumerate(zip(bundle.sites, lefts, strict=True)):
        product = part.to(torch.float64) @ right.to(torch.float64)
        _verify(analysis, site, body.member(index), product)


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
    rewritten: nn.Module, analysis: Analysis, planned: Plan, forward: Forward | None
) -> tuple[Recording, dict[str, _Failure]]:
    """The graph that really runs now, and the sites whose body does not."""
    try:
        after = record(rewritten, analysis.examples, forward=forward)
    except RecordError as error:
        paths = ", ".join(entry.name for entry in planned.rewritten[:5])
        raise RewriteError(
            f"the model does not run with its layers rewritten ({paths}, ...); a part of it may "
            "insist on the class or on the parameters of a layer: take that one out of the rules "
            f"(unless: [{{name: ...}}])\n{error.__cause__!r}"
        ) from error
    failures = {}
    for entry in planned.rewritten:
        if not _runs(after, entry.name):
            failures[entry.bundle or entry.name] = _Failure(
                str(entry.form), "the model runs past it, so the rewritten layer would save nothing"
            )
    return after, failures


def _runs(after: Recording, site: str) -> bool:
    """Whether a rewritten operator is called: its facade, or its nodes in an fx graph.

    That its parameters are read is not enough: a model that runs past a layer may compute its
    weight.
    """
    return site in after.called or (
        f"{site}.body" not in after.called
        and any(path.startswith(f"{site}.") for path in after.called)
    )
