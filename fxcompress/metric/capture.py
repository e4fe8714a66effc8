"""Moments of every site, from one pass over the calibration data."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fxcompress.graph.inputs import Forward, device_of
from fxcompress.metric.metric import Metric
from fxcompress.metric.moments import (
    LARGEST_OUTPUT,
    WIDE,
    CountSum,
    GramSum,
    Moments,
    Named,
    RowSum,
    ScaledSum,
    finish_together,
    is_root,
    normalized,
    times_power,
    unit_mean,
)
from fxcompress.metric.output import Loss
from fxcompress.metric.own_sums import OwnSums
from fxcompress.metric.passes import DRAWS, Draws, Reach, run_pass
from fxcompress.metric.pooled import Traces
from fxcompress.metric.statistic import Statistic
from fxcompress.metric.visitor import InputKey, Several, SiteFacts, input_key, same_samples
from fxcompress.operators.shape import is_grouped, samples_in


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
    needs = frozenset(each for each in metric.needs if not isinstance(each, Statistic))
    sums = _Sums(model, sites, needs, metric.backward, scaled=not metric.directions)
    own = OwnSums([each for each in metric.needs if isinstance(each, Statistic)])
    passed = run_pass(
        model, sites, batches, Several([sums, own]),
        drawn=drawn, loss=loss, forward=forward,
        everywhere=everywhere, places=places, watched=watched, tick=tick,
    )  # fmt: skip
    moments = {
        name: replace(found, own=own.finish(site, passed.predictions))
        for site, (name, found) in zip(sites, sums.finish(passed.predictions).items(), strict=True)
    }
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
    groups = site.shape.matrix[0]
    stats = found.tensors
    # A group whose inputs or gradients are all zero has none.
    alive = [stat.reshape(groups, -1).any(1) for stat in stats]
    if bool(torch.stack(alive).all(0).any()):
        return None
    return "its inputs are all zero" if not metric.backward else ZERO


UNANSWERED = "no gradient came back to it"
ZERO = "its inputs or the gradients that came back to it are all exactly zero"


class _Sums:
    """Running sums of one pass: a visitor (:class:`fxcompress.metric.visitor.Visitor`)."""

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[SiteFacts],
        needs: frozenset[Named],
        backward: bool,
        *,
        scaled: bool = True,
    ) -> None:
        self.sites = sites
        self.needs = needs
        self.backward = backward
        self.keeps_inputs = bool(needs & {"weight", "entries"})
        device = device_of(model)
        both = {"input", "output"} <= needs and not self.keeps_inputs
        self.traces = Traces(device) if both and scaled else None
        self.inputs: dict[InputKey, list[GramSum | RowSum] | CountSum] = {}
        self.outputs: dict[str, list[GramSum | RowSum]] = {}
        self.squares: dict[str, ScaledSum] = {}
        self.rows: dict[InputKey, int] = defaultdict(int)
        self.pending: dict[str, tuple[Tensor, int]] = {}
        self.looked_up: dict[str, list[tuple[Tensor, Tensor, int]]] = defaultdict(list)
        self.exponent = 0
        for site in sites:
            shape = site.shape
            dtype = torch.float64 if shape.dtype == torch.float64 else torch.float32
            groups, m, n = shape.matrix
            if "input" in needs and input_key(site) not in self.inputs:
                self.inputs[input_key(site)] = (
                    CountSum(n, device)
                    if shape.takes == "indices"
                    else _sums(groups, n, device, dtype, site, "input")
                )
            if "output" in needs:
                self.outputs[site.name] = (
                    [GramSum(m, device, dtype, diagonal=True) for _ in range(groups)]
                    if m >= LARGEST_OUTPUT
                    else _sums(groups, m, device, dtype, site, "output gradient")
                )
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
        for rows in site.shape.input_rows(data, mask):
            if isinstance(sums, CountSum):
                sums.add(rows)
                self.rows[key] += len(rows)
            else:
                finite = _add(sums, rows) and finite
                self.rows[key] += rows.shape[-2]
        return finite

    def keep(self, site: SiteFacts, data: Tensor) -> Tensor | None:
        if self.traces is not None:
            return self.traces.project(site, data)
        return data if self.keeps_inputs else None

    def predicted(self, count: int) -> None:
        if self.traces is not None:
            self.traces.predicted(count, self.sites)

    def gradient(
        self, site: SiteFacts, data: Tensor | None, gradient: Tensor, mask: Tensor | None
    ) -> bool:
        finite = True
        sums = self.outputs.get(site.name)
        if sums is not None:
            finite = _add(sums, site.shape.output_rows(gradient, mask), self.exponent)
        if self.traces is not None:
            self.traces.gradient(site, data, gradient, self.exponent)
            return finite
        if data is None:
            return finite
        if not bool(gradient.isfinite().all()):
            return False
        # Powers of two are taken out, so that neither products nor squares leave their range.
        (data, first), (gradient, second) = normalized(data), normalized(gradient)
        exponent = first + second + self.exponent
        if site.calls > 1:  # the same weight used again: sum before squaring
            self._wait(site, data, gradient, exponent)
            return finite
        entries = "entries" in self.needs
        squares = site.shape.squared_gradients(data, gradient, entries=entries)
        self._square(site.name, squares, exponent)
        return finite

    def _square(self, name: str, squares: Tensor, exponent: int) -> None:
        if bool(squares.any()):
            self.squares[name].add([squares], exponent)

    def _wait(self, site: SiteFacts, data: Tensor, gradient: Tensor, exponent: int) -> None:
        """Add what one of several calls gives, times ``2^exponent``, to every sample's gradient."""
        shape = site.shape
        if shape.takes == "indices":
            # A table per sample would be far more than the few rows of it that are looked up.
            waiting = self.looked_up[site.name]
            waiting.append((data.reshape(len(data), -1), gradient.flatten(1, -2), exponent))
            same_samples(site, len(waiting[0][0]), len(data))
            return
        count = samples_in(data, shape)
        found = self.pending.get(site.name)
        if found is None:
            wide = torch.promote_types(gradient.dtype, torch.float32)
            found = gradient.new_zeros((count, *shape.matrix), dtype=wide), exponent
        total, unit = found
        same_samples(site, len(total), count)
        if bool(data.any()) and bool(gradient.any()):
            top = max(unit, exponent) if bool(total.any()) else exponent
            if unit != top:
                times_power(total, unit - top, out=total)
            start, unit = 0, top
            for part in shape.weight_gradients(data, gradient):
                total[start : start + len(part)] += times_power(part, exponent - top)
                start += len(part)
        self.pending[site.name] = total, unit

    def end(self) -> None:
        if self.traces is not None:
            self.traces.end()
        entries = "entries" in self.needs
        for name, (total, exponent) in self.pending.items():
            products, more = normalized(total)
            squares = torch.zeros_like(products[0], dtype=torch.float64)
            for part in products:  # one sample at a time: their squares take as much memory again
                squares += part.square()
            self._square(name, squares if entries else squares.mean(2), exponent + more)
        self.pending.clear()
        for site in self.sites:
            if calls := self.looked_up.pop(site.name, None):
                top = max((power for _, g, power in calls if bool(g.any())), default=0)
                indices = torch.cat([each for each, _, _ in calls], 1)
                gradients = torch.cat([times_power(g, power - top) for _, g, power in calls], 1)
                found = site.shape.squared_gradients(indices, gradients, entries=entries)
                self._square(site.name, found, top)

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
            if self.traces is not None and a is not None and g is not None:
                scale = self.traces.scale(site, (a, first), (g, second))
                g *= scale**0.5 if is_root(g) else scale
            found[site.name] = Moments(
                input=a,
                output=g,
                weight=None if entries else w,
                entries=w if entries else None,
                units=(first, second, third),
            )
        return found


