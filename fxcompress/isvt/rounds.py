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
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fxcompress.errors import CalibrationError, RuleError
from fxcompress.isvt.attempts import corrected, trained, training_objective, whitened
from fxcompress.isvt.objective import Objective, fitting, references
from fxcompress.isvt.saved import read, write
from fxcompress.isvt.task import State, Task, softened
from fxcompress.isvt.threshold import Thresholded, metrics_of, require_lasting_metric, threshold
from fxcompress.metric import METRICS
from fxcompress.operators.applied import operator_at
from fxcompress.operators.modules import canonical_weight
from fxcompress.pipeline.build import rewrite
from fxcompress.pipeline.decide import price
from fxcompress.pipeline.estimate import Estimate, calibrated_on, estimate, passes_over
from fxcompress.pipeline.held_back import Division
from fxcompress.pipeline.measure import measure_whole
from fxcompress.pipeline.request import Request
from fxcompress.pipeline.survey import Survey, checkpoint_of, described, survey
from fxcompress.plans.plan import Plan
from fxcompress.processes import same_data
from fxcompress.rewrite import (
    fold_batch_norms,
    hold_like,
    own_parameters,
    prepared,
    skeleton,
)
from fxcompress.rules import LoadedRules

M = TypeVar("M", bound=nn.Module)

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
"""Unit of the losses of weights that were trained since: they are no predictions any more."""

NOTICEABLE = 1e-3
"""Rises of the objective below this say nothing about the metric."""


def iterate(
    model: M,
    loaded: LoadedRules,
    request: Request,
    *,
    inplace: bool = False,
) -> tuple[M, Plan]:
    """Compress in rounds; arguments and errors as of ``compile``."""
    task, state = _begin(model, loaded, request)
    checkpoint = checkpoint_of(task.found, [*task.training, *task.judging])
    learn = {name: p.requires_grad for name, p in task.private.named_parameters()}
    task.private.requires_grad_(False)
    if checkpoint is not None and (saved := read(checkpoint)) is not None:
        standing, weights = saved
        state = replace(state, **vars(standing))
        if state.estimated:
            _put(task, state.estimated)
            state = _estimated(task, state)
        _put(task, weights)
    for number in range(state.round + 1, loaded.rules.solver.rounds + 1):
        state = replace(_round(task, state, number), round=number)
        if checkpoint is not None:
            write(checkpoint, state, _weights(task))
    for name, parameter in task.private.named_parameters():
        parameter.requires_grad_(learn[name])
    return _finish(model, task, state, inplace)


