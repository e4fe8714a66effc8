"""The stage between calibration and budget: every weight decomposed in its metric.

Sites are gone through in graph order, and what is large (moments, whiteners) is given up as
soon as the sites that need it are done.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fxcompress.forms import Form, Spectrum, Target
from fxcompress.forms.form import Losses
from fxcompress.metric import Factor, Metric, Moments
from fxcompress.metric.spectrum import decompose_whitened, quadratic_loss
from fxcompress.metric.whiten import BlockWhitener, Whitener, whitener
from fxcompress.sites import Site, SiteBundle, dense_weight


@dataclass(frozen=True, eq=False)
class Decomposed:
    """One site, or a bundle stacked to one, in its metric.

    Attributes:
        spectrum: of the weight, (m x n) or (Σm x n).
        losses: form -> predicted loss at each rank that is permitted.
        loss: predicted loss of any other weight, if a form will ask for it again.
        shares: for a bundle, how much of each squared singular value lies in the rows of each
            site (sites x k), columns adding up to 1; for a site by itself (1 x k) ones.
    """

    spectrum: Spectrum
    losses: Mapping[str, Losses]
    shares: Tensor
    loss: Callable[[Tensor], float] | None = None

    def target(self, weight: Tensor) -> Target:
        """What forms approximate, given the weight that was decomposed."""
        return Target(weight, self.spectrum, self.loss or _given_up)

    def predicted(self, loss: float, rank: int) -> tuple[float, ...]:
        """The part of each site in a predicted loss at a rank."""
        left = self.spectrum.sigma[rank:].square()
        parts = (self.shares[:, rank:] * left).sum(1)
        total = float(parts.sum())
        if total == 0:
            return tuple(loss / len(parts) for _ in parts)
        return tuple(loss * float(part) / total for part in parts)


@dataclass(frozen=True, eq=False)
class Decomposition:
    """The outcome of the stage.

    Attributes:
        sites: by site name.
        bundles: by name; without those of which a site has no influence on the output.
        idle: names of sites that the data gives no influence on the output.
    """

    sites: Mapping[str, Decomposed]
    bundles: Mapping[str, Decomposed]
    idle: tuple[str, ...]


def decompose_sites(
    model: nn.Module,
    sites: Sequence[Site],
    bundles: Sequence[SiteBundle],
    moments: dict[str, Moments],
    metric: Metric,
    damping: tuple[float, float],
    tick: Callable[[], None] = lambda: None,
) -> Decomposition:
    """Decompose every site and every bundle, and ask their forms what they would lose.

    Args:
        model: has the weights.
        sites: in graph order, so that sites on one input follow one another.
        bundles: of these sites.
        moments: per site name; emptied on the way, to free the memory.
        metric: makes factors of moments.
        damping: of the input and of the output factor.
        tick: called after every site.

    Raises:
        ValueError: a weight or a factor is not finite.
    """
    found: dict[str, Decomposed] = {}
    joint: dict[str, Decomposed] = {}
    idle: list[str] = []
    shared: tuple[Factor, Whitener] | None = None
    waiting = {site.name: bundle for bundle in bundles for site in bundle.sites}
    outputs: dict[str, Whitener] = {}  # of sites whose bundle is not complete yet
    for site in sites:
        a, g = metric.factors(moments.pop(site.name))
        if shared is None or shared[0] is not a:  # sites on one input share one tensor
            shared = (a, whitener(a, damping[0]))
        inputs, own = shared[1], whitener(g, damping[1])
        weight = dense_weight(model.get_submodule(site.name)).detach()
        target = _target(weight, inputs, own)
        losses = {name: form.losses(target, site.ranks(name)) for name, form in site.forms.items()}
        needed = any(type(form).factors is not Form.factors for form in site.forms.values())
        found[site.name] = Decomposed(
            target.spectrum,
            losses,
            torch.ones(1, len(target.spectrum.sigma)),
            target.loss if needed else None,
        )
        if inputs.null or own.null:
            idle.append(site.name)
        bundle = waiting.get(site.name)
        if bundle is not None:
            outputs[site.name] = own
            if all(member.name in outputs for member in bundle.sites):
                blocks = tuple(outputs.pop(member.name) for member in bundle.sites)
                if not inputs.null and not any(block.null for block in blocks):
                    joint[bundle.name] = _decompose_bundle(model, bundle, inputs, blocks)
        tick()
    return Decomposition(found, joint, tuple(idle))


def _decompose_bundle(
    model: nn.Module, bundle: SiteBundle, inputs: Whitener, blocks: tuple[Whitener, ...]
) -> Decomposed:
    weights = [dense_weight(model.get_submodule(site.name)).detach() for site in bundle.sites]
    outputs = BlockWhitener(blocks, tuple(len(weight) for weight in weights))
    spectrum = decompose_whitened(torch.cat(weights), inputs, outputs)
    tail = spectrum.loss().cpu().numpy()
    whitened = outputs.split(outputs.into(spectrum.left.to(torch.float64)))
    energy = torch.stack([part.square().sum(0) for part in whitened])
    total = energy.sum(0)
    shares = torch.where(total > 0, energy / total, 1 / len(weights))
    losses = {name: tail[bundle.ranks(name)] for name in bundle.forms}
    return Decomposed(spectrum, losses, shares)


def _target(weight: Tensor, inputs: Whitener, outputs: Whitener) -> Target:
    def loss(approximation: Tensor) -> float:
        return quadratic_loss(approximation - weight.to(approximation.dtype), inputs, outputs)

    return Target(weight, decompose_whitened(weight, inputs, outputs), loss)


def _given_up(approximation: Tensor) -> float:
    raise RuntimeError("the metric was given up after the losses were known, to free the memory")
