"""Gradient steps on the factors of a compressed model.

Ranks are given here; what moves is where the singular subspaces lie.  Two-dimensional factors are
trained by Muon (:mod:`fxcompress.isvt.muon`): its update has all singular values alike.  That suits
factors: the components of a truncated weight differ in scale by orders of magnitude, and an
update of Adam is as large in a direction that noise alone points to as in one that matters.
Tried beside it on SmolLM2-135M, on a text that nothing is trained on, and behind it at equal steps:
Adam in the coordinates of the weights, and in the eigenbases of the K-FAC factors (SOAP).
No better, at equal steps there: factors of balanced scale (``U √Σ``) instead of the form's own;
Muon in coordinates stretched or squeezed by fourth roots of the K-FAC factors; four passages of
128 tokens a step instead of one of 512; half the rate, and twice; half of the text, for the metric,
too, by another author.
Everything else (kernels, biases) is trained by Adam, whose updates have the same root mean square.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from fxcompress.isvt.muon import Muon
from fxcompress.isvt.objective import Objective, pieces
from fxcompress.metric.output import NotFinite

WARM_UP = 10
"""Steps over which the learning rate rises."""


class Diverged(Exception):
    """A value that is not finite."""


class Optimizer:
    """Muon for matrices and Adam for the rest, at one learning rate.

    Args:
        parameters: that learn.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        matrices = [p for p in parameters if p.dim() == 2 and min(p.shape) > 1]
        others = [p for p in parameters if p.dim() != 2 or min(p.shape) <= 1]
        self.parts: list[torch.optim.Optimizer] = []
        if matrices:
            self.parts.append(Muon(matrices))
        if others:
            self.parts.append(torch.optim.Adam(others, lr=0.0, betas=(0.9, 0.99)))

    def step(self, rate: float) -> None:
        """One step at a learning rate."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = rate
            part.step()


def cosine(step: int, steps: int) -> float:
    """Share of the learning rate at a step: a short rise, then half a cosine.

    >>> [round(cosine(step, 100), 2) for step in (0, 9, 50, 99)]
    [0.1, 0.98, 0.5, 0.0]
    """
    rise = min(1.0, (step + 1) / min(WARM_UP, max(1, steps // 5)))
    return rise * 0.5 * (1 + math.cos(math.pi * step / steps))


@torch.enable_grad()
def gradient(
    objective: Objective,
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    batches: Iterable[Any],
    size: int | None,
) -> float:
    """Set the gradients of the mean over the predictions of batches.

    Args:
        objective: to differentiate.
        model: that it is of.
        parameters: whose gradients are set.
        batches: to take the mean over.
        size: samples that are computed at once.

    Returns:
        The mean.

    Raises:
        Diverged: it is not finite.
    """
    for parameter in parameters:
        parameter.grad = None
    total, predictions = 0.0, 0
    for batch in batches:
        for piece in pieces(batch, size):
            try:
                value, count = objective.sum(model, piece)
            except NotFinite as error:
                raise Diverged from error
            if not bool(value.isfinite()):
                raise Diverged
            # Not backward(): that sets gradients of all that learns, the user's own tensors too.
            found = torch.autograd.grad(value, parameters, allow_unused=True)
            for parameter, part in zip(parameters, found, strict=True):
                if part is not None:
                    parameter.grad = part if parameter.grad is None else parameter.grad + part
            total += float(value.detach())
            predictions += count
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad = parameter.grad / predictions  # not in place: two may be one tensor
    return total / predictions


def descend(
    objective: Objective,
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    batches: Sequence[Any],
    rates: Sequence[float],
    size: int | None,
    tick: Callable[[], None],
) -> None:
    """One step for every batch.

    Args:
        objective: to descend on.
        model: changed.
        parameters: of it, that learn.
        batches: one a step.
        rates: learning rate of every step.
        size: samples that are computed at once.
        tick: called after every step.

    Raises:
        Diverged: the objective is not finite.
    """
    optimizer = Optimizer(parameters)
    for batch, rate in zip(batches, rates, strict=True):
        gradient(objective, model, parameters, [batch], size)
        optimizer.step(rate)
        tick()
    for parameter in parameters:
        parameter.grad = None