def _begin(model: nn.Module, loaded: LoadedRules, request: Request) -> tuple[Task, State]:
    """Copy, survey, calibrate, and set batches aside."""
    loss, show = request.loss, request.show
    solver, spec = loaded.rules.solver, loaded.rules.metric
    require_lasting_metric(loaded)
    if solver.objective == "task" and loss is None:
        raise RuleError(
            "solver: {objective: task} descends on your loss: pass loss=lambda output, batch: ... "
            "(one value per prediction), or choose objective: kl, which needs no labels"
        )
    if request.calibration is None:
        raise CalibrationError(
            "gradient steps need calibration data: compile(model, rules, [batch, ...])"
        )
    private = own_parameters(skeleton(model), model)
    found, data = survey(private, loaded, request)
    with same_data(data.batches, described(found)) as every:
        batches = [*every]
    division = Division(batches, len(batches), spec.held_back, spec.seed)
    training = [*division]
    judging = division.held[:MOST_HELD_BACK]
    if not judging:
        held = min(max(1, len(batches) // HELD_BACK), MOST_HELD_BACK)
        judging, training = batches[-held:], batches[:-held] or batches
    show.stage("prepare", None)
    dense = prepared(model)
    hold_like(dense, found.model)
    fold_batch_norms(dense, found.folded)
    for each in (dense, found.model):
        nn.Module.train(each, False)
    task = solver.objective == "task"
    output = found.rules.rules.metric.output
    objective = Objective(None if task else dense, loss if task else None, output, request.forward)
    usable = training if division.held else batches
    measured = usable[: spec.batches]
    passes = passes_over(found, measured, len(measured), division.places)
    estimated = estimate(found, division, passes)
    seen = (
        {id(batch) for batch in (*measured, *division.held)} if METRICS[spec.kind].backward else {}
    )
    _require_usable(
        found, objective, [(at, b) for at, b in enumerate(batches) if id(b) not in seen]
    )
    order = torch.randperm(len(training), generator=torch.Generator().manual_seed(spec.seed))
    whole = Task(
        private,
        found,
        dense,
        measured,
        price(found),
        objective,
        [training[at] for at in order.tolist()],
        judging,
        references(objective, judging, REMEMBERED),
        None,
        estimated.damping,
        bool(division.held),
        division.places if division.held else None,
    )
    if task and not math.isfinite(whole.judge(dense)):
        raise CalibrationError("the objective of the dense model is not finite on these batches")
    calibrated = estimated.calibration
    metrics = metrics_of(found, calibrated.moments, estimated.damping)
    state = State(metrics=metrics, calibration=replace(calibrated, moments={}))
    learned = training_objective(whole, state)  # what features keep counts, too
    size = fitting(learned, found.model, judging[0], solver.memory * 2**30)
    return replace(whole, size=size), state


def _require_usable(
    found: Survey, objective: Objective, batches: Iterable[tuple[int, Any]]
) -> None:
    """Run the model on batches whose outputs the metric does not see, so that errors name them."""
    for place, batch in batches:
        try:
            with torch.no_grad():
                value, _ = objective.sum(found.model, batch)
            if not bool(value.isfinite()):
                raise CalibrationError("the objective of the dense model is not finite")
        except CalibrationError as error:  # of the loss or of the values: the model did run
            raise CalibrationError(f"on calibration batch {place}: {error}") from error
        except Exception as error:
            raise CalibrationError(
                f"the model rejected calibration batch {place}: {type(error).__name__}: {error}"
            ) from error


def _put(task: Task, values: Mapping[str, Tensor]) -> None:
    """Set parameters by name."""
    with torch.no_grad():
        for name, value in values.items():
            task.found.model.get_parameter(name).copy_(value)


def _estimated(task: Task, state: State) -> State:
    """The state with the metric at the weights as they are now."""
    batches = task.metric_batches
    calibrated = calibrated_on(task.found, batches, len(batches), task.places)
    task.show.stage("whiten", None)
    metrics = metrics_of(task.found, calibrated.moments, task.damping)
    return replace(state, metrics=metrics, calibration=replace(calibrated, moments={}))


def _round(task: Task, state: State, number: int) -> State:
    """Threshold, correct if asked to, and descend."""
    solver = task.rules.rules.solver
    state, cut = _thresholded(task, state, number)
    if solver.correct:
        state, cut = corrected(task, state, cut, number)
    if not solver.steps:
        return state
    if solver.gradient == "whitened":
        return whitened(task, state, cut, number)
    return trained(task, state, cut, number)


def _thresholded(task: Task, state: State, number: int) -> tuple[State, Thresholded]:
    """Cut all weights to the budget of a round; the objective of the state is that of the result.

    What earlier rounds took away is put back before: a component that was not worth its cost at one
    budget may be at the next, when others went, and what was learned meanwhile stays on top of it.
    Without that soft rounds lose *more* than one cut, as they never go back on a choice.
    """
    old = task.values()
    keep = softened(task, number).rules.budgets[0].keep
    if state.records and state.records[-1].keep == keep:
        return state, _cut(task, state, number, old)
    whole = _restored_parts(state, old)
    cut, before = _judged(task, state, number, whole)
    if state.objective is not None and _stale(
        before - state.objective, cut.predicted - state.predicted
    ):
        task.reset(old)
        here = {name: value.clone() for name, value in _weights(task).items()}
        state = replace(_estimated(task, state), estimated=here)
        cut, before = _judged(task, state, number, whole)
    taken = [one - other for one, other in zip(whole, task.values(), strict=True)]
    state = replace(state, removed=taken, predicted=cut.predicted, objective=before, scale=1.0)
    return state, cut


def _restored_parts(state: State, old: Sequence[Tensor]) -> list[Tensor]:
    if not state.removed:
        return [*old]
    return [value + part for value, part in zip(old, state.removed, strict=True)]


def _cut(task: Task, state: State, number: int, whole: Sequence[Tensor]) -> Thresholded:
    """Threshold some weights, and put the outcome in place."""
    task.reset(whole)
    tick = task.show.stage("threshold", len(task.found.sites))
    cut = threshold(task.found, state.metrics, softened(task, number), task.pricings, tick=tick)
    task.put(cut.weights())
    return cut


def _judged(
    task: Task, state: State, number: int, whole: Sequence[Tensor]
) -> tuple[Thresholded, float]:
    """Threshold some weights, put the outcome in place, and take its objective."""
    cut = _cut(task, state, number, whole)
    task.show.stage("judge", None)
    return cut, task.judge(task.found.model)


def _stale(rise: float, predicted: float) -> bool:
    """Whether more was taken away at a cost that is quite another than the metric said.

    Both are differences to the last thresholding: each takes away all that its budget demands.
    """
    if max(rise, predicted) < NOTICEABLE:
        return False
    return not predicted / STALE < rise < predicted * STALE


def _finish(model: M, task: Task, state: State, inplace: bool) -> tuple[M, Plan]:
    """Decompose in full, rewrite, and write down how it went."""
    tick = task.show.stage("decompose", len(task.found.sites))
    cut = threshold(task.found, state.metrics, task.rules, task.pricings, tick=tick)
    analysis = replace(cut.analysis, estimate=Estimate(state.calibration, damping=task.damping))
    if not inplace:
        rewritten, planned = rewrite(task.private, analysis)
        return rewritten, _measured(task, rewritten, _described(task, state, planned))
    rewritten, planned = rewrite(model, analysis, inplace=True)
    shared = {id(parameter) for parameter in task.private.parameters()}
    held = prepared(model)
    hold_like(held, task.found.model)
    own = dict(held.named_parameters())
    changed = {entry.name for entry in planned.rewritten}
    with torch.no_grad():
        for site in task.found.sites:  # those that stay dense learned, too
            if site.name in changed or site.weight not in own:
                continue
            if id(task.weight(site)) in shared:
                _keep(task.dense, own[site.weight])
                own[site.weight].copy_(task.weight(site))
    return rewritten, _measured(task, rewritten, _described(task, state, planned))


def _keep(dense: nn.Module, parameter: nn.Parameter) -> None:
    """Let the dense model have a copy of a parameter that it shares with one to be changed."""
    copied = nn.Parameter(parameter.detach().clone(), requires_grad=False)
    for module in dense.modules():
        for name, own in module._parameters.items():
            if own is parameter:
                module._parameters[name] = copied


def _measured(task: Task, rewritten: nn.Module, planned: Plan) -> Plan:
    """The plan with the model measured on the batches that the metric has never seen.

    Steps were accepted by what they do to these batches, so it is a slightly kind measure.
    """
    found = measure_whole(
        task.dense, rewritten, task.judging if task.held_back else (),
        task.objective.output, task.found.request,
    )  # fmt: skip
    return planned.model_copy(update={"held_back": found})


def _described(task: Task, state: State, planned: Plan) -> Plan:
    """The plan, with how far every weight is from the dense model's in place of its last cut."""
    sites = {site.name: site for site in task.found.sites}
    entries = []
    for entry in planned.sites:
        if entry.form is None:
            entries.append(entry)
            continue
        metric = state.metrics[entry.name]
        dense = canonical_weight(operator_at(task.dense, entry.name)).detach()
        weight = task.weight(sites[entry.name]).detach()
        change = sites[entry.name].shape.canonical(weight) - dense
        away, whole = metric.loss(change), metric.loss(dense)
        kept = min(max(1 - away / whole, 0.0), 1.0) if whole else 1.0
        entries.append(entry.model_copy(update={"predicted": away, "energy": kept}))
    predicted = math.fsum(entry.predicted for entry in entries)
    return planned.model_copy(
        update={
            "sites": tuple(entries),
            "budget": planned.budget.model_copy(
                update={
                    "predicted": predicted,
                    "fitted": predicted,
                    "bound": None,
                    "multiplier": None,
                }
            ),
            "loss_unit": f"{planned.loss_unit}{AWAY}",
            "objective": task.rules.rules.solver.objective,
            "rounds": state.records,
        }
    )


def _weights(task: Task) -> dict[str, Tensor]:
    """Weights and biases of all sites as they are now, by parameter name."""
    found = {}
    for site in task.found.sites:
        found[site.weight] = task.weight(site).detach()
        bias = getattr(operator_at(task.found.model, site.name), "bias", None)
        if bias is not None:
            found[f"{site.name}.bias"] = bias.detach()
    return found
