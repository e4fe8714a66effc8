"""Second moments of inputs and of output gradients, in one pass over the data."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fxcompress.collective import Processes
from fxcompress.metric.grams import (
    WIDE,
    CountSum,
    GramSum,
    RowSum,
    finish_together,
    reduce_grams,
)
from fxcompress.metric.moments import Moments, Named, is_root
from fxcompress.metric.pooled import Traces
from fxcompress.metric.visitor import InputKey, SiteFacts, Sums, input_key
from fxcompress.operators.shape import is_grouped

LARGEST_OUTPUT = 16384
"""From this width on (a vocabulary, say) only the diagonal of G is kept."""


class MomentSums(Sums):
    """Sums of ``a aᵀ``, shared by the sites on one input, and of ``g gᵀ``.

    Args:
        sites: that are looked at.
        device: of the model.
        needs: ``input``, ``output`` or both.
        scaled: whether the product of both is scaled to the trace of the Fisher
            (:mod:`fxcompress.metric.pooled`).
    """

    def __init__(
        self,
        sites: Sequence[SiteFacts],
        device: torch.device,
        needs: frozenset[Named],
        *,
        scaled: bool,
    ) -> None:
        self.sites = sites
        self.backward = "output" in needs
        self.traces = Traces(device) if scaled else None
        self.inputs: dict[InputKey, list[GramSum | RowSum] | CountSum] = {}
        self.outputs: dict[str, list[GramSum | RowSum]] = {}
        self.rows: dict[InputKey, int] = defaultdict(int)
        self.exponent = 0
        self._means: dict[InputKey, tuple[Tensor, float]] = {}
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

    def begin(self, batch: int) -> None:
        if self.traces is not None:
            self.traces.begin(batch)

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
        return None if self.traces is None else self.traces.project(site, data)

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

    def end(self) -> None:
        if self.traces is not None:
            self.traces.end()

    def reduce(self, processes: Processes) -> None:
        sums = [*self.inputs.values(), *self.outputs.values()]
        every = [each if isinstance(each, list) else [each] for each in sums]
        reduce_grams([one for each in every for one in each], processes)
        self.rows = defaultdict(int, processes.add_up(self.rows))
        if self.traces is not None:
            self.traces.reduce(processes)

    def finish(self, site: SiteFacts, predictions: int, found: Moments) -> Moments:
        key = input_key(site)
        if key in self.inputs:
            self._means[key] = _finish(self.inputs.pop(key), self.rows[key], site)
        a, first = self._means.get(key, (None, 1.0))
        outputs = self.outputs.pop(site.name, None)
        g, second = (None, 1.0) if outputs is None else _finish(outputs, predictions, site)
        if self.traces is not None and a is not None and g is not None:
            scale = self.traces.scale(site, (a, first), (g, second))
            g *= scale**0.5 if is_root(g) else scale
        return replace(found, input=a, output=g, units=(first, second, found.units[2]))


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
