"""The stage between calibration and budget: every weight approximated in its metric.

Sites are gone through in graph order, and what is large (moments, whiteners) is given up as
soon as the sites that need it are done.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fxcompress.forms import Shape, Target
from fxcompress.forms.narrow import narrowed, rows_of
from fxcompress.forms.target import (
    Components,
    Halved,
    Losses,
    Rank,
    Spectrum,
    Truncations,
    View,
)
from fxcompress.metric import Metric, Moments, QuadraticForm
from fxcompress.metric.kronecker import tails
from fxcompress.metric.whiten import Whiteners
from fxcompress.pipeline.sites import Group, Site, decoded


@dataclass(frozen=True, eq=False)
class Decomposed:
    """One site, or several stacked to one, in their metric.

    Attributes:
        target: the weight, (m x n) or (Σm x n), or that of a convolution, and its metric if a form
            will ask for it again.
        losses: form -> predicted loss at each rank that is permitted; infinite where it is not
            offered.
        parts: of several sites, the loss of each at a rank, up to a common factor.
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
        groups: by name; without those of several sites of which one has no influence on the
            output.
        idle: names of sites without a measured influence on the output.
    """

    groups: Mapping[str, Decomposed]
    idle: tuple[str, ...]


def decompose_groups(
    model: nn.Module,
    groups: Sequence[Group],
    metric_of: Callable[[Site], QuadraticForm],
    park: Callable[[Any], Any] = lambda found: found,
    tick: Callable[[], None] = lambda: None,
) -> Decomposition:
    """Approximate the weights of every group, and ask their forms what they would lose.

    Args:
        model: has the weights.
        groups: a single one for each site, in graph order, so that sites on one input follow one
            another; then those of several sites.
        metric_of: the metric at a site, asked for once.
        park: puts what is not needed for now where it takes no memory.
        tick: called after every site.

    Raises:
        ValueError: a weight or a factor is not finite.
    """
    found: dict[str, Decomposed] = {}
    idle: list[str] = []
    several = [group for group in groups if len(group.sites) > 1 and not group.hidden]
    hidden = {group.sites[-1].name: group for group in groups if group.hidden}
    waiting = {site.name: each for each in several for site in each.sites}
    parts: dict[str, QuadraticForm] = {}  # of sites whose group is not complete yet
    around: dict[str, QuadraticForm] = {}  # of the producers of hidden values whose consumer is not
    producers = {s.name for g in hidden.values() if g.narrowed for s in g.sites[:-1]}
    for single in groups:
        if len(single.sites) > 1:
            continue
        (site,) = single.sites
        own = metric_of(site)
        found[site.name] = park(decompose(model, single, own))
        if own.null:
            idle.append(site.name)
        if site.name in producers:
            around[site.name] = park(own)
        value = hidden.get(site.name)
        if value is not None and (not own.null or value.match.limits.unmeasured):
            found[value.name] = park(decompose(model, value, own))
            if value.narrowed:
                metrics = [around.pop(each.name) for each in value.sites[:-1]]
                found |= decompose_narrowed(value, found[value.name], [*metrics, own], park)
        if (joint := waiting.get(site.name)) is not None:
            parts[site.name] = park(own)
            if all(member.name in parts for member in joint.sites):
                together = stacked(joint, parts)
                if together is not None:
                    found[joint.name] = park(decompose(model, joint, together))
                for member in joint.sites:
                    del parts[member.name]
        tick()
    return Decomposition(found, tuple(idle))


def stacked(group: Group, metrics: Mapping[str, QuadraticForm]) -> QuadraticForm | None:
    """The metric of the stacked weights of several sites on one input.

    None if one of them has no influence, or the metric cannot be that of several weights.  What
    counts for a hidden value is the metric at its consumer.

    Args:
        group: of the sites.
        metrics: by site name.
    """
    if group.hidden:
        last = metrics[group.sites[-1].name]
        return None if last.null else last
    parts = [metrics[site.name] for site in group.sites]
    return None if any(part.null for part in parts) else parts[0].stacked(parts, group.rows)


def metric_from(
    moments: dict[str, Moments], metric: Metric, damping: tuple[float, float]
) -> Callable[[Site], QuadraticForm]:
    """The metric at each site, made of its moments.

    Args:
        moments: per site name; emptied on the way, to free the memory.
        metric: makes a quadratic form of moments.
        damping: of the input and of the output factor.
    """
    whiteners = Whiteners(damping)

    def metric_of(site: Site) -> QuadraticForm:
        return metric.quadratic(site.shape, moments.pop(site.name), whiteners)

    return metric_of


def decompose(model: nn.Module, group: Group, metric: QuadraticForm) -> Decomposed:
    """Approximate the weights of a group, stacked if they are several.

    Args:
        model: has the weights.
        group: with the forms that are asked.
        metric: at the site, or of the stacked weight (:func:`stacked`).

    Raises:
        ValueError: a weight is not finite.
    """
    weights = [site.weight_in(model) for site in group.sites]
    if group.hidden:
        *makers, weight = weights
        pairs = zip(group.sites, makers, strict=False)
        producers = tuple(site.shape.by_outputs(made) for site, made in pairs)
        target = Target(weight, metric, producers=producers)
        losses = _losses(group, target)
        of_last = torch.tensor([*(0.0 for _ in makers), 1.0], dtype=torch.float64)
        return Decomposed(target.without_metric(), losses, lambda rank: of_last)
    target = Target(weights[0] if len(weights) == 1 else torch.cat(weights), metric)
    losses = _losses(group, target)
    whole = target.truncations()  # for reports, whatever view the forms have
    parts = metric.shares(target.weight, whole, group.rows) if len(weights) > 1 else None
    again = any(form.projects for form in group.forms.values())
    return Decomposed(target if again else target.without_metric(), losses, parts)


def decompose_narrowed(
    hidden: Group,
    decomposed: Decomposed,
    metrics: Sequence[QuadraticForm],
    park: Callable[[Any], Any] = lambda found: found,
) -> dict[str, Decomposed]:
    """Approximate what is left of the operators around a hidden value, at every width offered.

    The consumer reads the least-squares estimate of the whole from the channels that are kept. Its
    error is orthogonal to them: what a change of it loses adds to what narrowing loses.

    Args:
        hidden: the group.
        decomposed: of it.
        metrics: at its sites.
        park: puts what is not needed for now where it takes no memory.

    Returns:
        By the names of the groups of :attr:`Group.narrowed`; without those that cannot be said
        anything of.
    """
    found: dict[str, Decomposed] = {}
    if any(metric.null for metric in metrics):
        return found
    for left in hidden.narrowed:
        to = left[0].narrowing
        assert to is not None
        kept, weights = narrowed_weights(hidden, decomposed.target, to.form, to.width)
        for member, (group, metric, weight) in enumerate(zip(left, metrics, weights, strict=True)):
            last = member == len(left) - 1
            shape = hidden.shapes[member]
            rows = rows_of(kept, shape.out_features, hidden.shapes[-1].in_features)
            inputs = _patches(kept, shape)
            own = metric.restricted(inputs=inputs) if last else metric.restricted(rows=rows)
            if own is None or not group.forms:
                continue
            target = Target(weight, own)
            losses = _losses(group, target)
            if not any(form.projects for form in group.forms.values()):
                again = partial(
                    _narrowed_weight, hidden, decomposed.target, to.form, to.width, member
                )
                target = Target(weight.to("meta"), None, _halved(target, again))
            found[group.name] = park(Decomposed(target, losses))
    return found


def _patches(channels: Tensor, shape: Shape) -> Tensor:
    """The places of some channels in the inputs of an operator, every tap of a convolution."""
    taps = math.prod(shape.kernel_size)
    return (channels[:, None] * taps + torch.arange(taps, device=channels.device)).flatten()


def narrowing_loss(hidden: Group, decomposed: Decomposed, form: str, width: int) -> float:
    """Predicted loss of a hidden value with one of the numbers of channels that are permitted."""
    return float(decomposed.losses[form][hidden.ranks(form).tolist().index(width)])


def narrowed_weights(
    hidden: Group, target: Target, form: str, width: int
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The channels of a hidden value that are kept (k), and the weights of every site for these."""
    kept, refitted, *rows = hidden.forms[form].factors(target, width)
    smaller = zip(narrowed(hidden.shapes, width), rows, strict=False)
    return kept.to(torch.int64), (*(shape.of_outputs(part) for shape, part in smaller), refitted)


