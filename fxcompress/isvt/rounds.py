"""Rounds of ISVT inside ``compile``: threshold, then descend, and again.

::

    W = weights of the dense model
    for k in 1..rounds:
        V = threshold(W)  to the budget of round k            # prox of λ·cost(rank), in the metric
        W' = V after gradient steps on the objective          # at these ranks, or whitened
        W = W' if objective(W') < objective(V) else V         # on the same, held-back batches

The objective is the KL divergence to the dense model, which needs no labels, or the user's loss.
Steps are accepted only if they descend; after a failure they are tried again at half the rate.
All of it happens on a copy of the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from fxcompress.analysis import Survey, calibrated_on, limited, survey
from fxcompress.errors import CalibrationError, RuleError
from fxcompress.graph.inputs import Forward
from fxcompress.isvt.correction import correctable, corrected, cross_moments
from fxcompress.isvt.descent import Diverged, cosine, descend, gradient
from fxcompress.isvt.features import Features
from fxcompress.isvt.objective import Objective, fitting, references
from fxcompress.isvt.proximal import natural
from fxcompress.isvt.saved import Standing, fingerprint, read, write
from fxcompress.isvt.schedule import share
from fxcompress.isvt.threshold import (
    Metrics,
    Thresholded,
    metrics_of,
    require_lasting_metric,
    threshold,
)
from fxcompress.metric import Calibration, Loss
from fxcompress.modules import canonical_weight
from fxcompress.plan import Plan, Round, Unit
from fxcompress.planning import price
from fxcompress.pricing import Pricing
from fxcompress.report.progress import Progress, stages
from fxcompress.rewrite import fold_batch_norms, own_parameters, prepared, skeleton
from fxcompress.rewriting import Student, rewrite, student
from fxcompress.rules import LoadedRules, at_progress
from fxcompress.sites import Site

M = TypeVar("M", bound=nn.Module)

Kind = Literal["factors", "whitened", "correction"]

LEARNING_RATE = 2.5e-4
"""At its highest, for factors; the size of an entry's update is a fifth of it (Muon)."""

STEP_SIZE = 1.0
"""Along a whitened gradient, to begin with: a Newton step, were the metric the Hessian."""

FALL = 0.6
"""Share of the rounds after which a soft schedule is at the budget; the rest makes up for it."""

ATTEMPTS = 3
"""Tries of a round, each at half the rate of the one before, until it is given up."""

HELD_BACK = 8
"""One batch in so many is for judging, not for training ..."""

MOST_HELD_BACK = 4
"""... but no more than these: every round takes two looks at them, by both models."""

REMEMBERED = 2.0**30
"""Bytes of the dense model's outputs on them that are kept, instead of asking it every time."""

STALE = 4.0
"""Factor between what a thresholding costs by the metric and by the objective, either way, from
which on the metric is estimated anew."""

AWAY = ", by their distance from the dense weights"
"""What a loss of weights is that were trained: no prediction any more."""

NOTICEABLE = 1e-3
"""Rises of the objective below this say nothing about the metric."""

SHARE = 0.25
"""Of the way to corrected weights, to begin with; shallow models can go all of it."""

SMALLEST_SHARE = 0.03
"""From which on the correction is given up."""

HALVINGS = 12
"""Of the step size along a whitened gradient, until the round is given up."""


@dataclass(frozen=True, eq=False)
class _Task:
    """What stays the same over all rounds.

    Attributes:
        private: the copy that is compressed.
        found: of ``private``; the weights as they are now are in ``found.model``.
        dense: the dense model as ``found.model`` was, in eval mode.
        metric_batches: that the metric is estimated on.
        pricings: for the unit of every budget.
        objective: to descend on.
        training: batches for gradients.
        judging: batches that steps are accepted by.
        references: what the dense model says of them, if that is small enough to keep.
        size: samples that fit into the memory at once.
        loss, forward: as of ``compile``.
    """

    private: Any
    found: Survey
    dense: nn.Module
    metric_batches: Sequence[Any]
    pricings: Mapping[Unit, Pricing]
    objective: Objective
    training: Sequence[Any]
    judging: Sequence[Any]
    references: Sequence[Any]
    size: int | None
    loss: Loss | None
    forward: Forward | None

    @property
    def rules(self) -> LoadedRules:
        return self.found.rules

    def weight(self, site: Site) -> Tensor:
        """The parameter of a site as it is now."""
        return self.found.model.get_parameter(site.weight)

    def take(self, cursor: int, count: int) -> list[Any]:
        """The next batches, from the first again when all are used up."""
        return [self.training[at % len(self.training)] for at in range(cursor, cursor + count)]

    def judge(self, model: nn.Module) -> float:
        """The objective on the batches held back."""
        return self.objective.mean(model, self.judging, self.references)


