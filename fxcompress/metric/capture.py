"""Moments of every site, from one pass over the calibration data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fxcompress.graph.inputs import Forward, device_of
from fxcompress.metric.metric import Metric
from fxcompress.metric.moment_sums import MomentSums
from fxcompress.metric.moments import Moments
from fxcompress.metric.output import Loss
from fxcompress.metric.own_sums import OwnSums
from fxcompress.metric.passes import DRAWS, Draws, Reach, run_pass
from fxcompress.metric.squares import SquareSums
from fxcompress.metric.statistic import Statistic
from fxcompress.metric.visitor import Several, SiteFacts, Sums


@dataclass(frozen=True, eq=False)
class Calibration:
    """The outcome of the data pass.

    Attributes:
        moments: per site name; sites with one input share one ``Moments.input`` tensor.
        batches: number of batches seen.
        predictions: number of predictions that the Fisher is a mean over.
        kind: output family, ``"loss"`` for a user's loss, ``"none"`` without a backward pass.
        reach: what of the data got to every site, and back to it.
        unmeasured: sites without an influence on the output that could be measured, and why.
        ran: modules beside the sites that the data ran through, of those asked about.
    """

    moments: Mapping[str, Moments]
    batches: int = 0
    predictions: int = 0
    kind: str = "none"
    reach: Mapping[str, Reach] = field(default_factory=dict)
    unmeasured: Mapping[str, str] = field(default_factory=dict)
    ran: tuple[str, ...] = ()


def calibrate(
    model: nn.Module,
    sites: Sequence[SiteFacts],
    batches: Iterable[Any],
    metric: Metric,
    *,
    drawn: Draws = DRAWS,
    loss: Loss | None = None,
    forward: Forward | None = None,
    everywhere: bool = True,
    places: Sequence[int] | None = None,
    watched: Sequence[str] = (),
    tick: Callable[[], None] = lambda: None,
) -> Calibration:
    """Gather the moments that ``metric`` needs at every site.

    Args:
        metric: says which statistics are needed.
        model, sites, batches, drawn, loss, forward, everywhere, places, watched, tick: as of
            :func:`fxcompress.metric.passes.run_pass`.

    Raises:
        CalibrationError: as there.
    """
    if not metric.needs or not sites:
        return Calibration({site.name: Moments() for site in sites})
    sums = _sums(metric, sites, device_of(model))
    passed = run_pass(
        model, sites, batches, sums,
        drawn=drawn, loss=loss, forward=forward,
        everywhere=everywhere, places=places, watched=watched, tick=tick,
    )  # fmt: skip
    moments = {site.name: sums.finish(site, passed.predictions, Moments()) for site in sites}
    unmeasured = {
        site.name: reason
        for site in sites
        if (reason := _unmeasured(site, moments[site.name], passed.reach[site.name], metric))
    }
    return Calibration(
        moments, passed.batches, passed.predictions, passed.kind, passed.reach, unmeasured,
        passed.ran,
    )  # fmt: skip


def _sums(metric: Metric, sites: Sequence[SiteFacts], device: torch.device) -> Several:
    """Running sums of all that a metric needs."""
    named = frozenset(each for each in metric.needs if not isinstance(each, Statistic))
    own = [each for each in metric.needs if isinstance(each, Statistic)]
    moments, squares = named & {"input", "output"}, named & {"weight", "entries"}
    scaled = len(moments) == 2 and not squares and not metric.directions
    found: list[Sums] = []
    if moments:
        found.append(MomentSums(sites, device, moments, scaled=scaled))
    if squares:
        found.append(SquareSums(sites, device, entries="entries" in squares))
    if own:
        found.append(OwnSums(own))
    return Several(found)


def _unmeasured(site: SiteFacts, found: Moments, reach: Reach, metric: Metric) -> str | None:
    """Why the moments say nothing of an influence on the output; None if they do."""
    if metric.backward and not reach.answered:
        return UNANSWERED
    groups = site.shape.matrix[0]
    stats = found.tensors
    # A group whose inputs or gradients are all zero has none.
    alive = [stat.reshape(groups, -1).any(1) for stat in stats]
    if bool(torch.stack(alive).all(0).any()):
        return None
    return "its inputs are all zero" if not metric.backward else ZERO


UNANSWERED = "no gradient came back to it"
ZERO = "its inputs or the gradients that came back to it are all exactly zero"