def widened(hidden: Group, member: int, kept: Tensor, weight: Tensor, dense: Tensor) -> Tensor:
    """The weight of an operator around a hidden value with all its channels, given that of some.

    A producer has its other rows as they were, a consumer reads zeros there.

    Args:
        hidden: the group.
        member: place of the operator in it.
        kept: the channels (k).
        weight: of these.
        dense: with all of them.
    """
    wide, shape = dense.to(weight.dtype, copy=True), hidden.shapes[member]
    if member == len(hidden.sites) - 1:
        return torch.zeros_like(wide).index_copy(shape.in_axis, kept, weight)
    rows = narrowed(hidden.shapes, len(kept))[member].by_outputs(weight)
    places = rows_of(kept, shape.out_features, hidden.shapes[-1].in_features)
    return shape.of_outputs(shape.by_outputs(wide).index_copy(0, places, rows))


def weight_left(
    model: nn.Module,
    hidden: Group,
    decomposition: Decomposition,
    left: Group,
    form: str | None,
    rank: Rank | None,
) -> Tensor | None:
    """The weight of an operator around a narrowed hidden value, given a form for what is left.

    It has all channels (:func:`widened`), float64; None for a producer that has fewer rows and is
    the same otherwise.

    Args:
        model: has the weights.
        hidden: the group that is narrowed.
        decomposition: of it, and of what it leaves.
        left: what it leaves of the operator.
        form: None for none.
        rank: of the form, as the solver has it.
    """
    place = left.narrowing
    assert place is not None
    target = decomposition.groups[hidden.name].target
    kept, weights = narrowed_weights(hidden, target, place.form, place.width)
    weight = weights[place.member].to(torch.float64)
    if form is not None and isinstance(rank, int):
        own = left.forms[form]
        decided = decoded(own.full_rank(), rank)
        (found,) = left.approximated(form, decomposition.groups[left.name].target, decided)
        assert found is not None
        weight = found
    elif place.member < len(hidden.sites) - 1:
        return None
    dense = hidden.sites[place.member].weight_in(model)
    return widened(hidden, place.member, kept, weight, dense)


