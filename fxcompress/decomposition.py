"""The stage between calibration and budget: every weight approximated in its metric.

Sites are gone through in graph order, and what is large (moments, whiteners) is given up as
soon as the sites that need it are done.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fxcompress.forms import Form, Target
from fxcompress.forms.target import Losses, Quadratic
from fxcompress.metric import Metric, Moments
from fxcompress.metric.quadratic import Whiteners, quadratic, shares, stacked
from fxcompress.modules import canonical_weight
from fxcompress.sites import Site, SiteBundle


@dataclass(frozen=True, eq=False)
class Decomposed:
    """One site, or a bundle stacked to one, in its metric.

    Attributes:
        target: the weight, (m x n) or (Σm x n), or that of a convolution, and its metric if a form
            will ask for it again.
        losses: form -> predicted loss at each rank that is permitted; infinite where it is not
            offered.
        parts: for a bundle, the loss of each of its sites at a rank, up to a common factor.
    """

    target: Target
    losses: Mapping[str, Losses]
    parts: Callable[[int], Tensor] | None = None

    @property
    def sigma(self) -> Tensor:
        """Singular values in the metric (k), of the weight seen as one matrix."""
        return self.target.truncations().sigma

    def predicted(self, loss: float, rank: int) -> tuple[float, ...]:
        """The part of each site in a predicted loss at a rank."""
        if self.parts is None:
            return (loss,)
        parts = self.parts(rank)
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
    """Approximate every site and every bundle, and ask their forms what they would lose.

    Args:
        model: has the weights.
        sites: in graph order, so that sites on one input follow one another.
        bundles: of these sites.
        moments: per site name; emptied on the way, to free the memory.
        metric: makes a quadratic form of moments.
        damping: of the input and of the output factor.
        tick: called after every site.

    Raises:
        ValueError: a weight or a factor is not finite.
    """
    found: dict[str, Decomposed] = {}
    joint: dict[str, Decomposed] = {}
    idle: list[str] = []
    whiteners = Whiteners(damping)
    waiting = {site.name: bundle for bundle in bundles for site in bundle.sites}
    parts: dict[str, Quadratic] = {}  # of sites whose bundle is not complete yet
    for site in sites:
        own = quadratic(metric, site.shape, moments.pop(site.name), whiteners)
        weight = canonical_weight(model.get_submodule(site.name)).detach()
        target = Target(weight, own)
        losses = {name: form.losses(target, site.ranks(name)) for name, form in site.forms.items()}
        target.truncations()  # for reports, whatever view the forms have
        again = any(type(form).factors is not Form.factors for form in site.forms.values())
        found[site.name] = Decomposed(target if again else target.without_metric(), losses)
        if own.null:
            idle.append(site.name)
        bundle = waiting.get(site.name)
        if bundle is not None:
            parts[site.name] = own
            if all(member.name in parts for member in bundle.sites):
                those = [parts.pop(member.name) for member in bundle.sites]
                if not any(part.null for part in those):
                    joint[bundle.name] = _decompose_bundle(model, bundle, those)
        tick()
    return Decomposition(found, joint, tuple(idle))


def _decompose_bundle(
    model: nn.Module, bundle: SiteBundle, parts: Sequence[Quadratic]
) -> Decomposed:
    weights = [canonical_weight(model.get_submodule(s.name)).detach() for s in bundle.sites]
    rows = [len(weight) for weight in weights]
    together = stacked(parts, rows)
    target = Target(torch.cat(weights), together)
    found = target.truncations()
    losses = {name: found.losses(bundle.ranks(name)) for name in bundle.forms}
    return Decomposed(target.without_metric(), losses, shares(together, target, rows))
