"""``compile`` and ``plan``: the stages in order.

record → match → calibrate → spectrum → budget → rewrite, each a function over frozen values
(README, "How it works").  The model that was given is only read;
all work happens on a copy of its structure that shares its parameters until the end.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from os import PathLike
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from fxcompress.analysis import Analysis, analyse, match_model, working_copy
from fxcompress.errors import BudgetError, RecordError, RewriteError, RuleError
from fxcompress.forms import ConvShape, Form, FormError, JointBody, JointForm, Rank
from fxcompress.graph.inputs import Forward
from fxcompress.graph.recorder import Recording, record
from fxcompress.metric import Loss
from fxcompress.plan import Plan, attach_plan
from fxcompress.planning import make_plan, summarize
from fxcompress.report.progress import Progress, stages
from fxcompress.rewrite import (
    Bodies,
    ProjectedAttention,
    apply_plan,
    own_parameters,
    skeleton,
    verify,
)
from fxcompress.rules import Explanation, LoadedRules, RuleSet, load_rules
from fxcompress.rules.diagnostics import choices, suggest
from fxcompress.sites import Site, SiteBundle

M = TypeVar("M", bound=nn.Module)
Rules = str | PathLike[str] | RuleSet | LoadedRules


class FxcompressWarning(UserWarning):
    """Something that a user should know, and that is no error."""


def compile(
    model: M,
    rules: Rules,
    calibration: Iterable[Any] | None = None,
    *,
    keep: float | None = None,
    inplace: bool = False,
    examples: Sequence[Any] | None = None,
    loss: Loss | None = None,
    forward: Forward | None = None,
    progress: bool | None = None,
) -> M:
    """Compress a model: same class, same ``forward``, same ``generate()``, fewer parameters.

    Args:
        model: any module that runs; unchanged unless ``inplace``.
        rules: a rule file, the name of a preset (``"decoder"``, ``"encoder"``,
            ``"every-linear"``), or a rule set.
        calibration: batches of inputs, gone through once; a batch is a tensor (one positional
            argument), a tuple (several) or a mapping (keyword arguments).  The Fisher metric
            draws its own labels, so none are needed.
        keep: overrides ``budget.keep`` of the rules.
        inplace: change ``model`` itself and return it.
        examples: batches to record the graph on, if the first calibration batch does not show
            all that the model can do.
        loss: ``loss(output, batch)``, one negative log-likelihood per prediction, in place of
            labels sampled from the model's own output.
        forward: ``forward(model, batch)``, for batches of another kind.
        progress: show progress on stderr; by default if that is a terminal.

    Returns:
        A new model (an ``fx.GraphModule`` for an ``fx.GraphModule``, with the matched nodes
        substituted in its graph).  :func:`fxcompress.plan_of` tells what was done to it.

    Raises:
        RuleError: the rules cannot be used, or match nothing at all.
        RecordError: the model does not run on the example.
        CalibrationError: calibration data is missing, rejected or not finite.
        BudgetError: the budget cannot be met; the message says the least that can.
        RewriteError: the rewritten model does not run.
    """
    loaded = with_keep(read_rules(rules), keep)
    with torch.inference_mode(False), stages(progress) as show:
        analysis = analyse(model, loaded, calibration, examples, loss, forward, show)
        rewritten, planned = rewrite(model, analysis, forward, show, inplace=inplace)
    planned = planned.model_copy(update={"seconds": dict(show.seconds)})
    attach_plan(rewritten, planned)
    for note in planned.warnings:
        warnings.warn(note, FxcompressWarning, stacklevel=2)
    return rewritten


def plan(
    model: nn.Module,
    rules: Rules,
    calibration: Iterable[Any] | None = None,
    *,
    keep: float | None = None,
    examples: Sequence[Any] | None = None,
    loss: Loss | None = None,
    forward: Forward | None = None,
    progress: bool | None = None,
) -> Plan:
    """The ranks that :func:`compile` would choose, without touching the model.

    Arguments and errors as there.
    """
    loaded = with_keep(read_rules(rules), keep)
    with torch.inference_mode(False), stages(progress) as show:
        analysis = analyse(model, loaded, calibration, examples, loss, forward, show)
        planned = make_plan(analysis, {}, show)
    return planned.model_copy(
        update={"seconds": dict(show.seconds), "warnings": tuple(analysis.notes)}
    )


def explain(
    model: nn.Module,
    rules: Rules,
    example: Any = None,
    *,
    rule: str | None = None,
    calibration: Iterable[Any] | None = None,
    keep: float | None = None,
    loss: Loss | None = None,
    forward: Forward | None = None,
    progress: bool | None = None,
) -> Explanation:
    """Which operators each rule matches, and why the others not, from the real matcher.

    Args:
        model: any module that runs.
        rules: as in :func:`compile`.
        example: one batch to record the graph on; the first of ``calibration`` if left out.
        rule: explain the rule with this id only.
        calibration: as in :func:`compile`.  With it the budget is solved as well, and the
            explanation tells what is left dense and why.
        keep, loss, forward, progress: as in :func:`compile`.

    Raises:
        RuleError: the rules cannot be used, or none has the id.
        RecordError, CalibrationError, BudgetError: as in :func:`compile`.
    """
    loaded = with_keep(read_rules(rules), keep)
    ids = [each.id for each in loaded.rules.rules]
    if rule is not None and rule not in ids:
        raise RuleError(f"no rule has the id '{rule}'; {suggest(rule, ids) or choices(ids)}")
    if calibration is None:
        if example is None:
            raise RecordError("explain runs the model once: give it an example batch")
        work = working_copy(model)
        recording = record(work, [example], forward=forward)
        return Explanation.of(match_model(work, loaded, recording), rule=rule)
    examples = None if example is None else [example]
    with torch.inference_mode(False), stages(progress) as show:
        analysis = analyse(model, loaded, calibration, examples, loss, forward, show)
        planned = make_plan(analysis, {}, show)
    dense = {site.weight: site.reason for site in planned.sites if site.form is None}
    return Explanation.of(analysis.matched, dense, rule=rule)


def read_rules(rules: Rules) -> LoadedRules:
    """A rule file, a preset or a rule set, checked.

    Raises:
        RuleError: it is none of these, or cannot be used.
    """
    if not isinstance(rules, (str, PathLike, RuleSet, LoadedRules)):
        raise RuleError(
            f"rules must be a file, the name of a preset or a RuleSet, not a {type(rules).__name__}"
        )
    return rules if isinstance(rules, LoadedRules) else load_rules(rules)


def with_keep(loaded: LoadedRules, keep: float | None) -> LoadedRules:
    """The same rules with another fraction to keep.

    Raises:
        BudgetError: it is no fraction, or the rules have several budgets.
    """
    if keep is None:
        return loaded
    if not (isinstance(keep, Real) and 0 < keep <= 1):
        raise BudgetError(f"keep must be a number above 0, and 1 at most, not {keep!r}")
    budgets = loaded.rules.budgets
    if len(budgets) > 1:
        units = " and ".join(budget.unit for budget in budgets)
        raise BudgetError(f"keep= stands for one budget, and the rules have several: {units}")
    budget = budgets[0].model_copy(update={"keep": float(keep)})
    return replace(loaded, rules=loaded.rules.model_copy(update={"budget": budget}))


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