def _narrowed_weight(hidden: Group, target: Target, form: str, width: int, member: int) -> Tensor:
    return narrowed_weights(hidden, target, form, width)[1][member].to(torch.float64)


def _halved(target: Target, weight: Callable[[], Tensor]) -> dict[View, Truncations]:
    """Decompositions in less memory, where that is possible."""
    return {
        view: Halved.of(found, weight) if isinstance(found, Spectrum) else found
        for view, found in target.views.items()
    }


def _losses(
    group: Group, target: Target, told: Mapping[str, Losses] = MappingProxyType({})
) -> dict[str, Losses]:
    """What every form loses at its ranks; one that has none, or told it before, is not asked."""
    found = dict(told)
    for name, form in group.forms.items():
        if name not in found:
            ranks = group.ranks(name)
            found[name] = form.losses(target, ranks) if len(ranks) else np.empty(0)
    return found


def wanted_directions(
    decomposition: Decomposition, groups: Sequence[Group]
) -> dict[str, dict[str, Components]]:
    """Components to measure, by site and by view; those of several sites by their group's name.

    Each of several sites has its own rows of the stacked components.
    """
    wanted: dict[str, dict[str, Components]] = {}
    for group in groups:
        if group.name not in decomposition.groups or group.hidden:
            continue
        target = decomposition.groups[group.name].target
        if len(group.sites) == 1:
            found = {view: each.components() for view, each in target.views.items()}
            wanted[group.name] = {view: each for view, each in found.items() if each is not None}
            continue
        whole = target.truncations().components()
        assert whole is not None
        start = 0
        for site in group.sites:
            wanted[site.name][group.name] = whole.rows(start, site.out_features)
            start += site.out_features
    return wanted


def with_directions(
    decomposition: Decomposition,
    groups: Sequence[Group],
    energies: Mapping[tuple[str, str], Tensor],
) -> Decomposition:
    """A decomposition with losses that were measured along the components.

    Forms with a projection of their own keep the loss that they were given.

    Args:
        decomposition: with the losses that the factors of the metric predict.
        groups: that it is of.
        energies: (site, view or name of a group) -> ``E[⟨∇W, c_i⟩²]`` of each component (g x k).
    """
    found = dict(decomposition.groups)
    for group in groups:
        if group.name not in found or group.hidden:
            continue
        before = found[group.name]
        views, quadratic, parts = dict(before.target.views), before.target.quadratic, before.parts
        if len(group.sites) == 1:
            for view, each in views.items():
                if (group.name, view) in energies:
                    views[view] = each.remeasured(energies[group.name, view])
        else:
            # Operators are taken as independent, as they are for the choice of components.
            each_site = torch.stack([energies[site.name, group.name][0] for site in group.sites])
            order = torch.argsort(each_site.sum(0), descending=True, stable=True)
            views = {"matrix": before.target.truncations().remeasured(each_site.sum(0)[None])}
            quadratic, parts = None, partial(tails, each_site[:, order])
        target = Target(before.target.weight, quadratic, views)
        told = {name: before.losses[name] for name, form in group.forms.items() if form.predicts}
        losses = _losses(group, target, told)
        found[group.name] = Decomposed(target, losses, parts)
    return Decomposition(found, decomposition.idle)
