"""Moments of every site, from passes over the calibration data."""

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
from fxcompress.metric.passes import DRAWS, Draws, Passed, Passes, Reach, Section, Whole
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
    whole = Whole(
        model, batches, (Section(tuple(sites)),),
        drawn=drawn, loss=loss, forward=forward,
        everywhere=everywhere, places=places, watched=watched,
    )  # fmt: skip
    return gather(whole, metric, device_of(model), tick=tick)


def gather(
    passes: Passes,
    metric: Metric,
    device: torch.device,
    *,
    park: Callable[[Moments], Moments] = lambda found: found,
    tick: Callable[[], None] = lambda: None,
) -> Calibration:
    """Gather the moments that ``metric`` needs at every site, section by section.

    Args:
        passes: run the model.
        metric: says which statistics are needed.
        device: of the model.
        park: puts moments where they take no memory.
        tick: called after every batch of every section.

    Raises:
        CalibrationError: as of ``passes``.
    """
    moments: dict[str, Moments] = {}
    unmeasured: dict[str, str] = {}
    reach: dict[str, Reach] = {}
    ran: set[str] = set()
    found: Passed | None = None
    for section in passes.sections:
        sums = _sums(metric, section.sites, device)
        found = passes.run(section, sums, tick)
        for site in section.sites:
            finished = sums.finish(site, found.predictions, Moments())
            reason = _unmeasured(site, finished, found.reach[site.name], metric)
            if reason is None and site.name in found.experts:
                rows, width = found.reach[site.name].rows, site.shape.informative_rows
                if rows < SCARCE * width:  # so few show nothing: as for one that none reached
                    reason, finished = HARDLY, finished.changed(torch.zeros_like)
            if reason:
                unmeasured[site.name] = reason
            moments[site.name] = park(finished)
        reach |= found.reach
        ran |= {*found.ran}
    assert found is not None
    return Calibration(
        moments, found.batches, found.predictions, found.kind, reach, unmeasured,
        tuple(sorted(ran)),
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
    if not reach.rows:
        return UNREACHED
    if metric.backward and not reach.answered:
        return UNANSWERED
    groups = site.shape.matrix[0]
    stats = found.tensors
    # A group whose inputs or gradients are all zero has none.
    alive = [stat.reshape(groups, -1).any(1) for stat in stats]
    if bool(torch.stack(alive).all(0).any()):
        return None
    return "its inputs are all zero" if not metric.backward else ZERO


SCARCE = 1 / 16
"""An expert is measured if at least so many rows reach it, in parts of its width."""

UNREACHED = "no calibration data reached it"
HARDLY = "hardly any calibration data reached it"
UNANSWERED = "no gradient came back to it"
ZERO = "its inputs or the gradients that came back to it are all exactly zero"
