"""Moments of every site, from one pass over the calibration data."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fxcompress.forms.shape import ConvShape, EmbeddingShape, Shape
from fxcompress.graph.inputs import Forward, device_of
from fxcompress.metric.metric import Metric
from fxcompress.metric.moments import (
    LARGEST_OUTPUT,
    CountSum,
    GramSum,
    Moments,
    ScaledSum,
    Statistic,
    finish_together,
    normalized,
    times_power,
    unit_mean,
)
from fxcompress.metric.output import Loss
from fxcompress.metric.passes import DRAWS, Draws, InputKey, Reach, SiteFacts, input_key, run_pass
from fxcompress.metric.rows import input_rows, output_rows, squared_gradients, weight_gradients


@dataclass(frozen=True, eq=False)
class Calibration:
    """The outcome of the data pass.

    Attributes:
        moments: per site name, of sites that data came to; sites with one input share one
            ``Moments.input`` tensor.
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
    sums = _Sums(model, sites, metric.needs, metric.backward)
    passed = run_pass(
        model, sites, batches, sums,
        drawn=drawn, loss=loss, forward=forward,
        everywhere=everywhere, places=places, watched=watched, tick=tick,
    )  # fmt: skip
    moments = sums.finish(passed.predictions)
    unmeasured = {
        site.name: reason
        for site in sites
        if (reason := _unmeasured(site, moments[site.name], passed.reach[site.name], metric))
    }
    return Calibration(
        moments, passed.batches, passed.predictions, passed.kind, passed.reach, unmeasured,
        passed.ran,
    )  # fmt: skip


def _unmeasured(site: SiteFacts, found: Moments, reach: Reach, metric: Metric) -> str | None:
    """Why the moments say nothing of an influence on the output; None if they do."""
    if metric.backward and not reach.answered:
        return UNANSWERED
    groups = site.shape.groups if isinstance(site.shape, ConvShape) else 1
    stats = [s for s in (found.input, found.output, found.weight, found.entries) if s is not None]
    # A group whose inputs or gradients are all zero has none.
    alive = [stat.reshape(groups, -1).any(1) for stat in stats]
    if bool(torch.stack(alive).all(0).any()):
        return None
    return "its inputs are all zero" if not metric.backward else ZERO


UNANSWERED = "no gradient came back to it"
ZERO = "its inputs or the gradients that came back to it are all exactly zero"


