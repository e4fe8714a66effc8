"""The diagonal of the Fisher, entry by entry or row by row, in one pass over the data."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fxcompress.collective import Processes
from fxcompress.metric.moments import Moments
from fxcompress.metric.scaled import (
    ScaledSum,
    normalized,
    reduce_scaled,
    times_power,
    unit_mean,
)
from fxcompress.metric.visitor import SiteFacts, Sums, same_samples
from fxcompress.operators.shape import is_grouped, samples_in


class SquareSums(Sums):
    """Sums of the squares of every sample's gradient of the weight.

    Args:
        sites: that are looked at.
        device: of the model.
        entries: whether entries are told apart, not only rows.
    """

    backward = True

    def __init__(self, sites: Sequence[SiteFacts], device: torch.device, *, entries: bool) -> None:
        self.sites = sites
        self.entries = entries
        self.squares: dict[str, ScaledSum] = {}
        for site in sites:
            size = site.shape.matrix if entries else site.shape.matrix[:2]
            self.squares[site.name] = ScaledSum([size], device)
        self.pending: dict[str, tuple[Tensor, int]] = {}
        self.looked_up: dict[str, list[tuple[Tensor, Tensor, int]]] = defaultdict(list)
        self.exponent = 0

    def begin(self, batch: int) -> None:
        pass

    def start(self, exponent: int) -> None:
        self.exponent = exponent

    def input(self, site: SiteFacts, data: Tensor, mask: Tensor | None) -> bool:
        return not data.is_floating_point() or bool(data.isfinite().all())

    def keep(self, site: SiteFacts, data: Tensor) -> Tensor:
        return data

    def predicted(self, count: int) -> None:
        pass

    def gradient(
        self, site: SiteFacts, data: Tensor, gradient: Tensor, mask: Tensor | None
    ) -> bool:
        if not bool(gradient.isfinite().all()):
            return False
        # Powers of two are taken out, so that neither products nor squares leave their range.
        (data, first), (gradient, second) = normalized(data), normalized(gradient)
        exponent = first + second + self.exponent
        if site.calls > 1:  # the same weight used again: sum before squaring
            self._wait(site, data, gradient, exponent)
            return True
        squares = site.shape.squared_gradients(data, gradient, entries=self.entries)
        self._square(site.name, squares, exponent)
        return True

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
        for name, (total, exponent) in self.pending.items():
            products, more = normalized(total)
            squares = torch.zeros_like(products[0], dtype=torch.float64)
            for part in products:  # one sample at a time: their squares take as much memory again
                squares += part.square()
            self._square(name, squares if self.entries else squares.mean(2), exponent + more)
        self.pending.clear()
        for site in self.sites:
            if calls := self.looked_up.pop(site.name, None):
                top = max((power for _, g, power in calls if bool(g.any())), default=0)
                indices = torch.cat([each for each, _, _ in calls], 1)
                gradients = torch.cat([times_power(g, power - top) for _, g, power in calls], 1)
                found = site.shape.squared_gradients(indices, gradients, entries=self.entries)
                self._square(site.name, found, top)

    def reduce(self, processes: Processes) -> None:
        reduce_scaled([*self.squares.values()], processes)

    def finish(self, site: SiteFacts, predictions: int, found: Moments) -> Moments:
        sums = self.squares.pop(site.name)
        (total,) = sums.totals
        exponent = unit_mean([total], sums.exponent, predictions, float(total.max()))
        mean = total if is_grouped(site.shape) else total[0]
        units = (*found.units[:2], 2.0**exponent)
        if self.entries:
            return replace(found, entries=mean, units=units)
        return replace(found, weight=mean, units=units)