@dataclass(frozen=True, eq=False, kw_only=True)
class _State(Standing):
    """What changes from round to round, beside the weights.

    Attributes:
        metrics: by site name.
        calibration: how they were estimated.
    """

    metrics: Metrics
    calibration: Calibration


def iterate(
    model: M,
    loaded: LoadedRules,
    calibration: Iterable[Any] | None,
    examples: Sequence[Any] | None,
    loss: Loss | None,
    forward: Forward | None,
    show: Progress,
    *,
    inplace: bool = False,
    checkpoint: str | PathLike[str] | None = None,
) -> tuple[M, Plan]:
    """Compress in rounds; arguments and errors as of ``compile``."""
    task, state = _begin(model, loaded, calibration, examples, loss, forward, show)
    mark = "" if checkpoint is None else fingerprint(task.found)
    learn = {name: p.requires_grad for name, p in task.private.named_parameters()}
    task.private.requires_grad_(False)
    if checkpoint is not None and (saved := read(checkpoint, mark)) is not None:
        standing, weights = saved
        state = replace(state, **vars(standing))
        with torch.no_grad():
            for name, value in weights.items():
                task.found.model.get_parameter(name).copy_(value)
    for number in range(state.round + 1, loaded.rules.solver.rounds + 1):
        state = replace(_round(task, state, number, show), round=number)
        if checkpoint is not None:
            write(checkpoint, mark, state, _weights(task))
    for name, parameter in task.private.named_parameters():
        parameter.requires_grad_(learn[name])
    return _finish(model, task, state, show, inplace)


