"""The metric of a surveyed model, estimated on its calibration data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fxcompress.checkpoint import Checkpoint
from fxcompress.collective import Processes
from fxcompress.graph.inputs import device_of
from fxcompress.metric import METRICS, Calibration, Draws, Moments
from fxcompress.metric.blocks import Blocks, Uncuttable
from fxcompress.metric.capture import Saved, gather
from fxcompress.metric.passes import Passes, Whole
from fxcompress.pipeline.held_back import DAMPING, Division, HeldBack, Narrowed, choose_damping
from fxcompress.pipeline.influence import reach_notes, require_influence, unrecorded
from fxcompress.pipeline.survey import Survey
from fxcompress.rules import LoadedRules


@dataclass(frozen=True, eq=False)
class Estimate:
    """How the metric was estimated.

    Attributes:
        calibration: of the batches that it was estimated on.
        held_back: the others.
        damping: of the input and of the output factor, relative to their mean eigenvalues.
    """

    calibration: Calibration
    held_back: HeldBack = field(default_factory=HeldBack)
    damping: tuple[float, float] = DAMPING


def estimate(
    found: Survey, division: Division, passes: Passes, checkpoint: Checkpoint | None = None
) -> Estimate:
    """The metric's moments, those of the batches held back, and damping chosen on these.

    Args:
        found: has the model, the sites and the rules.
        division: of the calibration data.
        passes: over the batches that are not held back.
        checkpoint: where moments are kept, in case that the run is interrupted.

    Raises:
        CalibrationError: as of :func:`calibrated_in`.
    """
    request = found.request
    spec = found.rules.rules.metric
    metric = METRICS[spec.kind]
    calibrated = calibrated_in(found, passes, checkpoint)
    held = division.held if metric.needs else division.untouched()
    moments: Mapping[str, Moments] = {}
    total = sum(request.processes.gathered(len(held)))
    if total and metric.needs:
        again = passes_over(
            found, held, len(held), division.held_places, everywhere=False, stage="held back"
        )
        tick = request.show.stage("held back", len(held) * len(again.sections))
        park, narrow, device = _parked(found), Narrowed(), device_of(found.model)
        saved = None if checkpoint is None else Saved(checkpoint, "held-back")
        judged = gather(
            again, metric, device, park=lambda each: park(narrow(each)), tick=tick, saved=saved
        )
        moments = {name: m for name, m in judged.moments.items() if name not in judged.unmeasured}
        request.show.stage("damping", None)
    given = (spec.damping.input, spec.damping.output)
    damping = choose_damping(found.model, found.singles, metric, calibrated.moments, moments, given)
    return Estimate(calibrated, HeldBack(tuple(held), moments, total), damping)


def calibrated_on(
    found: Survey,
    batches: Iterable[Any],
    total: int | None,
    places: Sequence[int] | None = None,
) -> Calibration:
    """The moments that the metric of the rules needs, at the weights as they are now.

    Args, errors: as of :func:`passes_over` and :func:`calibrated_in`.
    """
    return calibrated_in(found, passes_over(found, batches, total, places))


def calibrated_in(
    found: Survey, passes: Passes, checkpoint: Checkpoint | None = None
) -> Calibration:
    """The moments that the metric of the rules needs, from passes over the data.

    Args:
        found, passes, checkpoint: as of :func:`estimate`.

    Raises:
        CalibrationError: as of :func:`fxcompress.metric.calibrate`, or nothing had an influence
            that was measured.
    """
    request, metric = found.request, METRICS[found.rules.rules.metric.kind]
    total = None if passes.batches is None else passes.batches * len(passes.sections)
    tick = request.show.stage("calibrate", total)
    if metric.needs:
        device = device_of(found.model)
        saved = None if checkpoint is None else Saved(checkpoint, "calibrate")
        calibration = gather(passes, metric, device, park=_parked(found), tick=tick, saved=saved)
    else:
        calibration = Calibration({site.name: Moments() for site in found.sites})
    require_influence(found.sites, calibration)
    request.notes.add(*reach_notes(found.sites, calibration))
    return calibration


def _parked(found: Survey) -> Callable[[Moments], Moments]:
    """Puts moments where they take no memory, and gives back what their sums took."""

    def parked(moments: Moments) -> Moments:
        waiting = found.room.park(moments)
        found.room.cool()
        return waiting

    return parked


def passes_over(
    found: Survey,
    batches: Iterable[Any],
    total: int | None,
    places: Sequence[int] | None = None,
    *,
    everywhere: bool = True,
    stage: str = "forward",
) -> Passes:
    """How the model of a survey is run over batches, within the limit on memory.

    Args:
        found: has the model, the sites and the rules.
        batches: gone through once if everything has room at once; else kept.
        total: how many they are in this process, if that is known.
        places: where the batches stand, if these are a part of others.
        everywhere: whether the data have to reach every site.
        stage: what the forward pass is called where progress is shown.

    Raises:
        CalibrationError: the model rejects a batch.
    """
    request, rules, room = found.request, found.rules, found.room
    whole = Whole(
        found.model, batches, room.sections, total, draws(rules), request.loss, request.forward,
        everywhere, places, _turns(places, request.processes),
        unrecorded(found.model, found.recording, rules.rules), request.processes,
    )  # fmt: skip
    if room.parking is None or not METRICS[rules.rules.metric.kind].needs:
        return whole
    data = [*batches]
    whole = replace(whole, data=data, batches=len(data))
    if not room.blocks:
        return whole
    tick = request.show.stage(stage, len(data))
    try:
        return Blocks(whole, room.blocks, room.park, tick)
    except Uncuttable as error:
        request.notes.add(
            f"the model cannot be run block by block ({error}), so it is run as a whole "
            f"{len(room.sections)} times"
        )
        return whole


def _turns(places: Sequence[int] | None, processes: Processes) -> Sequence[int] | None:
    """The turns of batches in a pass of all processes; None for one process.

    They are counted in each pass from 0, so that labels of batches held back are drawn as those of
    the others are.  With numbers of their own the damping that is chosen on few batches is more a
    matter of luck: of a small network rounds then lost more than one shot with two seeds of six.
    """
    if processes.size == 1 or places is None:
        return None
    every = sorted(place for each in processes.gathered([*places]) for place in each)
    turn_of = {place: turn for turn, place in enumerate(every)}
    return [turn_of[place] for place in places]


def draws(loaded: LoadedRules) -> Draws:
    """What rules say of the outputs and of labels."""
    spec = loaded.rules.metric
    return Draws(spec.output, spec.fisher, spec.seed)
