"""Moments of every site, from passes over the calibration data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from typing import Any

import torch
from torch import nn

from fxcompress.checkpoint import Checkpoint
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
    saved: Saved | None = None,
) -> Calibration:
    """Gather the moments that ``metric`` needs at every site, section by section.

    Args:
        passes: run the model.
        metric: says which statistics are needed.
        device: of the model.
        park: puts moments where they take no memory.
        tick: called after every batch of every section.
        saved: where sections are kept that were measured; those that are there are not run.

    Raises:
        CalibrationError: as of ``passes``.
        CheckpointError: what is there is of another run.
    """
    known = saved.sections(passes) if saved else []
    measured: list[_Measured] = []
    for at, section in enumerate(passes.sections):
        if at < len(known):
            found = known[at]
            for _ in range(found.passed.batches):
                tick()
        else:
            found = _measured(passes, section, metric, device, tick)
            if saved:
                saved.write(at, found, passes)
        parked = {name: park(each) for name, each in found.moments.items()}
        measured.append(replace(found, moments=parked))
    last = measured[-1].passed
    return Calibration(
        moments={name: one for each in measured for name, one in each.moments.items()},
        batches=last.batches,
        predictions=last.predictions,
        kind=last.kind,
        reach={name: one for each in measured for name, one in each.passed.reach.items()},
        unmeasured={name: one for each in measured for name, one in each.unmeasured.items()},
        ran=tuple(sorted({name for each in measured for name in each.passed.ran})),
    )


@dataclass(frozen=True, eq=False)
class _Measured:
    """The outcome of one section.

    Attributes:
        moments, unmeasured: as of :class:`Calibration`.
        passed: how its pass went.
    """

    moments: Mapping[str, Moments]
    unmeasured: Mapping[str, str]
    passed: Passed


def _measured(
    passes: Passes,
    section: Section,
    metric: Metric,
    device: torch.device,
    tick: Callable[[], None],
) -> _Measured:
    sums = _sums(metric, section.sites, device)
    passed = passes.run(section, sums, tick)
    if passes.processes.size > 1:
        sums.reduce(passes.processes)
    moments, unmeasured = {}, {}
    for site in section.sites:
        found = sums.finish(site, passed.predictions, Moments())
        reason = _unmeasured(site, found, passed.reach[site.name], metric)
        if reason is None and site.name in passed.experts:
            rows, width = passed.reach[site.name].rows, site.shape.informative_rows
            if rows < SCARCE * width:  # so few show nothing: as for one that none reached
                reason, found = HARDLY, found.changed(torch.zeros_like)
        if reason:
            unmeasured[site.name] = reason
        moments[site.name] = found
    return _Measured(moments, unmeasured, passed)


@dataclass(frozen=True)
class Saved:
    """Sections on disk, those that were measured before a run was interrupted among them.

    Attributes:
        checkpoint: of the run.
        name: of the passes, for the files.
    """

    checkpoint: Checkpoint
    name: str

    def sections(self, passes: Passes) -> list[_Measured]:
        """What was measured of the first sections; the passes go on after them.

        Args:
            passes: are restored.

        Raises:
            CheckpointError: it is of another run, or cannot be read.
        """
        contents: list[dict[str, Any]] = []
        while (content := self.checkpoint.read(self._file(len(contents)))) is not None:
            contents.append(content)
        # Processes that work together were not interrupted at the same place.
        done = min(passes.processes.gathered(len(contents)))
        if done:
            passes.restore(contents[done - 1]["state"])
        return [_read(content) for content in contents[:done]]

    def write(self, at: int, found: _Measured, passes: Passes) -> None:
        """Write what was measured of a section, and what later ones need of the passes."""
        content = {
            "moments": {name: vars(each) for name, each in found.moments.items()},
            "unmeasured": dict(found.unmeasured),
            "passed": {
                **vars(found.passed),
                "experts": sorted(found.passed.experts),
                "reach": {name: astuple(each) for name, each in found.passed.reach.items()},
            },
            "state": passes.state(),
        }
        self.checkpoint.write(self._file(at), content)

    def _file(self, at: int) -> str:
        return f"{self.name}-{at}"


def _read(content: Mapping[str, Any]) -> _Measured:
    passed = content["passed"]
    reach = {name: Reach(*each) for name, each in passed["reach"].items()}
    moments = {name: Moments(**each) for name, each in content["moments"].items()}
    return _Measured(
        moments,
        content["unmeasured"],
        Passed(**{**passed, "reach": reach, "experts": frozenset(passed["experts"])}),
    )


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
        found.append(OwnSums(own, device))
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