def _begin(
    model: nn.Module,
    loaded: LoadedRules,
    calibration: Iterable[Any] | None,
    examples: Sequence[Any] | None,
    loss: Loss | None,
    forward: Forward | None,
    show: Progress,
) -> tuple[_Task, _State]:
    """Copy, survey, calibrate, and set batches aside."""
    solver, spec = loaded.rules.solver, loaded.rules.metric
    require_lasting_metric(loaded)
    if solver.objective == "task" and loss is None:
        raise RuleError(
            "solver: {objective: task} descends on your loss: pass loss=lambda output, batch: ... "
            "(one value per prediction), or choose objective: kl, which needs no labels"
        )
    if calibration is None:
        raise CalibrationError(
            "gradient steps need calibration data: compile(model, rules, [batch, ...])"
        )
    private = own_parameters(skeleton(model), model)
    found, every, _ = survey(private, loaded, calibration, examples, forward, show)
    batches = [*every]
    show.stage("prepare", None)
    dense = prepared(model)
    fold_batch_norms(dense, found.folded)
    for each in (dense, found.model):
        nn.Module.train(each, False)
    task = solver.objective == "task"
    objective = Objective(None if task else dense, loss if task else None, spec.output, forward)
    held = min(max(1, len(batches) // HELD_BACK), MOST_HELD_BACK)
    judging, training = batches[-held:], batches[:-held] or batches
    order = torch.randperm(len(training), generator=torch.Generator().manual_seed(spec.seed))
    whole = _Task(
        private,
        found,
        dense,
        [*limited(batches, spec.batches, None)[0]],
        price(found, show),
        objective,
        [training[at] for at in order.tolist()],
        judging,
        references(objective, judging, REMEMBERED),
        None,
        loss,
        forward,
    )
    if task and not math.isfinite(whole.judge(dense)):
        raise CalibrationError("the objective of the dense model is not finite on these batches")
    state = _estimated(whole, show)
    learned = _training_objective(whole, state)  # what features keep counts, too
    size = fitting(learned, found.model, judging[0], solver.memory * 2**30)
    return replace(whole, size=size), state


def _estimated(task: _Task, show: Progress, state: _State | None = None) -> _State:
    """A state with the metric at the weights as they are now."""
    batches = task.metric_batches
    calibrated = calibrated_on(task.found, batches, len(batches), task.loss, task.forward, show)
    show.stage("whiten", None)
    metrics = metrics_of(task.found, calibrated.moments)
    calibrated = replace(calibrated, moments={})
    if state is None:
        return _State(metrics=metrics, calibration=calibrated)
    return replace(state, metrics=metrics, calibration=calibrated)


def _round(task: _Task, state: _State, number: int, show: Progress) -> _State:
    """Threshold, correct if asked to, and descend."""
    solver = task.rules.rules.solver
    state, cut = _thresholded(task, state, number, show)
    if solver.correct:
        state, cut = _corrected(task, state, cut, number, show)
    if not solver.steps:
        return state
    if solver.gradient == "whitened":
        return _whitened(task, state, cut, number, show)
    return _trained(task, state, cut, number, show)


def _thresholded(
    task: _Task, state: _State, number: int, show: Progress
) -> tuple[_State, Thresholded]:
    """Cut all weights to the budget of a round; the objective of the state is that of the result.

    What earlier rounds took away is put back before: a component that was not worth its cost at one
    budget may be at the next, when others went, and what was learned meanwhile stays on top of it.
    Without that soft rounds lose *more* than one cut, as they never go back on a choice.
    """
    old = _values(task)
    keep = _softened(task, number).rules.budgets[0].keep
    if state.records and state.records[-1].keep == keep:
        return state, _cut(task, state, number, old, show)
    whole = _restored_parts(state, old)
    cut, before = _judged(task, state, number, whole, show)
    if state.objective is not None and _stale(
        before - state.objective, cut.predicted - state.predicted
    ):
        _reset(task, old)
        state = _estimated(task, show, state)
        cut, before = _judged(task, state, number, whole, show)
    taken = [one - other for one, other in zip(whole, _values(task), strict=True)]
    state = replace(state, removed=taken, predicted=cut.predicted, objective=before, scale=1.0)
    return state, cut


def _restored_parts(state: _State, old: Sequence[Tensor]) -> list[Tensor]:
    if not state.removed:
        return [*old]
    return [value + part for value, part in zip(old, state.removed, strict=True)]


def _cut(
    task: _Task, state: _State, number: int, whole: Sequence[Tensor], show: Progress
) -> Thresholded:
    """Threshold some weights, and put the outcome in place."""
    _reset(task, whole)
    tick = show.stage("threshold", len(task.found.sites))
    cut = threshold(task.found, state.metrics, _softened(task, number), task.pricings, tick=tick)
    _set(task, cut.weights())
    return cut


def _judged(
    task: _Task, state: _State, number: int, whole: Sequence[Tensor], show: Progress
) -> tuple[Thresholded, float]:
    """The same with the objective of the outcome."""
    cut = _cut(task, state, number, whole, show)
    show.stage("judge", None)
    return cut, task.judge(task.found.model)


def _stale(rise: float, predicted: float) -> bool:
    """Whether more was taken away at a cost that is quite another than the metric said.

    Both are differences to the last thresholding: each takes away all that its budget demands.
    """
    if max(rise, predicted) < NOTICEABLE:
        return False
    return not predicted / STALE < rise < predicted * STALE


def _softened(task: _Task, number: int) -> LoadedRules:
    solver = task.rules.rules.solver
    falling = max(1, round(FALL * solver.rounds))
    return at_progress(task.rules, share(solver.schedule, number / falling))


@torch.no_grad()
def _set(task: _Task, weights: Iterable[tuple[Site, Tensor]]) -> None:
    """Put weights (canonical layout) in place."""
    for site, weight in [*weights]:
        task.weight(site).copy_(site.shape.stored(weight))


def _record(
    task: _Task, state: _State, number: int, removed: float, after: float, rate: float, kind: Kind
) -> Round:
    before = state.objective
    assert before is not None
    return Round(
        round=number,
        keep=_softened(task, number).rules.budgets[0].keep,
        removed=removed,
        before=before,
        after=after if math.isfinite(after) else None,
        accepted=after < before,
        rate=rate,
        kind=kind,
    )


def _corrected(
    task: _Task, state: _State, cut: Thresholded, number: int, show: Progress
) -> tuple[_State, Thresholded]:
    """Fit the weights to the inputs that they get, as far as that descends.

    The share of the way is doubled or halved from :data:`SHARE` on while that is better.
    """
    held = {id(batch) for batch in task.judging}  # or it would be judged by what it was fitted to
    batches = [batch for batch in task.metric_batches if id(batch) not in held] or task.judging
    tick = show.stage("correct", len(batches))
    damping = task.rules.rules.metric.damping.input
    ranks, model, before = cut.ranks(), task.found.model, state.objective
    assert before is not None
    sites = correctable(task.found.sites, ranks, state.metrics)
    moments = cross_moments(task.dense, model, sites, batches, damping, task.forward, tick)
    show.stage("correct", None)
    old = _values(task)

    def tried(share: float) -> tuple[float, float, list[Tensor]]:
        _reset(task, old)
        _set(task, corrected(task.dense, model, ranks, sites, state.metrics, moments, share))
        return task.judge(model), share, _values(task)

    best = tried(SHARE)
    factor = 2.0 if best[0] < before else 0.5
    while best[1] > SMALLEST_SHARE and best[1] * factor <= 1.0:
        other = tried(best[1] * factor)
        if factor > 1 and other[0] >= best[0]:
            break
        best = other
        if factor < 1 and best[0] < before:
            break
    after, share, values = best
    record = _record(task, state, number, cut.predicted, after, share, "correction")
    state = replace(state, records=(*state.records, record))
    if not record.accepted:
        _reset(task, old)
        return state, cut
    _reset(task, values)
    # Again, for the factors; the weights have these ranks already.
    cut = threshold(task.found, state.metrics, _softened(task, number), task.pricings, cut.starts)
    return replace(state, objective=after), cut


@torch.no_grad()
def _values(task: _Task) -> list[Tensor]:
    """Copies of the weights as they are stored, in the order of the sites."""
    return [task.weight(site).clone() for site in task.found.sites]


@torch.no_grad()
def _reset(task: _Task, old: Sequence[Tensor]) -> None:
    for site, value in zip(task.found.sites, old, strict=True):
        task.weight(site).copy_(value)


def _trained(task: _Task, state: _State, cut: Thresholded, number: int, show: Progress) -> _State:
    """Gradient steps on the factors, at the ranks of the round; at half the rate if they fail."""
    solver = task.rules.rules.solver
    steps, total = solver.steps, solver.steps * solver.rounds
    highest = solver.learning_rate or LEARNING_RATE
    objective = _training_objective(task, state)
    for _ in range(ATTEMPTS):
        with stages(enabled=False) as silent:
            made = student(task.private, cut.analysis, silent)
        left = _left_dense(task, made)
        old = [weight.detach().clone() for weight in left]
        rate = highest * state.scale
        # One rise and fall over all rounds: restarted in every round, it gained less on SmolLM2.
        rates = [rate * cosine(at, total) for at in range((number - 1) * steps, number * steps)]
        batches = task.take(state.cursor, steps)
        state = replace(state, cursor=state.cursor + steps)
        tick = show.stage(f"round {number}/{solver.rounds}", steps)
        learning = [*made.parameters, *left]
        for parameter in learning:
            parameter.requires_grad_(True)
        try:
            descend(objective, made.model, learning, batches, rates, task.size, tick)
            show.stage("judge", None)
            after = task.judge(made.model)
        except Diverged:
            after = math.inf
        for parameter in learning:
            parameter.requires_grad_(False)
            parameter.grad = None
        record = _record(task, state, number, cut.predicted, after, rate, "factors")
        state = replace(state, records=(*state.records, record))
        if record.accepted:
            with torch.no_grad():
                for site, weight, bias in made.weights():
                    task.weight(site).copy_(weight)
                    if bias is not None:
                        task.found.model.get_parameter(f"{site.name}.bias").copy_(bias)
            return replace(state, objective=after)
        with torch.no_grad():
            for parameter, value in zip(left, old, strict=True):
                parameter.copy_(value)
        state = replace(state, scale=state.scale / 2)
    return state


def _training_objective(task: _Task, state: _State) -> Objective:
    """What gradients are of; what is accepted is judged by the plain objective."""
    solver, weight = task.rules.rules.solver, task.rules.rules.solver.features
    if task.objective.dense is None or not weight or solver.gradient == "whitened":
        return task.objective
    features = Features.of(weight, task.found.sites, state.metrics)
    return replace(task.objective, features=features if features.sites else None)


def _left_dense(task: _Task, made: Student) -> list[nn.Parameter]:
    """Weights of matched sites that the student keeps as they are: they learn, too."""
    cut = {site.name for site in made.plan.rewritten}
    own = {id(parameter) for parameter in made.model.parameters()}
    weights = [
        task.found.model.get_parameter(site.weight)
        for site in task.found.sites
        if site.name not in cut
    ]
    return [weight for weight in weights if id(weight) in own]


def _whitened(task: _Task, state: _State, cut: Thresholded, number: int, show: Progress) -> _State:
    """Proximal gradient steps, backtracked on the batches that the gradient is taken on."""
    solver = task.rules.rules.solver
    model, sites = task.found.model, task.found.sites
    first = solver.learning_rate or STEP_SIZE
    rate = first * state.scale
    now = task.objective.mean(model, task.training)
    tick = show.stage(f"round {number}/{solver.rounds}", solver.steps)
    learning = [model.get_parameter(site.weight) for site in sites]
    for _ in range(solver.steps):
        old = _values(task)
        for parameter in learning:
            parameter.requires_grad_(True)
        try:
            gradient(task.objective, model, learning, task.training, task.size)
        except Diverged:  # there is no direction to go in: what was reached is kept
            break
        finally:
            for parameter in learning:
                parameter.requires_grad_(False)
        directions = [
            natural(state.metrics[site.name], site.shape.canonical(_gradient(task, site)))
            for site in sites
        ]
        for parameter in learning:
            parameter.grad = None
        state = replace(state, objective=now)
        for _ in range(HALVINGS):
            _set(
                task,
                (
                    (site, site.shape.canonical(value) - rate * direction)
                    for site, value, direction in zip(sites, old, directions, strict=True)
                ),
            )
            try:
                loaded = _softened(task, number)
                cut = threshold(task.found, state.metrics, loaded, task.pricings, cut.starts)
                _set(task, cut.weights())
                after = task.objective.mean(model, task.training)
            except ValueError:  # a step so long that weights overflow
                after = math.inf
            record = _record(task, state, number, cut.predicted, after, rate, "whitened")
            state = replace(state, records=(*state.records, record))
            if record.accepted:
                now = after
                break
            _reset(task, old)
            rate /= 2
        else:
            break
        tick()
    for parameter in learning:
        parameter.grad = None
    return replace(state, objective=task.judge(model), scale=rate / first)


def _gradient(task: _Task, site: Site) -> Tensor:
    weight = task.weight(site)
    return torch.zeros_like(weight) if weight.grad is None else weight.grad


def _finish(model: M, task: _Task, state: _State, show: Progress, inplace: bool) -> tuple[M, Plan]:
    """Decompose in full, rewrite, and write down how it went."""
    tick = show.stage("decompose", len(task.found.sites))
    cut = threshold(task.found, state.metrics, task.rules, task.pricings, tick=tick)
    analysis = replace(cut.analysis, calibration=state.calibration)
    if not inplace:
        rewritten, planned = rewrite(task.private, analysis, task.forward, show)
        return rewritten, _described(task, state, planned)
    rewritten, planned = rewrite(model, analysis, task.forward, show, inplace=True)
    shared = {id(parameter) for parameter in task.private.parameters()}
    own = dict(prepared(model).named_parameters())
    with torch.no_grad():
        for site in task.found.sites:  # those that stay dense learned, too
            if site.weight in own and id(task.weight(site)) in shared:
                own[site.weight].copy_(task.weight(site))
    return rewritten, _described(task, state, planned)


def _described(task: _Task, state: _State, planned: Plan) -> Plan:
    """The plan, with how far every weight is from the dense model's in place of its last cut."""
    sites = {site.name: site for site in task.found.sites}
    entries = []
    for entry in planned.sites:
        if entry.form is None:
            entries.append(entry)
            continue
        metric = state.metrics[entry.name]
        dense = canonical_weight(task.dense.get_submodule(entry.name)).detach()
        change = sites[entry.name].shape.canonical(task.weight(sites[entry.name])) - dense
        away, whole = metric.loss(change), metric.loss(dense)
        kept = min(max(1 - away / whole, 0.0), 1.0) if whole else 1.0
        entries.append(entry.model_copy(update={"predicted": away, "energy": kept}))
    predicted = math.fsum(entry.predicted for entry in entries)
    return planned.model_copy(
        update={
            "sites": tuple(entries),
            "budget": planned.budget.model_copy(
                update={"predicted": predicted, "bound": None, "multiplier": None}
            ),
            "loss_unit": f"{planned.loss_unit}{AWAY}",
            "objective": task.rules.rules.solver.objective,
            "rounds": state.records,
        }
    )


def _weights(task: _Task) -> dict[str, Tensor]:
    """Weights and biases of all sites as they are now, by parameter name."""
    found = {}
    for site in task.found.sites:
        found[site.weight] = task.weight(site).detach()
        bias = getattr(task.found.model.get_submodule(site.name), "bias", None)
        if bias is not None:
            found[f"{site.name}.bias"] = bias.detach()
    return found
