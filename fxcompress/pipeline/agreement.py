"""Predicted losses held against measured ones: figures, and warnings where they part."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fxcompress.plans.plan import Fidelity, HeldBack, MeasuredSite, Plan
from fxcompress.report.quantities import LOSS_IN_NATS, loss

Numbers = NDArray[np.float64]

ENOUGH = 10
"""Sites that a warning about their order needs.  Of ten, an estimated correlation below
:data:`LOW` where the true one is 0.8 is one case in twelve (Fisher's z transform, standard
error 1.06/√(n-3)); of twenty, one in sixty."""

LOW = 0.5
"""Rank correlations below this are worth a warning: predictions then explain less than a quarter
(ρ²) of the variance of the measured ranks."""

SCATTER = 2.0
"""... if ratios of measured to predicted are typically off their median by this factor.  A budget
makes losses alike; where all of them are, their order says nothing, and is no harm either."""

APART = 3.0
"""Median factor between predicted and measured that is worth a warning, either way."""

INTERACTION = 2.0
"""Measured loss of the whole, relative to the sum of the sites', that is worth a warning."""

PARTED = 2.0
"""Factor between predicted and measured loss of the whole that is worth a warning, either way."""

NOTICEABLE = 1e-3
"""Losses below this are lost in rounding and sampling: they say nothing about the metric."""

CLEAR = 2.0
"""Standard errors that a measured value has to exceed to be above its noise."""


def assess(
    plan: Plan, sums: Numbers, whole: Numbers, predictions: NDArray[np.int64], output: str
) -> Fidelity:
    """Means, errors and correlation of what was measured batch by batch.

    Args:
        plan: with the predictions.
        sums: KL of each of :func:`units` in each batch, in nats (batches x units).
        whole: of the compressed model (batches).
        predictions: how many each batch holds (batches).
        output: family of the output distribution.
    """
    found = tuple(
        MeasuredSite(
            name=name,
            sites=members,
            predicted=math.fsum(s.predicted for s in plan.sites if s.name in members),
            measured=_mean(column, predictions),
            error=_standard_error(column, predictions),
        )
        for (name, members), column in zip(units(plan).items(), sums.T, strict=True)
    )
    clear = [one for one in found if _is_clear(one)]
    ratios = _ratios(clear)
    fidelity = Fidelity(
        batches=len(predictions),
        predictions=int(predictions.sum()),
        output=output,
        sites=found,
        measured=_mean(whole, predictions),
        error=_standard_error(whole, predictions),
        rank_correlation=_spearman(found),
        ratio=float(np.median(ratios)) if len(ratios) and plan.loss_unit == LOSS_IN_NATS else None,
    )
    return fidelity.model_copy(update={"warnings": tuple(_warnings(fidelity, clear))})


def parted(plan: Plan, measured: HeldBack) -> list[str]:
    """A warning where the measured loss of a plan is not the predicted one.

    Args:
        plan: with its prediction.
        measured: on batches that the metric did not see.
    """
    predicted, found = plan.budget.predicted, measured.measured
    noise = CLEAR * (measured.error or 0.0)
    if plan.loss_unit != LOSS_IN_NATS or max(predicted, found) < NOTICEABLE:
        return []
    if found - noise > PARTED * predicted:
        return [
            f"on the batches held back the compressed model loses {loss(found)} nats per "
            f"prediction, where the metric predicts {loss(predicted)}: losses of layers do not "
            "just add up in a cut this deep, or the calibration data are few; keep more, give more "
            "data, or compress in rounds (solver: {rounds: 5, steps: 20})"
        ]
    if found + noise < predicted / PARTED:
        return [
            f"on the batches held back the compressed model loses {loss(found)} nats per "
            f"prediction, where the metric predicts {loss(predicted)}: the metric is a poor guide "
            "here, and another may spend the budget better (metric: {kind: ekfac}, fisher: exact)"
        ]
    return []


def units(plan: Plan) -> dict[str, tuple[str, ...]]:
    """What is rewritten together, by the name of the site or the bundle: names of sites."""
    found: dict[str, tuple[str, ...]] = {}
    for site in plan.rewritten:
        name = site.bundle or site.name
        found[name] = (*found.get(name, ()), site.name)
    return found


