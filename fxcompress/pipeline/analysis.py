"""Everything before the budget: record, match, calibrate, decompose."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import nn

from fxcompress.metric import METRICS
from fxcompress.metric.directions import measure_directions
from fxcompress.pipeline.decomposition import (
    Decomposition,
    decompose_groups,
    metric_from,
    wanted_directions,
    with_directions,
)
from fxcompress.pipeline.estimate import Estimate, estimate, passes_over
from fxcompress.pipeline.held_back import Division
from fxcompress.pipeline.request import Request
from fxcompress.pipeline.survey import Survey, checkpoint_of, require_same_model, survey
from fxcompress.rules import LoadedRules


@dataclass(frozen=True, eq=False)
class Analysis(Survey):
    """What the stages before the budget found out.

    Attributes:
        estimate: how the metric was estimated; without its moments.
        decomposed: every site in its metric.
    """

    estimate: Estimate
    decomposed: Decomposition

    @classmethod
    def of(cls, survey: Survey, estimate: Estimate, decomposed: Decomposition) -> Analysis:
        """A survey with what was found since, without groups that have an idle site."""
        known = {each.name: getattr(survey, each.name) for each in fields(Survey)}
        known["groups"] = tuple(g for g in survey.groups if g.name in decomposed.groups)
        return cls(**known, estimate=estimate, decomposed=decomposed)


def analyse(model: nn.Module, loaded: LoadedRules, request: Request) -> Analysis:
    """Record, match, calibrate and decompose; errors as of ``compile``."""
    surveyed, data = survey(model, loaded, request)
    require_same_model(surveyed)
    spec = loaded.rules.metric
    metric, work, sites = METRICS[spec.kind], surveyed.model, surveyed.sites
    if request.loss is not None and not metric.backward:
        request.notes.add(f"loss= was given, and metric {metric.name} makes no use of it")
    data = data.first(spec.batches)
    checkpoint = None
    if request.checkpoint is not None:
        batches = [*data.batches]
        data, checkpoint = replace(data, batches=batches), checkpoint_of(surveyed, batches)
    division = Division(data.batches, data.total, spec.held_back, spec.seed, data.places)
    several = request.processes.size > 1  # who have to know where all batches stand
    again = several or metric.directions or surveyed.room.parking is not None
    used: Iterable[Any] = [*division] if again else division  # gone through more than once
    passes = passes_over(surveyed, used, division.count, division.places)
    estimated = estimate(surveyed, division, passes, checkpoint)

    moments = dict(estimated.calibration.moments)
    # So that each is freed once it is used.
    estimated = replace(estimated, calibration=replace(estimated.calibration, moments={}))
    metric_of = metric_from(moments, metric, estimated.damping)
    tick = request.show.stage("decompose", len(sites))
    room = surveyed.room
    room.cool()

    def done() -> None:
        room.cool()
        tick()

    decomposed = decompose_groups(work, surveyed.groups, metric_of, room.park, done)
    request.notes.add(*_apart(surveyed, decomposed))
    if metric.directions:
        wanted = wanted_directions(decomposed, surveyed.groups)
        total = None if passes.batches is None else passes.batches * len(passes.sections)
        energies = measure_directions(passes, wanted, request.show.stage("directions", total))
        decomposed = with_directions(decomposed, surveyed.groups, energies)
    request.notes.share(request.processes)
    return Analysis.of(surveyed, estimated, decomposed)


def _apart(found: Survey, decomposed: Decomposition) -> Iterator[str]:
    """What cannot be rewritten together, though every part of it has an influence."""
    kind = found.rules.rules.metric.kind
    for group in found.several:
        known = group.name in decomposed.groups
        if not known and not any(site.name in decomposed.idle for site in group.sites):
            names = ", ".join(site.name for site in group.sites)
            yield f"{names}: metric {kind} cannot weigh them together, so no joint form is offered"
