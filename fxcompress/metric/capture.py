"""Moments of every site, from one pass over the calibration data."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxcompress.errors import CalibrationError
from fxcompress.forms.shape import ConvShape, EmbeddingShape, Shape
from fxcompress.graph.inputs import Forward, device_of
from fxcompress.metric.metric import Metric
from fxcompress.metric.moments import (
    LARGEST_OUTPUT,
    WIDE,
    CountSum,
    GramSum,
    Moments,
    RowSum,
    Statistic,
)
from fxcompress.metric.output import Loss
from fxcompress.metric.passes import DRAWS, Draws, InputKey, SiteFacts, input_key, run_pass
from fxcompress.metric.pooled import Traces
from fxcompress.metric.rows import input_rows, output_rows, squared_gradients, weight_gradients


@dataclass(frozen=True, eq=False)
class Calibration:
    """The outcome of the data pass.

    Attributes:
        moments: per site name; sites with one input share one ``Moments.input`` tensor.
        batches: number of batches seen.
        predictions: number of predictions that the Fisher is a mean over.
        kind: output family, ``"loss"`` for a user's loss, ``"none"`` without a backward pass.
    """

    moments: Mapping[str, Moments]
    batches: int = 0
    predictions: int = 0
    kind: str = "none"


def calibrate(
    model: nn.Module,
    sites: Sequence[SiteFacts],
    batches: Iterable[Any],
    metric: Metric,
    *,
    drawn: Draws = DRAWS,
    loss: Loss | None = None,
    forward: Forward | None = None,
    tick: Callable[[], None] = lambda: None,
) -> Calibration:
    """Gather the moments that ``metric`` needs at every site.

    Args:
        metric: says which statistics are needed.
        model, sites, batches, drawn, loss, forward, tick: as of
            :func:`fxcompress.metric.passes.run_pass`.

    Raises:
        CalibrationError: as there.
    """
    if not metric.needs or not sites:
        return Calibration({site.name: Moments() for site in sites})
    sums = _Sums(model, sites, metric.needs, metric.backward, scaled=not metric.directions)
    passed = run_pass(
        model, sites, batches, sums,
        drawn=drawn, loss=loss, forward=forward, tick=tick,
    )  # fmt: skip
    moments = sums.finish(passed.predictions)
    return Calibration(moments, passed.batches, passed.predictions, passed.kind)


class _Sums:
    """Running sums of one pass: a visitor (:class:`fxcompress.metric.passes.Visitor`)."""

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[SiteFacts],
        needs: frozenset[Statistic],
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
        self.squares: dict[str, Tensor] = {}
        self.rows: dict[InputKey, int] = defaultdict(int)
        self.pending: dict[str, Tensor] = {}
        self.looked_up: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for site in sites:
            shape = site.shape
            dtype = torch.float64 if shape.dtype == torch.float64 else torch.float32
            groups, m, n = sizes(shape)
            if "input" in needs and input_key(site) not in self.inputs:
                self.inputs[input_key(site)] = (
                    CountSum(n, device)
                    if isinstance(shape, EmbeddingShape)
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
                self.squares[site.name] = torch.zeros(size, dtype=torch.float64, device=device)

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
            finite = _add(sums, output_rows(gradient, site.shape, mask))
        if self.traces is not None:
            self.traces.gradient(site, data, gradient, mask)
            return finite
        if data is None:
            return finite
        if site.calls > 1:  # the same weight used again: sum before squaring
            return self._wait(site, data, gradient) and finite
        entries = "entries" in self.needs
        found = squared_gradients(data, gradient, site.shape, entries=entries)
        self.squares[site.name] += found
        return finite and bool(found.isfinite().all())

    def _wait(self, site: SiteFacts, data: Tensor, gradient: Tensor) -> bool:
        """Add what one of several calls gives to the gradient of each sample; if it is finite."""
        shape = site.shape
        if isinstance(shape, EmbeddingShape):
            # A table per sample would be far more than the few rows of it that are looked up.
            waiting = self.looked_up[site.name]
            waiting.append((data.reshape(len(data), -1), gradient.flatten(1, -2)))
            same_samples(site, len(waiting[0][0]), len(data))
            return bool(gradient.isfinite().all())
        single = isinstance(shape, ConvShape) and data.dim() < shape.dims + 2
        count = 1 if single else len(data)
        wide = torch.promote_types(gradient.dtype, torch.float32)
        total = self.pending.get(site.name)
        if total is None:
            size = (count, *sizes(shape))
            total = self.pending[site.name] = gradient.new_zeros(size, dtype=wide)
        same_samples(site, len(total), count)
        start, finite = 0, True
        for part in weight_gradients(data, gradient, shape):
            total[start : start + len(part)] += part
            start += len(part)
            finite = finite and bool(part.isfinite().all())
        return finite

    def end(self) -> None:
        if self.traces is not None:
            self.traces.end()
        for name, total in self.pending.items():
            for part in total:  # one sample at a time: their squares take as much memory again
                squares = part.square()
                self.squares[name] += squares if "entries" in self.needs else squares.mean(2)
        self.pending.clear()
        for site in self.sites:
            if calls := self.looked_up.pop(site.name, None):
                indices, gradients = (torch.cat(each, 1) for each in zip(*calls, strict=True))
                entries = "entries" in self.needs
                found = squared_gradients(indices, gradients, site.shape, entries=entries)
                self.squares[site.name] += found

    def finish(self, predictions: int) -> dict[str, Moments]:
        """The means, by site; the sums are given up."""
        inputs: dict[InputKey, Tensor] = {}
        found = {}
        for site in self.sites:
            key = input_key(site)
            if key in self.inputs:
                inputs[key] = _finish(self.inputs.pop(key), self.rows[key], site)
            outputs = self.outputs.pop(site.name, None)
            squares = self.squares.pop(site.name, None)
            if squares is not None:
                squares /= predictions
                squares = squares if isinstance(site.shape, ConvShape) else squares[0]
            entries = "entries" in self.needs
            output = None if outputs is None else _finish(outputs, predictions, site)
            if self.traces is not None and output is not None:
                scale = self.traces.scale(site, inputs[key], output)
                few = output.dim() == 2 and len(output) < output.shape[1]
                output *= scale**0.5 if few else scale
            found[site.name] = Moments(
                input=inputs.get(key),
                output=output,
                weight=None if entries else squares,
                entries=squares if entries else None,
            )
        return found


def same_samples(site: SiteFacts, first: int, now: int) -> None:
    """Require that two calls of one layer are about the same samples.

    Raises:
        CalibrationError: they are not.
    """
    if first != now:
        raise CalibrationError(
            f"{site.name} is called on {first} samples and on {now} in one pass, so that the "
            "gradient of its weight cannot be told sample by sample: choose metric: {kind: kfac}, "
            "or exclude the layer (unless: [{name: ...}])"
        )


def sizes(shape: Shape) -> tuple[int, int, int]:
    """Groups, and rows and columns of the matrix of each of them."""
    if isinstance(shape, ConvShape):
        return shape.groups, shape.group_out, shape.group_in * shape.taps
    return 1, shape.out_features, shape.in_features


def _sums(
    groups: int,
    features: int,
    device: torch.device,
    dtype: torch.dtype,
    site: SiteFacts,
    what: str,
) -> list[GramSum | RowSum]:
    """One for each group.  Patches are many, and forms ask for their moments as a matrix."""
    if features >= WIDE and not isinstance(site.shape, ConvShape):
        return [RowSum(features, device, dtype, f"{what} of {site.name}")]
    return [GramSum(features, device, dtype) for _ in range(groups)]


def _add(sums: Sequence[GramSum | RowSum], rows: Tensor) -> bool:
    """Add rows (positions x n), or (g x positions x n) for groups; False if not finite."""
    parts = rows if rows.dim() > 2 else rows[None]
    finite = [each.add(part) for each, part in zip(sums, parts, strict=True)]
    return all(finite)


def _finish(sums: Sequence[GramSum | RowSum] | CountSum, count: int, site: SiteFacts) -> Tensor:
    if isinstance(sums, CountSum):
        return sums.finish(count)
    means = [each.finish(count) for each in sums]
    return torch.stack(means) if isinstance(site.shape, ConvShape) else means[0]
