"""``compile`` and ``plan``: the stages in order.

record → match → calibrate → spectrum → budget → rewrite, each a function over frozen values
(``design`` of the stages: README, "How it works").  The model that was given is only read;
all work happens on a copy of its structure that shares its parameters until the end.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from fxcompress.budget import Allocation, allocate, allocate_uniform
from fxcompress.errors import BudgetError, CalibrationError, RewriteError, RuleError
from fxcompress.forms import FORMS, FormError
from fxcompress.graph.eligible import obstacle
from fxcompress.graph.inputs import Forward
from fxcompress.graph.operator import Operator
from fxcompress.graph.recorder import Recording, record
from fxcompress.metric import METRICS, Calibration, Loss, Spectrum, calibrate
from fxcompress.metric.spectrum import decompose_whitened
from fxcompress.metric.whiten import Whitener, whitener
from fxcompress.plan import (
    ZERO,
    BudgetOutcome,
    NodeSummary,
    Plan,
    SitePlan,
    Size,
    Unmatched,
    attach_plan,
)
from fxcompress.report.progress import Progress, stages
from fxcompress.rewrite import Factorized, apply_plan, own_parameters, prepared, skeleton, verify
from fxcompress.rules import Explanation, LoadedRules, MatchResult, RuleSet, load_rules, match_rules
from fxcompress.sites import Site, dense_weight, gather_sites

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
    loaded = _with_keep(load_rules(rules), keep)
    with stages(progress) as show:
        analysis = _analyse(model, loaded, calibration, examples, loss, forward, show)
        excluded: dict[str, frozenset[str]] = {}
        while True:
            planned = _plan(analysis, excluded, show)
            show.stage("rewrite", len(planned.rewritten) or None)
            bodies, failures = _build(analysis, planned, show)
            if not failures:
                rewritten = skeleton(model)
                apply_plan(rewritten, planned, bodies)
                after, failures = _rerecord(rewritten, analysis, planned, forward)
            if not failures:
                break
            # A site that fails at a form is planned again without it, so that the budget
            # still holds: the ranks of all others are found anew.
            for name, form in failures.items():
                excluded[name] = excluded.get(name, frozenset()) | {form.form}
                analysis.notes.append(f"{name}: {form.form} was given up: {form.reason}")
        if inplace:
            apply_plan(model, planned, bodies)
            rewritten = model
        else:
            own_parameters(rewritten)
        planned = planned.model_copy(
            update={
                "after": _summaries(after.operators),
                "seconds": dict(show.seconds),
                "warnings": (*planned.warnings, *analysis.notes),
            }
        )
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
    loaded = _with_keep(load_rules(rules), keep)
    with stages(progress) as show:
        analysis = _analyse(model, loaded, calibration, examples, loss, forward, show)
        planned = _plan(analysis, {}, show)
    return planned.model_copy(
        update={"seconds": dict(show.seconds), "warnings": tuple(analysis.notes)}
    )


def explain(
    model: nn.Module, rules: Rules, example: Any, *, forward: Forward | None = None
) -> Explanation:
    """Which operators each rule matches, and why the others not, from the real matcher.

    Args:
        model: any module that runs.
        rules: as in :func:`compile`.
        example: one batch to record the graph on.
        forward: as in :func:`compile`.

    Raises:
        RuleError, RecordError: as in :func:`compile`.
    """
    loaded = load_rules(rules)
    work = prepared(model)
    recording = record(work, [example], forward=forward)
    return Explanation.of(_match(work, loaded, recording))


# ---- analysis: everything up to the spectra -------------------------------------------


@dataclass(frozen=True, eq=False)
class _Analysis:
    """What the stages before the budget found out."""

    model: nn.Module
    rules: LoadedRules
    recording: Recording
    matched: MatchResult
    sites: tuple[Site, ...]
    calibration: Calibration
    spectra: Mapping[str, Spectrum]
    examples: Sequence[Any]
    size: Size
    notes: list[str]


def _analyse(
    model: nn.Module,
    loaded: LoadedRules,
    calibration: Iterable[Any] | None,
    examples: Sequence[Any] | None,
    loss: Loss | None,
    forward: Forward | None,
    show: Progress,
) -> _Analysis:
    spec = loaded.rules.metric
    metric = METRICS[spec.kind]
    first, batches, total = _batches(calibration, bool(metric.needs), metric.name, examples)
    work = prepared(model)

    tick = show.stage("record", None)
    examples = list(examples) if examples else [first]
    recording = record(work, examples, forward=forward)
    tick()

    show.stage("match", None)
    matched = _match(work, loaded, recording)
    matched.check()
    sites = gather_sites(work, recording, matched.matches)
    if not sites:
        raise RuleError(
            f"the rules of {loaded.filename} match nothing in {type(model).__name__}, so there is "
            f"nothing to compress\n{Explanation.of(matched)}"
        )
    for site in sites:
        if not bool(dense_weight(work.get_submodule(site.name)).isfinite().all()):
            raise CalibrationError(
                f"the weight {site.weight} has NaN or infinite values; repair or reload the model"
            )
    notes = list(matched.warnings)

    tick = show.stage("calibrate", total)
    calibrated = calibrate(
        work, sites, batches, metric,
        output=spec.output, loss=loss, forward=forward, seed=spec.seed, tick=tick,
    )  # fmt: skip

    tick = show.stage("decompose", len(sites))
    damping = (spec.damping.input, spec.damping.output)
    inputs: dict[int, Whitener] = {}
    spectra = {}
    for site in sites:
        a, g = metric.factors(calibrated.moments[site.name])
        if id(a) not in inputs:  # sites on one input share one tensor, and its root
            inputs = {id(a): whitener(a, damping[0])}
        weight = dense_weight(work.get_submodule(site.name))
        outputs = whitener(g, damping[1])
        spectra[site.name] = decompose_whitened(weight, inputs[id(a)], outputs)
        if inputs[id(a)].null or outputs.null:
            notes.append(
                f"{site.name}: the calibration data gives it no influence on the output (all-zero "
                "inputs or gradients); its predicted loss is 0 at every rank"
            )
        tick()
    size = _model_size(work, recording)
    return _Analysis(
        work, loaded, recording, matched, sites, calibrated, spectra, examples, size, notes
    )


def _match(model: nn.Module, loaded: LoadedRules, recording: Recording) -> MatchResult:
    return match_rules(loaded, recording.operators, obstacle(model, recording, (Factorized,)))


def _batches(
    calibration: Iterable[Any] | None,
    needed: bool,
    metric: str,
    examples: Sequence[Any] | None,
) -> tuple[Any, Iterable[Any], int | None]:
    """The first batch, all batches (the first among them), and their number if known."""
    if calibration is None:
        if needed:
            raise CalibrationError(
                f"metric {metric} needs calibration data: compile(model, rules, [batch, ...]) with "
                "a few hundred typical inputs (no labels), or choose metric: {kind: euclidean}"
            )
        if not examples:
            raise CalibrationError(
                "the model has to be run once to record its graph: give one batch as "
                "calibration=[batch] or examples=[batch]"
            )
        return None, [], 0
    if isinstance(calibration, (Tensor, Mapping, str)):
        raise CalibrationError(
            f"calibration must be an iterable of batches, not one {type(calibration).__name__}; "
            "for a single batch pass [batch]"
        )
    iterator = iter(calibration)
    try:
        first = next(iterator)
    except StopIteration:
        raise CalibrationError(
            "the calibration iterable is empty or exhausted; pass a list of batches or a "
            "fresh DataLoader"
        ) from None
    total = len(calibration) if hasattr(calibration, "__len__") else None
    if iterator is calibration:  # a generator: it cannot be started again
        return first, itertools.chain([first], iterator), total
    return first, calibration, total


def _with_keep(loaded: LoadedRules, keep: float | None) -> LoadedRules:
    if keep is None:
        return loaded
    if not 0 < keep <= 1:
        raise BudgetError(f"keep must be in (0, 1], got {keep}")
    rules = loaded.rules
    budget = rules.budget.model_copy(update={"keep": keep})
    return replace(loaded, rules=rules.model_copy(update={"budget": budget}))


# ---- budget ---------------------------------------------------------------------------


def _plan(analysis: _Analysis, excluded: Mapping[str, frozenset[str]], show: Progress) -> Plan:
    tick = show.stage("budget", None)
    rules = analysis.rules.rules
    budget = rules.budget
    unit = budget.unit
    candidates = [
        site.candidate(analysis.spectra[site.name], unit, excluded.get(site.name, frozenset()))
        for site in analysis.sites
    ]
    dense = sum(candidate.dense_cost for candidate in candidates)
    whole = float(getattr(analysis.size, unit))
    limit = budget.keep * (dense if budget.of == "matched" else whole)
    if budget.of == "model":
        limit -= whole - dense
    allocation = _allocate(candidates, limit, rules.solver.allocation, budget.of, unit, whole)
    sites = tuple(_site_plan(site, analysis, allocation, excluded) for site in analysis.sites)
    saved = _total([site.before for site in sites]) - _total([site.after for site in sites])
    glob = rules.solver.allocation == "global"
    planned = Plan(
        model_class=f"{type(analysis.model).__module__}.{type(analysis.model).__qualname__}",
        rules=analysis.rules.filename,
        metric=rules.metric.kind,
        loss_unit=METRICS[rules.metric.kind].unit,
        calibration={
            "batches": analysis.calibration.batches,
            "predictions": analysis.calibration.predictions,
            "output": analysis.calibration.kind,
            "seed": rules.metric.seed,
        },
        budget=BudgetOutcome(
            keep=budget.keep,
            of=budget.of,
            unit=unit,
            allocation=rules.solver.allocation,
            limit=limit,
            cost=allocation.cost,
            dense=dense,
            multiplier=allocation.multiplier if glob else None,
            predicted=allocation.loss,
            bound=allocation.bound if glob else None,
        ),
        sites=sites,
        unmatched=_unmatched(analysis),
        model_before=analysis.size,
        model_after=analysis.size - saved,
        before=_summaries(analysis.recording.operators),
    )
    tick()
    return planned


def _allocate(
    candidates: list[Any], limit: float, allocation: str, of: str, unit: str, whole: float
) -> Allocation:
    solve = allocate if allocation == "global" else allocate_uniform
    try:
        if limit < 0:
            raise BudgetError("even with every matched operator removed the rest is over it")
        return solve(candidates, limit)
    except BudgetError as error:
        dense = sum(candidate.dense_cost for candidate in candidates)
        raise BudgetError(
            f"the budget cannot be met, in {unit} of the matched operators ({dense:,.0f} now"
            + (f", of {whole:,.0f} in the model; budget of: model" if of == "model" else "")
            + f"): {error}"
        ) from error


def _site_plan(
    site: Site,
    analysis: _Analysis,
    allocation: Allocation,
    excluded: Mapping[str, frozenset[str]],
) -> SitePlan:
    choice = allocation.choices[site.name]
    spectrum = analysis.spectra[site.name]
    squares = spectrum.sigma.square()
    total = float(squares.sum())
    before = site.dense_size()
    dense = choice.form is None or choice.rank is None
    rank = None if dense else choice.rank
    step = max(1, len(spectrum.sigma) // 64)
    return SitePlan(
        name=site.name,
        weight=site.weight,
        op=site.op,
        in_features=site.in_features,
        out_features=site.out_features,
        bias=site.shape.bias,
        dtype=str(site.shape.dtype).removeprefix("torch."),
        calls=site.calls,
        rule=site.match.rule_id,
        location=site.match.location,
        forms=site.match.forms,
        form=choice.form,
        rank=rank,
        predicted=choice.loss,
        energy=1.0 if dense or total == 0 else float(squares[:rank].sum()) / total,
        before=before,
        after=before if dense else site.size(choice.form, choice.rank),  # type: ignore[arg-type]
        reason=_dense_reason(site, excluded.get(site.name, frozenset())) if dense else "",
        spectrum=tuple(float(s) for s in spectrum.sigma[::step]),
    )


def _dense_reason(site: Site, excluded: frozenset[str]) -> str:
    if excluded.issuperset(site.match.forms):
        return f"no form worked: {', '.join(sorted(excluded))} given up"
    m, n = site.out_features, site.in_features
    if "pivoted" in site.match.forms:
        return f"left dense by the budget: every rank below {min(m, n)} loses more than it saves"
    return (
        f"left dense by the budget: low_rank saves below rank {m * n // (m + n)} only, and "
        "loses more than that is worth"
    )


def _unmatched(analysis: _Analysis) -> tuple[Unmatched, ...]:
    """Operators with a weight that stay as they are, each with the nearest reason."""
    matched = {site.weight for site in analysis.sites}
    reasons = {miss.operator: miss.reason for miss in analysis.matched.misses}
    for kept in analysis.matched.protected:
        reasons[kept.operators[0]] = f"kept dense by rule {kept.rule_id} ({kept.location})"
    weights = analysis.recording.weights
    seen: set[str] = set()
    out = []
    for operator in analysis.recording.operators:
        weight = operator.weight
        if weight is None or weight in matched or weight in seen:
            continue
        if len(weights[weight].shape) < 2:
            continue  # norms and other vectors: nothing to factorize
        seen.add(weight)
        size = 1
        for extent in weights[weight].shape:
            size *= extent
        out.append(
            Unmatched(
                name=operator.path or weight,
                op=operator.op,
                weight=weight,
                shape=weights[weight].shape,
                parameters=size,
                reason=reasons.get(operator.name, f"no rule is about operator {operator.op}"),
            )
        )
    return tuple(out)


# ---- rewrite --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Failure:
    form: str
    reason: str


def _build(
    analysis: _Analysis, planned: Plan, show: Progress
) -> tuple[dict[str, fx.GraphModule], dict[str, _Failure]]:
    """A verified body for every rewritten site, and the failures."""
    tick = show.stage("rewrite", len(planned.rewritten))
    by_name = {site.name: site for site in analysis.sites}
    bodies: dict[str, fx.GraphModule] = {}
    failures: dict[str, _Failure] = {}
    for entry in planned.rewritten:
        assert entry.form is not None
        assert entry.rank is not None
        site, spectrum = by_name[entry.name], analysis.spectra[entry.name]
        left, right = spectrum.left[:, : entry.rank], spectrum.right[: entry.rank]
        bias = getattr(analysis.model.get_submodule(site.name), "bias", None)
        body = FORMS[entry.form].empty(site.shape, entry.rank)
        try:
            FORMS[entry.form].fill(body, left, right, bias)
            verify(body, left, right, bias, _sample(analysis, site))
        except FormError as error:
            failures[site.name] = _Failure(entry.form, str(error))
        bodies[site.name] = body
        tick()
    return bodies, failures


def _sample(analysis: _Analysis, site: Site) -> Tensor:
    rows = analysis.recording.samples.get(site.weight)
    if rows is not None and rows.dtype == site.shape.dtype and len(rows):
        return rows
    # The recorded input had another type (autocast): any rows of the right type will do.
    generator = torch.Generator().manual_seed(0)
    return torch.randn(16, site.in_features, generator=generator).to(
        site.shape.device, site.shape.dtype
    )


def _rerecord(
    rewritten: nn.Module, analysis: _Analysis, planned: Plan, forward: Forward | None
) -> tuple[Recording, dict[str, _Failure]]:
    """The graph that really runs now, and the sites whose body does not."""
    after = record(rewritten, analysis.examples, forward=forward)
    running = {operator.path for operator in after.operators if operator.weight is not None}
    failures = {}
    for entry in planned.rewritten:
        prefix = f"{entry.name}."
        if not any(path.startswith(prefix) for path in running):
            failures[entry.name] = _Failure(
                str(entry.form), "the model runs past it, so the rewritten layer would save nothing"
            )
    return after, failures


# ---- sizes ----------------------------------------------------------------------------


def _model_size(model: nn.Module, recording: Recording) -> Size:
    parameters = list(model.parameters())
    tensors = [*parameters, *model.buffers()]
    return Size(
        parameters=sum(p.numel() for p in parameters),
        macs=recording.macs,
        bytes=sum(t.numel() * t.element_size() for t in tensors),
    )


def _total(sizes: Iterable[Size]) -> Size:
    return sum(sizes, ZERO)


def _summaries(operators: Iterable[Operator]) -> tuple[NodeSummary, ...]:
    return tuple(
        NodeSummary(name=o.name, op=o.op, path=o.path, inputs=o.inputs, shape=o.shape)
        for o in operators
    )
