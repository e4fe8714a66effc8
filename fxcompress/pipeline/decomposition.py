"""The stage between calibration and budget: every weight approximated in its metric.

Sites are gone through in graph order, and what is large (moments, whiteners) is given up as
soon as the sites that need it are done.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from fxcompress.forms import Form, Target
from fxcompress.forms.target import Losses, Quadratic
from fxcompress.metric import Metric, Moments
from fxcompress.metric.directions import Components, components, remeasured
from fxcompress.metric.quadratic import Whiteners, quadratic, shares, stacked
from fxcompress.operators.modules import canonical_weight
from fxcompress.pipeline.sites import Site, SiteBundle


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
        idle: names of sites without a measured influence on the output.
    """

    sites: Mapping[str, Decomposed]
    bundles: Mapping[str, Decomposed]
    idle: tuple[str, ...]


def decompose_sites(
    model: nn.Module,
    sites: Sequence[Site],
    bundles: Sequence[SiteBundle],
    metric_of: Callable[[Site], Quadratic],
    tick: Callable[[], None] = lambda: None,
) -> Decomposition:
    """Approximate every site and every bundle, and ask their forms what they would lose.

    Args:
        model: has the weights.
        sites: in graph order, so that sites on one input follow one another.
        bundles: of these sites.
        metric_of: the metric at a site, asked for once.
        tick: called after every site.

    Raises:
        ValueError: a weight or a factor is not finite.
    """
    found: dict[str, Decomposed] = {}
    joint: dict[str, Decomposed] = {}
    idle: list[str] = []
    waiting = {site.name: bundle for bundle in bundles for site in bundle.sites}
    parts: dict[str, Quadratic] = {}  # of sites whose bundle is not complete yet
    for site in sites:
        own = metric_of(site)
        found[site.name] = decompose_site(model, site, own)
        if own.null:
            idle.append(site.name)
        bundle = waiting.get(site.name)
        if bundle is not None:
            parts[site.name] = own
            if all(member.name in parts for member in bundle.sites):
                those = [parts.pop(member.name) for member in bundle.sites]
                if not any(part.null for part in those):
                    together = stacked(those, [member.out_features for member in bundle.sites])
                    joint[bundle.name] = decompose_bundle(model, bundle, together)
        tick()
    return Decomposition(found, joint, tuple(idle))


def metric_from(
    moments: dict[str, Moments], metric: Metric, damping: tuple[float, float]
) -> Callable[[Site], Quadratic]:
    """The metric at each site, made of its moments.

    Args:
        moments: per site name; emptied on the way, to free the memory.
        metric: makes a quadratic form of moments.
        damping: of the input and of the output factor.
    """
    whiteners = Whiteners(damping)

    def metric_of(site: Site) -> Quadratic:
        return quadratic(metric, site.shape, moments.pop(site.name), whiteners)

    return metric_of


def decompose_site(model: nn.Module, site: Site, metric: Quadratic) -> Decomposed:
    """Approximate the weight of one site.

    Args:
        model: has the weight.
        site: with the forms that are asked.
        metric: at the site.

    Raises:
        ValueError: the weight is not finite.
    """
    weight = canonical_weight(model.get_submodule(site.name)).detach()
    target = Target(weight, metric)
    losses = {name: form.losses(target, site.ranks(name)) for name, form in site.forms.items()}
    target.truncations()  # for reports, whatever view the forms have
    again = any(type(form).factors is not Form.factors for form in site.forms.values())
    return Decomposed(target if again else target.without_metric(), losses)


def decompose_bundle(model: nn.Module, bundle: SiteBundle, metric: Quadratic) -> Decomposed:
    """Approximate the weights of a bundle, stacked.

    Args:
        model: has the weights.
        bundle: of the sites.
        metric: of the stacked weight (:func:`fxcompress.metric.quadratic.stacked`).

    Raises:
        ValueError: a weight is not finite.
    """
    weights = [canonical_weight(model.get_submodule(s.name)).detach() for s in bundle.sites]
    rows = [len(weight) for weight in weights]
    target = Target(torch.cat(weights), metric)
    found = target.truncations()
    losses = {name: found.losses(bundle.ranks(name)) for name in bundle.forms}
    return Decomposed(target.without_metric(), losses, shares(metric, target, rows))


def wanted_directions(
    decomposition: Decomposition, sites: Sequence[Site], bundles: Sequence[SiteBundle]
) -> dict[str, dict[str, Components]]:
    """Components to measure, by site and by view; those of a bundle by its name, row by row."""
    wanted: dict[str, dict[str, Components]] = {}
    for site in sites:
        views = decomposition.sites[site.name].target.views
        found = {view: components(each) for view, each in views.items()}
        wanted[site.name] = {view: each for view, each in found.items() if each is not None}
    for bundle in bundles:
        if bundle.name in decomposition.bundles:
            whole = components(decomposition.bundles[bundle.name].target.truncations())
            assert whole is not None
            start = 0
            for site in bundle.sites:
                wanted[site.name][bundle.name] = whole.rows(start, site.out_features)
                start += site.out_features
    return wanted


def with_directions(
    decomposition: Decomposition,
    sites: Sequence[Site],
    bundles: Sequence[SiteBundle],
    energies: Mapping[tuple[str, str], Tensor],
) -> Decomposition:
    """The same with losses that were measured along the components.

    Forms with a projection of their own keep the loss that they were given.

    Args:
        energies: (site, view or name of a bundle) -> ``E[⟨∇W, c_i⟩²]`` of each component (g x k).
    """
    found = dict(decomposition.sites)
    for site in sites:
        before = found[site.name]
        views = {
            view: remeasured(each, energies[site.name, view])
            if (site.name, view) in energies
            else each
            for view, each in before.target.views.items()
        }
        target = Target(before.target.weight, before.target.quadratic, views)
        losses = {
            name: form.losses(target, site.ranks(name))
            if type(form).losses is Form.losses
            else before.losses[name]
            for name, form in site.forms.items()
        }
        found[site.name] = Decomposed(target, losses)
    joint = dict(decomposition.bundles)
    for bundle in bundles:
        if bundle.name in joint:
            before = joint[bundle.name]
            # Operators are taken as independent, as they are for the choice of components.
            parts = [energies[site.name, bundle.name][0] for site in bundle.sites]
            order = torch.argsort(torch.stack(parts).sum(0), descending=True, stable=True)
            measured = remeasured(before.target.truncations(), torch.stack(parts).sum(0)[None])
            target = Target(before.target.weight, None, {"matrix": measured})
            losses = {name: measured.losses(bundle.ranks(name)) for name in bundle.forms}
            shares = partial(_tails, torch.stack([part[order] for part in parts]))
            joint[bundle.name] = Decomposed(target, losses, shares)
    return Decomposition(found, joint, decomposition.idle)


def _tails(energies: Tensor, rank: int) -> Tensor:
    return energies[:, rank:].sum(1)