class _Sums:
    """Running sums of one pass: a visitor (:class:`fxcompress.metric.passes.Visitor`)."""

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[SiteFacts],
        needs: frozenset[Statistic],
        backward: bool,
    ) -> None:
        self.sites = sites
        self.needs = needs
        self.backward = backward
        self.keeps_inputs = bool(needs & {"weight", "entries"})
        device = device_of(model)
        self.inputs: dict[InputKey, list[GramSum] | CountSum] = {}
        self.outputs: dict[str, list[GramSum]] = {}
        self.squares: dict[str, ScaledSum] = {}
        self.rows: dict[InputKey, int] = defaultdict(int)
        self.pending: dict[str, tuple[Tensor, int]] = {}
        self.exponent = 0
        for site in sites:
            shape = site.shape
            dtype = torch.float64 if shape.dtype == torch.float64 else torch.float32
            groups, m, n = sizes(shape)
            if "input" in needs and input_key(site) not in self.inputs:
                self.inputs[input_key(site)] = (
                    CountSum(n, device)
                    if isinstance(shape, EmbeddingShape)
                    else [GramSum(n, device, dtype) for _ in range(groups)]
                )
            if "output" in needs:
                wide = m >= LARGEST_OUTPUT
                self.outputs[site.name] = [
                    GramSum(m, device, dtype, diagonal=wide) for _ in range(groups)
                ]
            if self.keeps_inputs:
                size = (groups, m, n) if "entries" in needs else (groups, m)
                self.squares[site.name] = ScaledSum([size], device)

    def start(self, exponent: int) -> None:
        self.exponent = exponent

    def input(self, site: SiteFacts, data: Tensor, mask: Tensor | None) -> bool:
        key = input_key(site)
        sums = self.inputs.get(key)
        if sums is None:
            return not data.is_floating_point() or bool(data.isfinite().all())
        finite = True
        for rows in input_rows(data, site.shape, mask):
            if isinstance(sums, CountSum):
                sums.add(rows)
                self.rows[key] += len(rows)
            else:
                finite = _add(sums, rows) and finite
                self.rows[key] += rows.shape[-2]
        return finite

    def gradient(
        self, site: SiteFacts, data: Tensor | None, gradient: Tensor, mask: Tensor | None
    ) -> bool:
        finite = True
        sums = self.outputs.get(site.name)
        if sums is not None:
            finite = _add(sums, output_rows(gradient, site.shape, mask), self.exponent)
        if data is None:
            return finite
        if not bool(gradient.isfinite().all()):
            return False
        # Powers of two are taken out, so that neither products nor squares leave their range.
        (data, first), (gradient, second) = normalized(data), normalized(gradient)
        exponent = first + second + self.exponent
        if site.calls > 1:  # the same weight used again: sum before squaring
            found = torch.cat([*weight_gradients(data, gradient, site.shape)])
            self.pending[site.name] = _summed(self.pending.get(site.name), (found, exponent))
            return finite
        entries = "entries" in self.needs
        squares = squared_gradients(data, gradient, site.shape, entries=entries)
        self._square(site.name, squares, exponent)
        return finite

    def _square(self, name: str, squares: Tensor, exponent: int) -> None:
        if bool(squares.any()):
            self.squares[name].add([squares], exponent)

    def end(self) -> None:
        for name, pending in self.pending.items():
            products, exponent = normalized(pending[0])
            squares = products.square().sum(0, dtype=torch.float64)
            squares = squares if "entries" in self.needs else squares.mean(2)
            self._square(name, squares, pending[1] + exponent)
        self.pending.clear()

    def finish(self, predictions: int) -> dict[str, Moments]:
        """The means, by site; the sums are given up."""
        inputs: dict[InputKey, tuple[Tensor, float]] = {}
        entries = "entries" in self.needs
        found = {}
        for site in self.sites:
            key = input_key(site)
            if key in self.inputs:
                inputs[key] = _finish(self.inputs.pop(key), self.rows[key], site)
            a, first = inputs.get(key, (None, 1.0))
            outputs, squares = self.outputs.pop(site.name, None), self.squares.pop(site.name, None)
            g, second = (None, 1.0) if outputs is None else _finish(outputs, predictions, site)
            w, third = (None, 1.0) if squares is None else _mean(squares, predictions, site)
            found[site.name] = Moments(
                input=a,
                output=g,
                weight=None if entries else w,
                entries=w if entries else None,
                units=(first, second, third),
            )
        return found


def sizes(shape: Shape) -> tuple[int, int, int]:
    """Groups, and rows and columns of the matrix of each of them."""
    if isinstance(shape, ConvShape):
        return shape.groups, shape.group_out, shape.group_in * shape.taps
    return 1, shape.out_features, shape.in_features


def _add(sums: Sequence[GramSum], rows: Tensor, exponent: int = 0) -> bool:
    """Add rows (positions x n), or (g x positions x n) for groups; False if not finite."""
    parts = rows if rows.dim() > 2 else rows[None]
    finite = [each.add(part, exponent) for each, part in zip(sums, parts, strict=True)]
    return all(finite)


def _summed(before: tuple[Tensor, int] | None, after: tuple[Tensor, int]) -> tuple[Tensor, int]:
    """The sum of two tensors, each times a power of two."""
    if before is None or not bool(before[0].any()):
        return after
    if not bool(after[0].any()):
        return before
    top = max(before[1], after[1])
    first, second = (times_power(x, e - top) if e < top else x for x, e in (before, after))
    return first + second, top


def _finish(
    sums: Sequence[GramSum] | CountSum, count: int, site: SiteFacts
) -> tuple[Tensor, float]:
    """The mean, and the unit of which it is in squares."""
    if isinstance(sums, CountSum):
        return sums.finish(count), 1.0
    means, exponent = finish_together(sums, count)
    return torch.stack(means) if isinstance(site.shape, ConvShape) else means[0], 2.0**exponent


def _mean(squares: ScaledSum, count: int, site: SiteFacts) -> tuple[Tensor, float]:
    (total,) = squares.totals
    exponent = unit_mean([total], squares.exponent, count, float(total.max()))
    return total if isinstance(site.shape, ConvShape) else total[0], 2.0**exponent
