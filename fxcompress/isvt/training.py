"""ISVT beside a user's own training loop: ranks fall while the weights learn.

::

    isvt = fxcompress.ISVT(model, "rules.yaml", calibration, steps=1000)
    for batch in loader:
        loss(model, batch).backward()
        optimizer.step()
        isvt.step()                 # every few steps: all weights to the ranks of the budget
        optimizer.zero_grad()
    small = isvt.finalize()         # factors, which train on as ordinary parameters

The weights stay dense and the optimizer's own: a thresholding sets them, in place, to the
nearest ones of lower rank, and in between gradients may turn their singular subspaces and raise
their ranks again.  So ranks move between the layers as long as the training goes on.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from time import perf_counter
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from fxcompress.errors import FxcompressWarning, RewriteError, RuleError, TrainingError
from fxcompress.graph.inputs import Forward
from fxcompress.graph.wrappers import unwrapped
from fxcompress.isvt.schedule import Schedule, share
from fxcompress.isvt.threshold import (
    Metrics,
    Thresholded,
    metrics_of,
    require_lasting_metric,
    threshold,
)
from fxcompress.metric import Loss, Moments
from fxcompress.pipeline.build import rewrite
from fxcompress.pipeline.data import Data
from fxcompress.pipeline.decide import price
from fxcompress.pipeline.estimate import Estimate, estimate, passes_over
from fxcompress.pipeline.held_back import Division
from fxcompress.pipeline.request import Request
from fxcompress.pipeline.survey import Survey, survey
from fxcompress.plans.plan import attach_plan
from fxcompress.progress import Progress, stages
from fxcompress.rules import Rules, at_progress, read_rules

M = TypeVar("M", bound=nn.Module)

FORMAT = 2
"""Version of a state; others are refused."""

LAST = ", taken away by the last thresholding"
"""What losses are after training: next to nothing if the weights had their ranks already."""


@dataclass(frozen=True)
class Record:
    """One thresholding.

    Attributes:
        step: optimizer steps before it.
        keep: fraction that the budget allowed.
        cost: what the matched operators cost after it, in the unit of the (first) budget.
        multiplier: λ of it; None for uniform ranks.
        removed: ``½ ‖V - W‖²_M`` over all weights: what the metric says it cost.
        rank: of all weights that are cut, summed up.
        cut: how many these are.
        full: weights that were decomposed in full.
        seconds: that it took.
    """

    step: int
    keep: float
    cost: float
    multiplier: float | None
    removed: float
    rank: int
    cut: int
    full: int
    seconds: float


class ISVT(Generic[M]):
    """Iterative singular value thresholding during training (arXiv 2507.09428, section 4).

    Args:
        model: to be trained, on the device that it is trained on; :meth:`step` changes its
            matched weights in place.  Make it before the model is wrapped or compiled.
        rules: as in :func:`fxcompress.compile`; forms, budget and metric are taken from there.
        calibration: batches that the metric is estimated on, as there.
        steps: optimizer steps until the budget is down to that of the rules.
        every: optimizer steps between two thresholdings; a hundredth of ``steps`` by default.  The
            more often the better: what gradients put outside of the ranks is lost each time, and
            the less it is, the less it is missed.
        schedule: ``soft``, or ``hard`` for the final budget from the first thresholding on.
        refresh: thresholdings after which the metric is estimated anew on ``calibration``, with
            the weights as they are then; never by default.  The batches are kept for that.
        keep, unit: override ``budget.keep`` and ``budget.unit`` of the rules.
        examples, loss, forward, progress: as in :func:`fxcompress.compile`.

    Attributes:
        history: a :class:`Record` of every thresholding.

    Raises:
        RuleError: the rules cannot be used, match nothing, or cannot be used in training.
        RecordError, CalibrationError: as in :func:`fxcompress.compile`.
        RewriteError: a matched weight is not a parameter of the model itself.
        ValueError: ``steps``, ``every`` or ``refresh`` is below 1, or ``schedule`` unknown.
    """

    def __init__(
        self,
        model: M,
        rules: Rules,
        calibration: Iterable[Any] | None = None,
        *,
        steps: int,
        every: int | None = None,
        schedule: Schedule = "soft",
        refresh: int | None = None,
        keep: float | None = None,
        unit: str | None = None,
        examples: Sequence[Any] | None = None,
        loss: Loss | None = None,
        forward: Forward | None = None,
        progress: bool | None = None,
    ) -> None:
        every = max(1, steps // 100) if every is None else every
        for name, value in {"steps": steps, "every": every, "refresh": refresh}.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if schedule not in ("soft", "hard"):
            raise ValueError(f"schedule must be 'soft' or 'hard', not {schedule!r}")
        self.model = model = unwrapped(model)
        self.steps = steps
        self.every = every
        self.schedule: Schedule = schedule
        self.refresh = refresh
        self.history: list[Record] = []
        self._count = 0
        self._starts: Mapping[str, Tensor] = {}
        self._progress = progress
        loaded = read_rules(rules, keep=keep, unit=unit)
        with torch.inference_mode(False), stages(progress) as show:
            request = Request(show, calibration, examples, loss, forward)
            self._survey, data = survey(model, loaded, request)
            _require_trainable(self._survey, model)
            if refresh is not None:
                data = replace(data, batches=[*data.batches])
            self._data = data
            self._estimate(data, show)
            self._pricings = price(self._survey)

    @property
    def count(self) -> int:
        """Optimizer steps so far."""
        return self._count

    def step(self) -> Record | None:
        """Call it after every step of the optimizer.

        Returns:
            The thresholding, if one was due.

        Raises:
            TrainingError: a weight is not finite; no weight was changed.
            BudgetError: the budget cannot be met.
        """
        self._count += 1
        if self._count % self.every:
            return None
        with stages(enabled=False) as show:
            done = len(self.history)
            if self.refresh is not None and done and done % self.refresh == 0:
                self._sync_buffers()
                self._estimate(self._data, show)
            now = share(self.schedule, self._count / self.steps)
            return self._threshold(now, self._starts)

    def nearest(self) -> Iterator[tuple[str, Tensor]]:
        """What :meth:`step` would set the weights to at the final budget, without setting them.

        For penalties towards them (learning-compression), say.

        Returns:
            Name of the parameter and its value as stored, for every weight that would be cut.

        Raises:
            TrainingError, BudgetError: as :meth:`step`.
        """
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        for site, weight in self._find(1.0, {}).weights():
            parameter = self._survey.model.get_parameter(site.weight)
            yield names[id(parameter)], site.shape.stored(weight).to(parameter.dtype)

    def finalize(self) -> M:
        """The compressed model: factors in place of weights, which train on as parameters.

        All weights are thresholded once more, by full decompositions in float64, so that the
        budget is met exactly.  The model itself keeps its dense weights, as thresholded.

        Raises:
            TrainingError: a weight is not finite; nothing was changed.
            BudgetError, RewriteError: as in :func:`fxcompress.compile`.
        """
        with torch.inference_mode(False), stages(self._progress) as show:
            self._sync_buffers()
            found = self._find(1.0, {})
            analysis = replace(found.analysis, estimate=Estimate(self._calibration))
            small, planned = rewrite(self.model, analysis.showing(show))
        unit = f"{planned.loss_unit}{LAST}"
        attach_plan(
            small, planned.model_copy(update={"seconds": dict(show.seconds), "loss_unit": unit})
        )
        for note in planned.warnings:
            warnings.warn(note, FxcompressWarning, stacklevel=2)
        return small

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on elsewhere, beside the model's and the optimizer's states.

        Plain numbers, strings and tensors: ``torch.load(..., weights_only=True)`` reads it.
        """
        return {
            "format": FORMAT,
            "count": self._count,
            "damping": list(self._damping),
            "moments": {
                name: {key: value for key, value in _tensors(each).items() if value is not None}
                for name, each in self._moments.items()
            },
            "starts": dict(self._starts),
            "history": [asdict(record) for record in self.history],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a state was taken; the model's weights have to be those of then.

        Raises:
            TrainingError: the state is of another version, model or set of rules.
        """
        if state.get("format") != FORMAT:
            raise TrainingError(
                f"the state of ISVT has format {state.get('format')!r}, this version reads {FORMAT}"
            )
        moments = {name: Moments(**each) for name, each in state["moments"].items()}
        if moments.keys() != self._moments.keys() or any(
            _shapes(each) != _shapes(self._moments[name]) for name, each in moments.items()
        ):
            raise TrainingError(
                "the state of ISVT belongs to another model, or to other rules: the operators "
                "that it has moments of are not those that the rules match here"
            )
        self._count = int(state["count"])
        inputs, outputs = state["damping"]
        self._damping = (float(inputs), float(outputs))
        self._set_metric(moments)
        self._starts = dict(state["starts"])
        self.history = [Record(**each) for each in state["history"]]

    def callback(self) -> Any:
        """A callback for ``transformers.Trainer``: ``Trainer(..., callbacks=[isvt.callback()])``.

        It calls :meth:`step` after every optimizer step, saves the state with every checkpoint
        (``isvt.pt``), and reads it again when training is resumed from one.
        """
        from fxcompress.isvt.trainer import callback

        return callback(self)

    def _threshold(self, now: float, starts: Mapping[str, Tensor]) -> Record:
        began = perf_counter()
        found = self._find(now, starts)
        with torch.no_grad():
            for site, weight in [*found.weights()]:
                parameter = self._survey.model.get_parameter(site.weight)
                parameter.copy_(site.shape.stored(weight))
        self._starts = found.starts
        ranks = found.ranks()
        cut = [rank for rank in ranks.values() if rank is not None]
        record = Record(
            step=self._count,
            keep=found.analysis.rules.rules.budgets[0].keep,
            cost=found.cost,
            multiplier=found.multiplier,
            removed=found.predicted,
            rank=sum(cut),
            cut=len(cut),
            full=len(found.full),
            seconds=perf_counter() - began,
        )
        self.history.append(record)
        return record

    def _find(self, now: float, starts: Mapping[str, Tensor]) -> Thresholded:
        for site in self._survey.sites:
            if not bool(self._survey.model.get_parameter(site.weight).isfinite().all()):
                raise TrainingError(
                    f"the weight {site.weight} is not finite after {self._count} steps: training "
                    "diverged. Go back to a checkpoint, and take a lower learning rate or clip "
                    "gradients; nothing was thresholded"
                )
        loaded = at_progress(self._survey.rules, now)
        return threshold(self._survey, self._metrics, loaded, self._pricings, starts)

    def _estimate(self, data: Data, show: Progress) -> None:
        spec = self._survey.rules.rules.metric
        data = data.first(spec.batches)
        division = Division(data.batches, data.total, spec.held_back, spec.seed)
        survey = self._survey.showing(show)
        passes = passes_over(survey, division, division.count, division.places)
        found = estimate(survey, division, passes)
        self._calibration = replace(found.calibration, moments={})
        self._damping = found.damping
        self._set_metric(found.calibration.moments)
        self._starts = {}  # of other coordinates

    def _set_metric(self, moments: Mapping[str, Moments]) -> None:
        self._moments: Mapping[str, Moments] = moments
        self._metrics: Metrics = metrics_of(self._survey, moments, self._damping)

    def _sync_buffers(self) -> None:
        """Running statistics of batch norms are the model's own, not shared like parameters."""
        own = dict(self.model.named_buffers())
        for name, buffer in self._survey.model.named_buffers():
            if name in own and own[name].shape == buffer.shape:
                buffer.copy_(own[name])


def _require_trainable(found: Survey, model: nn.Module) -> None:
    require_lasting_metric(found.rules)
    if found.folded:
        raise RuleError(
            "fold_batch_norm changes the weights that the optimizer has: leave it out of the rules "
            "for the training, and compile the result with it afterwards"
        )
    own = {id(parameter) for parameter in model.parameters()}
    for site in found.sites:
        if id(found.model.get_parameter(site.weight)) not in own:
            raise RewriteError(
                f"the weight of {site.name} is part of a larger parameter of the model and cannot "
                f"be set by itself: exclude it (unless: [{{name: {site.name!r}}}])"
            )


def _tensors(moments: Moments) -> dict[str, Any]:
    return {each.name: getattr(moments, each.name) for each in fields(Moments)}


def _shapes(moments: Moments) -> dict[str, Any]:
    # How many rows a root of few rows has depends on the data; its width does not.
    return {
        key: isinstance(value, Tensor) and (value.dim(), value.shape[-1])
        for key, value in _tensors(moments).items()
    }
