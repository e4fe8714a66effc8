"""Closed-form correction: weights fitted to the inputs that they really get.

A layer of the compressed model sees x', where the dense one saw x.  The weight that comes closest
to the dense layer's outputs on x' is, with ``C = E[x x'ᵀ]`` and ``A' = E[x' x'ᵀ]``,

    Z = argmin E ‖W x - Z x'‖²  =  W C A'⁻¹,

and the best one of rank r its truncation in A' ⊗ G (AA-SVD and SAES have it for G = 1), as is that
of any other form.  A' is damped towards the weight as it is, so that directions without data stay.
A weight that reads k channels of a narrowed value is fitted to these; the weights that produce the
value have no fewer inputs than before, so that theirs fit as they are.

All layers are fitted at once, each to inputs from before the correction.  That counts errors twice:
a layer makes up for those of the layers before it, which are about to make up for them
themselves.  In a deep model the full step does great harm for that reason, and a part of it does
much good, as a Jacobi iteration has to be damped where one of Gauss and Seidel need not be: hence
``share``, how much of the way is gone before the result is cut.  ``test_rounds.py`` has a network
of 24 blocks where the full step is rejected and a quarter is best; on SmolLM2 it is no different.
Fitting one layer after the other would take a pass over the data for each.

What gradient steps gain afterwards is largely the same gain: on SmolLM2 the correction is worth
about as much as the steps that fit into its time, and is for where nothing is to be trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fxcompress.forms.narrow import Narrow
from fxcompress.forms.target import Channels, Target, Truncations
from fxcompress.graph.inputs import Forward, run_model
from fxcompress.graph.padding import NONE, Padding, follow_padding
from fxcompress.isvt.threshold import Metrics, Thresholded
from fxcompress.metric.kronecker import Kronecker
from fxcompress.metric.masks import input_mask
from fxcompress.metric.scaled import normalized, times_power
from fxcompress.metric.visitor import InputKey, input_key
from fxcompress.metric.whiten import Whitener, whitener
from fxcompress.operators.applied import operator_at
from fxcompress.operators.modules import canonical_weight
from fxcompress.pipeline.decomposition import Decomposition, narrowed_weights
from fxcompress.pipeline.sites import Group, Site


@dataclass(frozen=True, eq=False)
class Crossed:
    """Moments of the inputs of layers in the dense and in the compressed model, by their source.

    Attributes:
        crossed: ``C = E[x x'ᵀ]`` (n x n), float64, in the units of the root.
        second: ``A' = E[x' x'ᵀ]`` (n x n), float64, likewise.
        roots: of A', damped.
    """

    crossed: Mapping[InputKey, Tensor]
    second: Mapping[InputKey, Tensor]
    roots: Mapping[InputKey, Whitener]


def correctable(sites: Sequence[Site], metrics: Metrics) -> list[Site]:
    """The linear sites whose metric is a Kronecker product.

    Args:
        sites: the matched ones.
        metrics: by site name.
    """
    return [
        site
        for site in sites
        if site.shape.takes == "rows"
        and metrics[site.name].factors is not None
        and not metrics[site.name].null
    ]


@torch.no_grad()
def cross_moments(
    dense: nn.Module,
    model: nn.Module,
    sites: Sequence[Site],
    batches: Iterable[Any],
    damping: float,
    forward: Forward | None,
    tick: Callable[[], None],
) -> Crossed:
    """Moments of what layers are given.

    Args:
        dense: the dense model, with a module for every site.
        model: the same with the weights as they are now.
        sites: whose inputs are looked at.
        batches: to take means over.
        damping: of A', relative to its mean eigenvalue.
        forward: how to call a model on a batch.
        tick: called after every batch.
    """
    crossed: dict[InputKey, Tensor] = {}
    second: dict[InputKey, Tensor] = {}
    count: dict[InputKey, int] = {}
    powers: dict[InputKey, int] = {}  # of two, out of inputs whose squares would overflow
    for batch in batches:
        pairs = []
        for each in (dense, model):
            with follow_padding(each, batch) as (copy, mask), _inputs(each, sites, mask) as seen:
                run_model(each, copy, forward)
            pairs.append(seen)
        for site in {input_key(site): site for site in sites}.values():
            key = input_key(site)
            for before, after in zip(pairs[0][key], pairs[1][key], strict=True):
                if key not in powers and bool(before.any()):
                    powers[key] = normalized(before)[1]
                shift = -powers.get(key, 0)
                before, after = times_power(before, shift), times_power(after, shift)
                n = before.shape[-1]
                zeros = torch.zeros(n, n, dtype=torch.float64, device=before.device)
                crossed[key] = crossed.get(key, zeros) + (before.T @ after)
                second[key] = second.get(key, zeros) + (after.T @ after)
                count[key] = count.get(key, 0) + len(after)
        tick()
    means = {key: value / count[key] for key, value in second.items()}
    return Crossed(
        {key: value / count[key] for key, value in crossed.items()},
        means,
        {key: whitener(mean, damping, 2.0 ** powers.get(key, 0)) for key, mean in means.items()},
    )


@torch.no_grad()
def fitted(
    dense: nn.Module,
    model: nn.Module,
    sites: Sequence[Site],
    metrics: Metrics,
    moments: Crossed,
    share: float = 1.0,
) -> dict[str, tuple[Tensor, Kronecker]]:
    """Weights (m x n) that fit, of full rank, and the metric ``A' ⊗ G`` to cut each in.

    Args:
        dense: the dense model, with a module for every site.
        model: the same with the weights as they are now.
        sites: the :func:`correctable` ones.
        metrics: by site name; their output factor is used.
        moments: of the inputs.
        share: of the way from the weight as it is to the one that fits.
    """
    found = {}
    for site in sites:
        key = input_key(site)
        inputs = moments.roots[key]
        factors = metrics[site.name].factors
        if inputs.null or factors is None:
            continue
        old = canonical_weight(operator_at(dense, site.name)).double()
        now = canonical_weight(operator_at(model, site.name)).double()
        # Damped towards the weight as it is: directions without data stay.
        change = (old @ moments.crossed[key] - now @ moments.second[key]) * share
        target = now + replace(inputs, unit=1.0).solve(change.T).T  # of quotients: without units
        found[site.name] = (target, Kronecker(inputs, factors.outputs))
    return found


@torch.no_grad()
def cut_again(
    cut: Thresholded, found: Mapping[str, tuple[Tensor, Kronecker]]
) -> Iterator[tuple[Site, Tensor]]:
    """Weights that fit, in the forms and at the ranks of a thresholding.

    Hidden values keep their channels; producers that have fewer rows and no other form fit whole.

    Args:
        cut: the thresholding.
        found: by site name, as of :func:`fitted`; of groups that are not there in full the weights
            are those of the thresholding.
    """
    analysis = cut.analysis
    groups = dict(analysis.decomposed.groups)
    narrowed: dict[str, Target | None] = {}
    for group, choice in cut.solution.decided(analysis.groups):
        place = group.narrowing
        whole = analysis.group(place.hidden) if place else group
        parts = [found[site.name] for site in whole.sites if site.name in found]
        form = place.form if place else choice.form
        if form is None or len(parts) < len(whole.sites):
            continue
        if not whole.hidden:
            groups[group.name] = replace(groups[group.name], target=_together(group, parts))
            continue
        if whole.name not in narrowed:
            old = analysis.decomposed.groups[whole.name].target
            narrowed[whole.name] = _narrowed(whole, form, old, parts)
        target = narrowed[whole.name]
        if target is None:
            continue
        groups[whole.name] = replace(groups[whole.name], target=target)
        last = len(parts) - 1
        if place and choice.form is not None:
            kept, weights = narrowed_weights(whole, target, form, place.width)
            own = parts[place.member][1].restricted(
                **{"inputs" if place.member == last else "rows": kept}
            )
            left = Target(weights[place.member], own)
            groups[group.name] = replace(groups[group.name], target=left)
            continue
        for member in [place.member] if place else range(last):
            if member < last:
                yield whole.sites[member], parts[member][0]
    fitting = Decomposition(groups, analysis.decomposed.idle)
    yield from replace(cut, analysis=replace(analysis, decomposed=fitting)).weights()


def _together(group: Group, parts: Sequence[tuple[Tensor, Kronecker]]) -> Target:
    """Weights that fit, stacked if they are several, and their metric."""
    weights, metrics = zip(*parts, strict=True)
    if len(parts) == 1:
        return Target(weights[0], metrics[0])
    return Target(torch.cat(weights), Kronecker.stacked(metrics, group.rows))


def _narrowed(
    group: Group, name: str, old: Target, parts: Sequence[tuple[Tensor, Kronecker]]
) -> Target | None:
    """Weights that fit around a hidden value, which keeps the channels that a form chose of it."""
    form = group.forms[name].form
    assert isinstance(form, Narrow)
    channels = form.truncations(old)
    if not isinstance(channels, Channels):
        return None
    *producers, (weight, metric) = parts
    kept: dict[str, Truncations] = {form.name: metric.channels(weight, channels.order)}
    return Target(weight, metric, producers=tuple(one for one, _ in producers), chosen=kept)


@contextmanager
def _inputs(
    model: nn.Module, sites: Sequence[Site], mask: Padding = NONE
) -> Iterator[dict[InputKey, list[Tensor]]]:
    """Rows that the first site of each source is called with, call by call, without padding."""
    seen: dict[InputKey, list[Tensor]] = {}
    handles = []

    def hook(key: InputKey, site: Site) -> Any:
        def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
            value = args[0] if args else next(iter(kwargs.values()))
            with mask.paused():
                real = input_mask(mask, site, value, value)
                seen.setdefault(key, []).extend(site.shape.input_rows(value, real))

        return keep

    for key, site in {input_key(site): site for site in reversed(sites)}.items():
        module = operator_at(model, site.name)
        handles.append(module.register_forward_pre_hook(hook(key, site), with_kwargs=True))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
