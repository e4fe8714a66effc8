"""Ways to make up for what a thresholding took away; each is kept only if the objective falls.

The closed-form correction, gradient steps on the factors, and whitened gradient steps.

The last are the proximal steps of ISVT.  The gradient in the coordinates of the metric,

    V' = prox( W - α M⁻¹ ∇L(W) ),       M⁻¹ ∇ = G⁻¹ ∇ A⁻¹   (of a Kronecker metric)

is ``S' = S - α L_G⁻¹ ∇ L_A⁻ᵀ`` in whitened coordinates, thresholded there
(:mod:`fxcompress.isvt.threshold`).  With α below 1/L, L the Lipschitz constant of ``M⁻¹ ∇L``, the
objective falls with every step, and fixed points are critical (arXiv 2507.09428, section 4).
α = 1 is *not* safe for the KL divergence, although M is its Hessian in the K-FAC approximation;
and with few tokens the step is mostly sampling noise in the many directions of small
curvature (README, "Rounds").  Steps are backtracked, so that costs time and not the model.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from fxcompress.isvt.correction import correctable, cross_moments, cut_again, fitted
from fxcompress.isvt.descent import Diverged, cosine, descend, gradient
from fxcompress.isvt.features import Features
from fxcompress.isvt.objective import Objective
from fxcompress.isvt.task import State, Task, recorded, softened
from fxcompress.isvt.threshold import Thresholded, threshold
from fxcompress.pipeline.build import Student, student
from fxcompress.pipeline.sites import Site
from fxcompress.progress import stages

LEARNING_RATE = 2.5e-4
"""At its highest, for factors; the size of an entry's update is a fifth of it (Muon)."""

STEP_SIZE = 1.0
"""Along a whitened gradient, to begin with: a Newton step, were the metric the Hessian."""

ATTEMPTS = 3
"""Tries of a round, each at half the rate of the one before, until it is given up."""

SHARE = 0.25
"""Of the way to corrected weights, to begin with; shallow models can go all of it."""

SMALLEST_SHARE = 0.03
"""From which on the correction is given up."""

HALVINGS = 12
"""Of the step size along a whitened gradient, until the round is given up."""


def corrected(task: Task, state: State, cut: Thresholded, number: int) -> tuple[State, Thresholded]:
    """Fit the weights to the inputs that they get, as far as that descends.

    The share of the way is doubled or halved from :data:`SHARE` on while that is better.
    """
    held = {id(batch) for batch in task.judging}  # or it would be judged by what it was fitted to
    batches = [batch for batch in task.metric_batches if id(batch) not in held] or task.judging
    tick = task.show.stage("correct", len(batches))
    damping, _ = task.damping
    model, before = task.found.model, state.objective
    assert before is not None
    sites = correctable(_rewritten(cut), state.metrics)
    forward = task.found.request.forward
    moments = cross_moments(task.dense, model, sites, batches, damping, forward, tick)
    task.show.stage("correct", None)
    old = task.values()

    def tried(share: float) -> tuple[float, float, list[Tensor]]:
        task.reset(old)
        found = fitted(task.dense, model, sites, state.metrics, moments, share)
        task.put(cut_again(cut, found))
        return task.judge(model), share, task.values()

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
    record = recorded(task, state, number, cut.predicted, after, share, "correction")
    state = replace(state, records=(*state.records, record))
    if not record.accepted:
        task.reset(old)
        return state, cut
    task.reset(values)
    # Again, for the factors; the weights have these ranks already.
    cut = threshold(task.found, state.metrics, softened(task, number), task.pricings, cut.starts)
    return replace(state, objective=after), cut


def _rewritten(cut: Thresholded) -> list[Site]:
    """Sites that a thresholding gives another form, as they are without it."""
    sites: dict[str, Site] = {}
    for group, choice in cut.solution.decided(cut.analysis.groups):
        place = group.narrowing
        whole = cut.analysis.group(place.hidden) if place else group
        if place or choice.form is not None:
            sites |= {site.name: site for site in whole.sites}
    return [*sites.values()]