def _sums(
    groups: int,
    features: int,
    device: torch.device,
    dtype: torch.dtype,
    site: SiteFacts,
    what: str,
) -> list[GramSum | RowSum]:
    """One for each group.  Patches are many, and forms ask for their moments as a matrix."""
    if features >= WIDE and not is_grouped(site.shape):
        return [RowSum(features, device, dtype, f"{what} of {site.name}")]
    return [GramSum(features, device, dtype) for _ in range(groups)]


def _add(sums: Sequence[GramSum | RowSum], rows: Tensor, exponent: int = 0) -> bool:
    """Add rows (positions x n), or (g x positions x n) for groups; False if not finite."""
    parts = rows if rows.dim() > 2 else rows[None]
    finite = [each.add(part, exponent) for each, part in zip(sums, parts, strict=True)]
    return all(finite)


def _finish(
    sums: Sequence[GramSum | RowSum] | CountSum, count: int, site: SiteFacts
) -> tuple[Tensor, float]:
    """The mean, and the unit of which it is in squares (of which a root is)."""
    if isinstance(sums, CountSum):
        return sums.finish(count), 1.0
    if isinstance(sums[0], RowSum):
        mean, exponent = sums[0].finish_scaled(count)
        return mean, 2.0**exponent
    means, exponent = finish_together([each for each in sums if isinstance(each, GramSum)], count)
    return torch.stack(means) if is_grouped(site.shape) else means[0], 2.0**exponent


def _mean(squares: ScaledSum, count: int, site: SiteFacts) -> tuple[Tensor, float]:
    (total,) = squares.totals
    exponent = unit_mean([total], squares.exponent, count, float(total.max()))
    return total if is_grouped(site.shape) else total[0], 2.0**exponent
