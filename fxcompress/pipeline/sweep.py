"""``sweep``: what many budgets would cost, from one calibration.

Record, match, calibrate and decompose do not depend on the budget; they are done once, and only
the budget is solved anew, and the model rewritten where it is to be evaluated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fxcompress.collective import joined
from fxcompress.errors import BudgetError
from fxcompress.graph.inputs import Forward
from fxcompress.graph.wrappers import unwrapped
from fxcompress.metric import Loss
from fxcompress.pipeline.analysis import Analysis, analyse
from fxcompress.pipeline.build import rewrite
from fxcompress.pipeline.decide import foreseen, make_plan
from fxcompress.pipeline.request import Request
from fxcompress.plans.plan import attach_plan
from fxcompress.progress import stages
from fxcompress.report.sweep import Point, Sweep
from fxcompress.rewrite import resident
from fxcompress.rules import LoadedRules, Rules, read_rules, with_budget

Evaluate = Callable[[Any], float | Mapping[str, float]]

KEEPS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)


def sweep(
    model: nn.Module,
    rules: Rules,
    calibration: Iterable[Any] | None = None,
    *,
    keeps: Sequence[float] = KEEPS,
    unit: str | None = None,
    memory: int | str | None = None,
    exclude: str | Iterable[str] | None = None,
    metric: str | None = None,
    seed: int | None = None,
    evaluate: Evaluate | None = None,
    examples: Sequence[Any] | None = None,
    loss: Loss | None = None,
    forward: Forward | None = None,
    progress: bool | None = None,
    alone: bool = False,
) -> Sweep:
    """Plan a model for many budgets, and evaluate it at each if asked to.

    Args:
        model, rules, calibration, unit, memory, exclude, metric, seed: as of
            :func:`fxcompress.compile`; so are examples, loss, forward, progress, and alone.
        keeps: fractions that replace ``budget.keep`` of the rules.
        evaluate: from a model to a number, or several by name; the dense model is evaluated, too.
            What it is given is as :func:`fxcompress.compile` returns it, plan included, and only
            kept until the next.  Without it nothing is rewritten.

    Returns:
        One point for every keep, largest first.  One that cannot be met says so.  Interrupted by
        the keyboard once there is a point, what was done until then, ``complete`` false.

    Raises:
        RuleError, RecordError, CalibrationError, RewriteError: as of :func:`fxcompress.compile`.
        BudgetError: a keep is not a fraction, or none can be met.
        TypeError, ValueError: ``evaluate`` returns no numbers, or others than for the dense model.
    """
    model = resident(unwrapped(model))
    given = read_rules(rules, memory=memory, exclude=exclude, metric=metric, seed=seed)
    loaded = _by_keep(given, keeps, unit)
    points: list[Point] = []
    dense: dict[str, float] = {}
    try:
        with torch.inference_mode(False), joined(alone) as processes, stages(progress) as show:
            first = next(iter(loaded.values()))
            request = Request(show, calibration, examples, loss, forward, processes=processes)
            analysis = analyse(model, first, request)
            shared = dict(show.seconds)
            if evaluate is not None:
                show.stage("evaluate", None)
                dense = _values(evaluate(model))
            tick = show.stage("sweep", len(loaded))
            for keep, each in loaded.items():
                now = replace(analysis, rules=replace(analysis.rules, rules=each.rules))
                points.append(_point(keep, model, now, evaluate, shared))
                if points[-1].plan is not None and points[-1].values.keys() != dense.keys():
                    raise ValueError(
                        f"evaluate must return the same names for every model: {[*dense]} for the "
                        f"dense one, {[*points[-1].values]} at keep {keep:g}"
                    )
                tick()
    except KeyboardInterrupt:
        if not points:
            raise
    if all(point.plan is None for point in points):
        raise BudgetError(points[0].reason)
    return Sweep(tuple(points), dense, complete=len(points) == len(loaded))


def _by_keep(
    rules: LoadedRules, keeps: Iterable[float], unit: str | None
) -> dict[float, LoadedRules]:
    """The rules with every budget, largest first, each once."""
    if not isinstance(keeps, Iterable):
        raise BudgetError(f"keeps must be several fractions; for a single one, keeps=({keeps!r},)")
    loaded = [with_budget(rules, keep, unit) for keep in keeps]
    if not loaded:
        raise BudgetError("a sweep needs at least one keep")
    by_keep = {each.rules.budgets[0].keep: each for each in loaded}
    return dict(sorted(by_keep.items(), reverse=True))


def _point(
    keep: float,
    model: nn.Module,
    analysis: Analysis,
    evaluate: Evaluate | None,
    shared: Mapping[str, float],
) -> Point:
    """What ``compile`` makes of one budget, or ``plan`` if there is nothing to evaluate.

    Its stages are not shown one by one, so that the bar of the sweep can tell how long is left.
    """
    with stages(enabled=False) as own:
        analysis = analysis.showing(own)
        try:
            if evaluate is None:
                planned = foreseen(analysis, make_plan(analysis, {}))
                planned = planned.model_copy(update={"warnings": analysis.notes})
            else:
                small, planned = rewrite(model, analysis)
        except BudgetError as error:
            return Point(keep, None, reason=str(error))
    planned = planned.model_copy(update={"seconds": {**shared, **own.seconds}})
    if evaluate is None:
        return Point(keep, planned)
    attach_plan(small, planned)
    return Point(keep, planned, _values(evaluate(small)))


def _values(found: float | Mapping[str, float]) -> dict[str, float]:
    named = found if isinstance(found, Mapping) else {"value": found}
    try:
        return {str(name): float(value) for name, value in named.items()}
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"evaluate must return a number, or numbers by name, not {found!r}"
        ) from error