def trained(task: Task, state: State, cut: Thresholded, number: int) -> State:
    """Gradient steps on the factors, at the ranks of the round; at half the rate if they fail."""
    solver = task.rules.rules.solver
    steps, total = solver.steps, solver.steps * solver.rounds
    highest = solver.learning_rate or LEARNING_RATE
    objective = training_objective(task, state)
    for _ in range(ATTEMPTS):
        with stages(enabled=False) as silent:
            made = student(task.private, cut.analysis.showing(silent))
        left = _left_dense(task, made)
        old = [weight.detach().clone() for weight in left]
        rate = highest * state.scale
        # One rise and fall over all rounds: restarted in every round, it gained less on SmolLM2.
        rates = [rate * cosine(at, total) for at in range((number - 1) * steps, number * steps)]
        batches = task.take(state.cursor, steps)
        state = replace(state, cursor=state.cursor + steps)
        tick = task.show.stage(f"round {number}/{solver.rounds}", steps)
        learning = [*made.parameters, *left]
        for parameter in learning:
            parameter.requires_grad_(True)
        try:
            descend(objective, made.model, learning, batches, rates, task.size, tick)
            task.show.stage("judge", None)
            after = task.judge(made.model)
        except Diverged:
            after = math.inf
        for parameter in learning:
            parameter.requires_grad_(False)
            parameter.grad = None
        record = recorded(task, state, number, cut.predicted, after, rate, "factors")
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


def training_objective(task: Task, state: State) -> Objective:
    """What gradients are of; what is accepted is judged by the plain objective."""
    solver, weight = task.rules.rules.solver, task.rules.rules.solver.features
    if task.objective.dense is None or not weight or solver.gradient == "whitened":
        return task.objective
    features = Features.of(weight, task.found.sites, state.metrics)
    return replace(task.objective, features=features if features.sites else None)


def _left_dense(task: Task, made: Student) -> list[nn.Parameter]:
    """Weights of matched sites that the student keeps as they are: they learn, too."""
    cut = {site.name for site in made.plan.rewritten}
    own = {id(parameter) for parameter in made.model.parameters()}
    weights = [
        task.found.model.get_parameter(site.weight)
        for site in task.found.sites
        if site.name not in cut
    ]
    return [weight for weight in weights if id(weight) in own]


def whitened(task: Task, state: State, cut: Thresholded, number: int) -> State:
    """Proximal gradient steps, backtracked on the batches that the gradient is taken on."""
    solver = task.rules.rules.solver
    model, sites = task.found.model, task.found.sites
    first = solver.learning_rate or STEP_SIZE
    rate = first * state.scale
    now = task.objective.mean(model, task.training)
    tick = task.show.stage(f"round {number}/{solver.rounds}", solver.steps)
    learning = [model.get_parameter(site.weight) for site in sites]
    for _ in range(solver.steps):
        old = task.values()
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
            state.metrics[site.name].solve(site.shape.canonical(_gradient(task, site)))
            for site in sites
        ]
        for parameter in learning:
            parameter.grad = None
        state = replace(state, objective=now)
        for _ in range(HALVINGS):
            task.put(
                (site, site.shape.canonical(value) - rate * direction)
                for site, value, direction in zip(sites, old, directions, strict=True)
            )
            try:
                loaded = softened(task, number)
                cut = threshold(task.found, state.metrics, loaded, task.pricings, cut.starts)
                task.put(cut.weights())
                after = task.objective.mean(model, task.training)
            except ValueError:  # a step so long that weights overflow
                after = math.inf
            record = recorded(task, state, number, cut.predicted, after, rate, "whitened")
            state = replace(state, records=(*state.records, record))
            if record.accepted:
                now = after
                break
            task.reset(old)
            rate /= 2
        else:
            break
        tick()
    for parameter in learning:
        parameter.grad = None
    return replace(state, objective=task.judge(model), scale=rate / first)


def _gradient(task: Task, site: Site) -> Tensor:
    weight = task.weight(site)
    return torch.zeros_like(weight) if weight.grad is None else weight.grad
