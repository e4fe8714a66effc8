"""What rounds of ISVT work on: the task stays the same, the state goes from round to round."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fxcompress.isvt.objective import Objective
from fxcompress.isvt.saved import Standing
from fxcompress.isvt.schedule import share
from fxcompress.isvt.threshold import Metrics
from fxcompress.metric import Calibration
from fxcompress.pipeline.held_back import DAMPING
from fxcompress.pipeline.pricing import Pricing
from fxcompress.pipeline.sites import Site
from fxcompress.pipeline.survey import Survey
from fxcompress.plans.plan import Round
from fxcompress.progress import Progress
from fxcompress.rules import LoadedRules, at_progress

Kind = Literal["factors", "whitened", "correction"]

FALL = 0.6
"""Share of the rounds after which a soft schedule is at the budget; the rest makes up for it."""


@dataclass(frozen=True, eq=False)
class Task:
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
        damping: of the metric.
        held_back: whether the metric has never seen the judging batches.
        places: what errors call the metric's batches.
    """

    private: Any
    found: Survey
    dense: nn.Module
    metric_batches: Sequence[Any]
    pricings: Mapping[str, Pricing]
    objective: Objective
    training: Sequence[Any]
    judging: Sequence[Any]
    references: Sequence[Any]
    size: int | None
    damping: tuple[float, float] = DAMPING
    held_back: bool = False
    places: Sequence[int] | None = None

    @property
    def show(self) -> Progress:
        """Where progress is shown."""
        return self.found.request.show

    @property
    def rules(self) -> LoadedRules:
        """The rules that the model is compressed by."""
        return self.found.rules

    def weight(self, site: Site) -> Tensor:
        """The parameter of a site as it is now."""
        return self.found.model.get_parameter(site.weight)

    @torch.no_grad()
    def put(self, weights: Iterable[tuple[Site, Tensor]]) -> None:
        """Put weights (canonical layout) in place."""
        for site, weight in [*weights]:
            self.weight(site).copy_(site.shape.stored(weight))

    @torch.no_grad()
    def values(self) -> list[Tensor]:
        """Copies of the weights as they are stored, in the order of the sites."""
        return [self.weight(site).clone() for site in self.found.sites]

    @torch.no_grad()
    def reset(self, old: Sequence[Tensor]) -> None:
        """Put such copies in place."""
        for site, value in zip(self.found.sites, old, strict=True):
            self.weight(site).copy_(value)

    def take(self, cursor: int, count: int) -> list[Any]:
        """The next batches, from the first again when all are used up."""
        return [self.training[at % len(self.training)] for at in range(cursor, cursor + count)]

    def judge(self, model: nn.Module) -> float:
        """The objective on the batches held back."""
        return self.objective.mean(model, self.judging, self.references)


@dataclass(frozen=True, eq=False, kw_only=True)
class State(Standing):
    """What changes from round to round, beside the weights.

    Attributes:
        metrics: by site name.
        calibration: how they were estimated.
    """

    metrics: Metrics
    calibration: Calibration


def softened(task: Task, number: int) -> LoadedRules:
    """The rules with the budget of a round."""
    solver = task.rules.rules.solver
    falling = max(1, round(FALL * solver.rounds))
    return at_progress(task.rules, share(solver.schedule, number / falling))


def recorded(
    task: Task, state: State, number: int, removed: float, after: float, rate: float, kind: Kind
) -> Round:
    """What an attempt came to.

    Args:
        task, state: before it.
        number: of the round.
        removed: what the thresholding took away, by the metric.
        after: the objective; not below that of the state: it is not accepted.
        rate: of the steps, or the share of the way to a correction.
        kind: of the attempt.
    """
    before = state.objective
    assert before is not None
    return Round(
        round=number,
        keep=softened(task, number).rules.budgets[0].keep,
        removed=removed,
        before=before,
        after=after if math.isfinite(after) else None,
        accepted=after < before,
        rate=rate,
        kind=kind,
    )
