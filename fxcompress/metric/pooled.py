"""The scale of the Fisher where many positions make one prediction.

The gradient of a weight is ``∇W = Σ_t g_t a_tᵀ`` over the positions t of a sample.  K-FAC takes its
square for ``Σ_t g_t g_tᵀ ⊗ E[a aᵀ]`` ("expand", Eschenhagen et al. 2023, arXiv 2311.00636), as if
positions were independent.  Where all of them make one prediction (a mean over tokens) they add up:
the true Fisher is larger by up to the number of positions, and only in the layers before the mean,
so that a budget takes too much from them.  Here ``tr F = E ‖∇W‖²`` is measured, and the Kronecker
product scaled to it.  With random signs u and v (±1) it is ``E[(uᵀ ∇W v)²]``, products of a few
numbers a position.

The other way of that paper, "reduce" (``E[ḡ ḡᵀ] ⊗ E[ā āᵀ]`` of summed gradients and mean inputs),
is exact for linear layers right before a mean, and does great harm elsewhere: the gradients of all
keys of a softmax add up to zero, and a mean of patches or tokens hides what they differ in.
One-shot, global ranks; MiniLM (``low_rank``, calibrated on 1,309 sentences, ``1 - mean cosine`` on
the development text of ``examples/minilm.py``, methods of ``benchmark_minilm.py``) and convolutions
(the network of ``examples/fashion.py``, calibrated on 512 images, KL on 2,000 validation images):

==============================  ===============  ===============  ===============  ===============
                                MiniLM 0.8       MiniLM 0.6       convolutions .5  convolutions .25
==============================  ===============  ===============  ===============  ===============
expand                          0.0325           0.0778           0.0018           0.081
expand, scaled                  0.0270           0.0809           0.0019           0.102
reduce                          0.3952           0.4885           0.5467           1.764
the one whose trace is nearer   0.1103           0.1957           0.5447           1.694
``ekfac``                       0.0247           0.0721           0.0024           0.112
==============================  ===============  ===============  ===============  ===============

With ``pivoted`` scaling takes MiniLM from 0.0184 to 0.0145, and from 0.0634 to 0.0584.  The sum of
predicted losses at 0.8 was too low by 2.3 there, and is by 1.3.  So linear layers over tokens are
scaled, and convolutions, where it wins nothing, stay as they are.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from fxcompress.collective import Processes
from fxcompress.metric.moments import is_root
from fxcompress.metric.seeds import seeded
from fxcompress.metric.visitor import SiteFacts

PROBES = 64
"""Pairs of random vectors, drawn anew for every batch."""


class Traces:
    """``E ‖∇W‖²`` per prediction of linear layers over several positions a sample.

    A layer counts as pooled while samples make no more than one prediction each.  Once a batch
    makes more, nothing is measured any more.
    """

    def __init__(self, device: torch.device) -> None:
        self.generator = torch.Generator(device)
        self.batch = 0
        self.seen: dict[str, int] = defaultdict(int)  # samples of the batch
        self.samples: dict[str, int] = defaultdict(int)
        self.positions: dict[str, int] = defaultdict(int)
        self.apart: set[str] = set()
        self.predictions = 0
        self._vectors: dict[tuple[int, str], Tensor] = {}
        self._pending: dict[str, Tensor] = {}
        self._squares: dict[str, float] = defaultdict(float)

    def begin(self, batch: int) -> None:
        """A batch at some place of the data begins."""
        self._vectors.clear()  # it has others, so that chance evens out
        self.seen.clear()
        self.batch = batch

    def project(self, site: SiteFacts, data: Tensor) -> Tensor | None:
        """What is kept of the input of a call (samples x positions x probes); None for nothing."""
        if site.name in self.apart:
            return None
        if not site.shape.pooled or data.dim() < 3:
            self.apart.add(site.name)
            return None
        self.seen[site.name] += len(data)
        self.samples[site.name] += len(data)
        self.positions[site.name] += data[..., 0].numel()
        return self._products(data, "input")

    def predicted(self, count: int, sites: Sequence[SiteFacts]) -> None:
        """The batch makes so many predictions."""
        self.predictions += count
        for site in sites:
            if count * site.calls > self.seen[site.name]:
                self.apart.add(site.name)

    def gradient(
        self,
        site: SiteFacts,
        projected: Tensor | None,
        gradient: Tensor,
        exponent: int,
    ) -> None:
        """The gradient of a call's output, with what was kept of its input.

        Gradients in units of a power of two (``2^exponent``) are of predictions that are sure
        beyond what float32 can tell; nothing is scaled by them.  They are zero at padding.
        """
        if exponent:
            self.apart.add(site.name)
        if projected is None or site.name in self.apart:
            return
        own = self._products(gradient, "output") * projected
        sums = own.sum(1)
        waiting = self._pending.get(site.name)
        if waiting is not None and waiting.shape != sums.shape:
            self.apart.add(site.name)
            return
        self._pending[site.name] = sums if waiting is None else waiting + sums

    def end(self) -> None:
        """A backward pass has ended."""
        for name, sums in self._pending.items():
            self._squares[name] += float(sums.square().sum(dtype=torch.float64)) / PROBES
        self._pending.clear()

    def reduce(self, processes: Processes) -> None:
        """Add up what all processes have measured."""
        self.samples = defaultdict(int, processes.add_up(self.samples))
        self.positions = defaultdict(int, processes.add_up(self.positions))
        self._squares = defaultdict(float, processes.add_up(self._squares))
        found = processes.gathered((self.predictions, self.apart))
        self.predictions = sum(predictions for predictions, _ in found)
        self.apart = set().union(*(apart for _, apart in found))

    def scale(
        self, site: SiteFacts, inputs: tuple[Tensor, float], outputs: tuple[Tensor, float]
    ) -> float:
        """What G has to be multiplied by, for ``tr(A) tr(G)`` to be the measured trace.

        Args:
            site: the layer.
            inputs, outputs: A and G, as :class:`fxcompress.metric.moments.Moments` has them, each
                with its unit.
        """
        single = self.positions[site.name] <= self.samples[site.name]
        if site.name in self.apart or single:
            return 1.0
        given = trace(inputs[0]) * trace(outputs[0])
        measured = self._squares[site.name] / self.predictions
        for _, unit in (inputs, outputs):
            measured = measured / unit / unit
        scale = measured / given if given else 1.0
        return scale if 0 < scale < math.inf else 1.0

    def _products(self, rows: Tensor, side: str) -> Tensor:
        width = rows.shape[-1]
        dtype = torch.promote_types(rows.dtype, torch.float32)
        if (width, side) not in self._vectors:
            # The same ones in whatever order, and together with whichever layers they are drawn.
            generator = seeded(self.generator, self.batch, width, side == "input")
            size = (width, PROBES)
            signs = torch.randint(2, size, generator=generator, device=rows.device)
            self._vectors[width, side] = signs.to(dtype) * 2 - 1
        vectors = self._vectors[width, side].to(dtype)
        return rows.to(dtype).flatten(1, -2) @ vectors


def trace(moment: Tensor) -> float:
    """The trace of a second moment: given (d x d), as its diagonal (d), or a root (r x d)."""
    if moment.dim() == 1:
        return float(moment.sum())
    if is_root(moment):
        return float(moment.square().sum())
    return float(moment.diagonal().sum())
