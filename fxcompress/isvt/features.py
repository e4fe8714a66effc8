"""What every layer has to say about a compressed model, where the output alone says too little.

A step sees a few hundred predictions; the factors have millions of entries.  Their KL can be
lowered in many ways that other texts know nothing of: SmolLM2 at keep 0.6 learns six sequences
nearly by heart in two dozen steps, and is no better on others than after as many steps on fresh
ones.  The outputs y of the layers themselves are far more to go by, as each has its own targets.

How far a deviation matters is again what the Fisher metric says: ``½ E[(y' - y)ᵀ G (y' - y)]`` is
what the KL would be, to second order, in nats per prediction, if nothing but this output deviated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxcompress.graph.marks import PAD
from fxcompress.graph.padding import NONE, Padding
from fxcompress.metric.masks import output_marks
from fxcompress.metric.quadratic import QuadraticForm
from fxcompress.metric.whiten import BlockWhitener, Whitener
from fxcompress.operators.applied import operator_at
from fxcompress.pipeline.sites import Site

Outputs = dict[str, list[tuple[Tensor, Tensor | None]]]
"""What every layer returned, call by call, and which of its rows count (None for all)."""


@dataclass(frozen=True, eq=False)
class Features:
    """The mean over layers of how far their outputs are from the dense model's, times a weight.

    Attributes:
        weight: of the mean, beside the KL.
        sites: the layers that are looked at.
        roots: of their output factors G.
    """

    weight: float
    sites: Sequence[Site]
    roots: Mapping[str, Whitener | BlockWhitener]

    @classmethod
    def of(
        cls, weight: float, sites: Sequence[Site], metrics: Mapping[str, QuadraticForm]
    ) -> Features:
        """Of the layers whose outputs are no wider than their inputs.

        Products with G cost as much as the layer where both are alike, and twice as much again in
        the expansions of feed-forward layers; what these produce is seen after the next one.

        Args:
            weight: of the mean.
            sites: the matched ones.
            metrics: by site name.
        """
        roots = {}
        for site in sites:
            metric = metrics[site.name]
            if metric.factors is None or metric.null:
                continue
            if site.out_features <= site.in_features:
                roots[site.name] = metric.factors.outputs
        return cls(weight, [site for site in sites if site.name in roots], roots)

    @contextmanager
    def outputs(self, model: nn.Module, mask: Padding = NONE) -> Iterator[Outputs]:
        """What the layers of a model return while it runs.

        Args:
            model: the one to watch.
            mask: what is padding while it runs.
        """
        seen: Outputs = {}

        def hook(site: Site) -> Any:
            def keep(module: nn.Module, args: Any, output: Tensor) -> None:
                with mask.paused():
                    marks = output_marks(mask, site, output)
                real = None if marks is None else marks != PAD
                seen.setdefault(site.name, []).append((output, real))

            return keep

        handles = [
            operator_at(model, site.name).register_forward_hook(hook(site)) for site in self.sites
        ]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    def distance(self, wanted: Outputs, own: Outputs) -> Tensor:
        """``weight · mean_l ½ E[(y' - y)ᵀ G (y' - y)]``, in nats per prediction.

        Args:
            wanted: of the dense model.
            own: of the compressed one; layers that it runs past are left out, those that make
                fewer channels, and padding.
        """
        parts = []
        for site in self.sites:
            calls = [*zip(wanted.get(site.name, []), own.get(site.name, []), strict=False)]
            if not calls or any(one.shape != other.shape for (one, _), (other, _) in calls):
                continue
            rows = [
                site.shape.output_rows(after, real) - site.shape.output_rows(before, real)
                for (before, _), (after, real) in calls
            ]
            change = torch.cat([each.flatten(0, -2) for each in rows]).float()
            parts.append(self.roots[site.name].into(change.T).square().sum() / len(change))
        return 0.5 * self.weight * torch.stack(parts).mean() if parts else torch.zeros(())
