"""``sweep``: what many budgets would cost, from one calibration.

Record, match, calibrate and decompose do not depend on the budget; they are done once, and only
the budget is solved anew, and the model rewritten where it is to be evaluated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn

from fxcompress.analysis import analyse
from fxcompress.compile import Rules, read_rules, rewrite, with_keep
from fxcompress.errors import BudgetError
from fxcompress.graph.inputs import Forward
from fxcompress.metric import Loss
from fxcompress.planning import make_plan
from fxcompress.report.progress import stages
from fxcompress.report.sweep import Point, Sweep

M = TypeVar("M", bound=nn.Module)
Evaluate = Callable[[Any], float | Mapping[str, float]]

KEEPS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)


def sweep(
    model: nn.Module,
    rules: Rules,
    calibration: Iterable[Any] | None = None,
    *,
    keeps: Sequence[float] = KEEPS,
    evaluate: Evaluate | None = None,
    examples: Sequence[Any] | None = None,
    loss: Loss | None = None,
    forward: Forward | None = None,
    progress: bool | None = None,
) -> Sweep:
    """Plan a model for many budgets, and evaluate it at each if asked to.

    Args:
        model, rules, calibration, examples, loss, forward, progress: as of
            :func:`fxcompress.compile`.
        keeps: fractions that replace ``budget.keep`` of the rules.
        evaluate: from a model to a number, or several by name; the dense model is evaluated, too.
            Without it nothing is rewritten.

    Returns:
        One point for every keep, largest first.  One that cannot be met says so.  Interrupted by
        the keyboard, what was done until then.

    Raises:
        RuleError, RecordError, CalibrationError, RewriteError: as of :func:`fxcompress.compile`.
        BudgetError: a keep is not a fraction, or none can be met.
    """
    loaded = [with_keep(read_rules(rules), keep) for keep in sorted(set(keeps), reverse=True)]
    if not loaded:
        raise BudgetError("a sweep needs at least one keep")
    points: list[Point] = []
    with torch.inference_mode(False), stages(progress) as show:
        analysis = analyse(model, loaded[0], calibration, examples, loss, forward, show)
        dense = {} if evaluate is None else _values(evaluate(model))
        try:
            for each in loaded:
                keep = each.rules.budgets[0].keep
                now = replace(analysis, rules=replace(analysis.rules, rules=each.rules))
                try:
                    if evaluate is None:
                        points.append(Point(keep, make_plan(now, {}, show)))
                    else:
                        small, planned = rewrite(model, now, forward, show)
                        show.stage("evaluate", None)
                        points.append(Point(keep, planned, _values(evaluate(small))))
                except BudgetError as error:
                    points.append(Point(keep, None, reason=str(error)))
        except KeyboardInterrupt:
            if not points:
                raise
    if all(point.plan is None for point in points):
        raise BudgetError(points[0].reason)
    return Sweep(tuple(points), dense, complete=len(points) == len(loaded))


def _values(found: float | Mapping[str, float]) -> dict[str, float]:
    if isinstance(found, Mapping):
        return {str(name): float(value) for name, value in found.items()}
    return {"value": float(found)}
