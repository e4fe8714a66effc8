"""Sums of the statistics that a metric brings along, in one pass over the data."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fxcompress.collective import Processes
from fxcompress.metric.moments import Moments
from fxcompress.metric.scaled import times_power
from fxcompress.metric.statistic import Statistic
from fxcompress.metric.visitor import InputKey, SiteFacts, Sums, input_key, same_samples
from fxcompress.operators.rows import BLOCK
from fxcompress.operators.shape import is_grouped

Key = tuple[str, str | InputKey]
"""The name of a statistic, and of a site, or the input that several sites share."""


class OwnSums(Sums):
    """Sums of statistics that are told what rows add.

    Args:
        statistics: of different names.
        device: of the model.
    """

    def __init__(self, statistics: Sequence[Statistic], device: torch.device) -> None:
        self.device = device
        self.backward = any(each.backward for each in statistics)
        self.totals: dict[Key, Tensor] = {}
        self.rows: dict[InputKey, int] = defaultdict(int)
        self._by_place: dict[str, list[Statistic]] = defaultdict(list)
        for each in statistics:
            self._by_place[each.reads].append(each)
        self._exponent = 0
        self._pending: dict[str, Tensor] = {}

    def begin(self, batch: int) -> None:
        pass

    def input(self, site: SiteFacts, data: Tensor, mask: Tensor | None) -> bool:
        key, statistics = input_key(site), self._by_place["inputs"]
        if not statistics:
            return not data.is_floating_point() or bool(data.isfinite().all())
        finite = True
        for part in site.shape.input_rows(data, mask):
            for rows in _dense(part, site):
                self.rows[key] += rows.shape[1]
                finite = self._add(statistics, key, rows) and finite
        return finite

    def keep(self, site: SiteFacts, data: Tensor) -> Tensor | None:
        return data if self._by_place["weights"] else None

    def predicted(self, count: int) -> None:
        pass

    def start(self, exponent: int) -> None:
        self._exponent = exponent

    def gradient(
        self, site: SiteFacts, data: Tensor | None, gradient: Tensor, mask: Tensor | None
    ) -> bool:
        if not self.backward:
            return True
        # What is sure beyond float32 has gradients times a power of two.
        wide = torch.float64 if self._exponent else torch.float32
        gradient = gradient.to(torch.promote_types(gradient.dtype, wide))
        gradient = times_power(gradient, self._exponent)
        finite = bool(gradient.isfinite().all())
        if self._by_place["gradients"]:
            rows = site.shape.output_rows(gradient, mask)
            rows = rows if rows.dim() > 2 else rows[None]
            finite = self._add(self._by_place["gradients"], site.name, rows) and finite
        if data is None:
            return finite
        parts = site.shape.weight_gradients(data, gradient)
        if site.calls == 1:
            for part in parts:
                finite = self._add(self._by_place["weights"], site.name, part) and finite
            return finite
        whole, before = torch.cat([*parts]), self._pending.get(site.name)
        if before is not None:  # the same weight used again: sum before squaring
            same_samples(site, len(before), len(whole))
            whole += before
        self._pending[site.name] = whole
        return finite

    def end(self) -> None:
        for name, whole in self._pending.items():
            self._add(self._by_place["weights"], name, whole)
        self._pending.clear()

    def reduce(self, processes: Processes) -> None:
        self.totals = processes.sum_by_key(self.totals, self.device)
        self.rows = defaultdict(int, processes.add_up(self.rows))

    def finish(self, site: SiteFacts, predictions: int, found: Moments) -> Moments:
        own: dict[str, Tensor] = {}
        groups, m, n = site.shape.matrix
        for reads, statistics in self._by_place.items():
            key: str | InputKey = input_key(site) if reads == "inputs" else site.name
            count = self.rows[input_key(site)] if reads == "inputs" else predictions
            for each in statistics:
                total = self.totals.get((each.name, key))
                if total is None:
                    total = torch.zeros(groups, *each.size(m, n), dtype=torch.float64)
                mean = total / max(count, 1)
                own[each.name] = mean if is_grouped(site.shape) else mean[0]
                if reads != "inputs":
                    self.totals.pop((each.name, key), None)
        return replace(found, own=own)

    def _add(self, statistics: Sequence[Statistic], key: str | InputKey, rows: Tensor) -> bool:
        finite = True
        for each in statistics:
            found = each.added(rows).to(torch.float64)
            finite = bool(found.isfinite().all()) and finite
            total = self.totals.get((each.name, key))
            self.totals[each.name, key] = found if total is None else total.add_(found)
        return finite


def _dense(rows: Tensor, site: SiteFacts) -> Iterator[Tensor]:
    """Rows of inputs (g x rows x n); look-ups as one-hot vectors, some at a time."""
    if site.shape.takes != "indices":
        yield rows if rows.dim() > 2 else rows[None]
        return
    width = site.shape.in_features
    for part in torch.split(rows, max(1, BLOCK // width)):
        yield F.one_hot(part, width).to(torch.float32)[None]