def mean_with_error(sums: Numbers, predictions: NDArray[np.int64]) -> tuple[float, float | None]:
    """Mean per prediction of sums over batches, and its standard error; None of one batch."""
    return _mean(sums, predictions), _standard_error(sums, predictions)


def _mean(sums: Numbers, predictions: NDArray[np.int64]) -> float:
    return float(sums.sum() / predictions.sum())


def _standard_error(sums: Numbers, predictions: NDArray[np.int64]) -> float | None:
    """Standard error of a mean per prediction of data in batches (ratio; Cochran 1977, 6.3).

    The predictions of a batch depend on one another, batches do not.
    """
    count = len(sums)
    if count < 2:
        return None
    residuals = sums - sums.sum() / predictions.sum() * predictions
    variance = count / (count - 1) * np.square(residuals).sum()
    return float(np.sqrt(variance) / predictions.sum())


def _is_clear(one: MeasuredSite) -> bool:
    return one.measured > CLEAR * (one.error or 0.0)


def _ratios(sites: Sequence[MeasuredSite]) -> Numbers:
    return np.array([one.measured / one.predicted for one in sites if one.predicted > 0])


def _spearman(sites: Sequence[MeasuredSite]) -> float | None:
    """Correlation of ranks; equal values share the mean of their ranks."""
    predicted = _ranks([one.predicted for one in sites])
    measured = _ranks([one.measured for one in sites])
    if len(sites) < 3 or np.ptp(predicted) == 0 or np.ptp(measured) == 0:
        return None
    return float(np.corrcoef(predicted, measured)[0, 1])


def _ranks(values: Sequence[float]) -> Numbers:
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: Numbers = (last - (counts - 1) / 2)[places]
    return ranks


def _warnings(fidelity: Fidelity, clear: Sequence[MeasuredSite]) -> list[str]:
    """Statements are made of sites above their noise only."""
    notes = []
    number, ratio = len(fidelity.sites), fidelity.ratio
    if len(clear) < number / 2:
        notes.append(
            f"the measured KL of {number - len(clear)} of {number} sites does not exceed its "
            "sampling error: measure on more batches"
        )
    correlation, ratios = _spearman(clear), _ratios(clear)
    if (
        len(clear) >= ENOUGH
        and correlation is not None
        and correlation < LOW
        and _typical_factor(ratios) > SCATTER
    ):
        notes.append(
            "predicted and measured losses rank the sites differently (correlation "
            f"{correlation:.2f} over {len(clear)} sites above their noise): the metric is a bad "
            "guide here. Try more calibration data, data like those measured on, metric kind kfac "
            "if it is another one, fisher: exact and damping: {output: 1.0e-3} where classes are "
            "few, or smaller cuts"
        )
    if ratio is not None and ratio < 1 / APART:
        notes.append(
            f"predicted losses are too high, in the median {1 / ratio:.1f} times the measured "
            "ones: they include the damping, which outweighs the rest with few classes or mild "
            "cuts. Their order may still be right; damping: {output: 1.0e-3} brings them closer"
        )
    if ratio is not None and ratio > APART:
        notes.append(
            f"predicted losses are too low: measured ones are {ratio:.1f} times as high in the "
            "median. Either the cuts are too large for a second-order estimate (try a larger "
            "keep), or the calibration data are too few or unlike those measured on, or the model "
            "is so sure of its labels that hardly any other was drawn (fisher: exact)"
        )
    noise, singly = CLEAR * (fidelity.error or 0.0), fidelity.singly
    if number > 1 and fidelity.measured - noise > INTERACTION * singly > 0:
        notes.append(
            f"the sites interact: the whole model loses {loss(fidelity.measured)}, the sites one "
            f"at a time {loss(singly)} in sum. A budget adds up losses of sites, so expect more "
            "than it predicts; a larger keep, or several smaller steps, narrow the gap"
        )
    return notes


def _typical_factor(ratios: Numbers) -> float:
    """How far ratios typically are from their median, as a factor of at least 1."""
    logs = np.log(ratios[ratios > 0])
    return float(np.exp(np.median(np.abs(logs - np.median(logs))))) if len(logs) else 1.0
