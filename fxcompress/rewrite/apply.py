"""Carry out a plan on a model: what ``compile`` and ``load`` have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fxcompress.forms import Body, Shape, find_form, fit
from fxcompress.graph.canonical import canonicalize
from fxcompress.operators.applied import operator_at
from fxcompress.operators.modules import kind_of, shape_of
from fxcompress.operators.per_channel import per_channel
from fxcompress.plans.layers import left
from fxcompress.plans.plan import Folded, Plan, SitePlan
from fxcompress.rewrite.applied import hold_planned
from fxcompress.rewrite.attention import expand_attention
from fxcompress.rewrite.batch_norm import fold_batch_norms
from fxcompress.rewrite.facade import Factorized
from fxcompress.rewrite.fast_paths import disable_fast_paths
from fxcompress.rewrite.lift import lift
from fxcompress.rewrite.skeleton import prepared
from fxcompress.rewrite.substitute import Provenance, substitute, substituting

Bodies = Mapping[str, Body]
"""What takes the place of the sites of a plan, by the name of their group.

What a narrowed hidden value leaves of a site and takes another form has that by the site's name.
"""


def empty_bodies(
    plan: Plan, model: nn.Module, device: torch.device | None = None
) -> dict[str, Body]:
    """Bodies without values, for a state dict to be loaded into.

    Args:
        plan: that fits the model (:func:`mismatches`).
        model: as it was before the rewrite; says what shapes, types and devices are.
        device: in the place of the model's; on the meta device bodies take no memory.
    """
    reference = _reference(model, plan)

    def shape(site: SitePlan) -> Any:
        found = shape_of(operator_at(reference, site.name))
        where = found.device if device is None else device
        return replace(found, dtype=getattr(torch, site.dtype), device=where)

    bodies = {}
    for name, sites in plan.groups.items():
        form, rank = sites[0].choice
        found = find_form(form, sites[0].op, plan.templates)
        fitted = fit(found, [shape(site) for site in sites], order=sites[0].own_order)
        bodies[name] = fitted.empty(rank)
        for site in sites:
            if site.then is not None:
                bodies[site.name] = left(site, plan, fitted).empty(site.then.rank)
    return bodies


def apply_plan(model: nn.Module, plan: Plan, bodies: Bodies) -> None:
    """Substitute every rewritten site of ``plan`` by its body; changes ``model``.

    Args:
        model: with the structure that the plan was made for.
        plan: says which sites are rewritten, and how.
        bodies: filled or empty.
    """
    names = [site.name for site in plan.rewritten]
    hold_planned(model, plan.sites, {*names, *(pair.convolution for pair in plan.folded)})
    fold_batch_norms(model, plan.folded)
    expand_attention(model, above=names)
    if isinstance(model, fx.GraphModule):
        lift(model, only=names)
    with substituting(model) as places:
        for name, sites in plan.groups.items():
            form = find_form(sites[0].choice[0], sites[0].op, plan.templates)
            held = [each.name for each in sites[-1].held]
            substitute(model, bodies[name], form, [_origin(site) for site in sites], places, held)
            for site in sites:
                if site.then is not None:
                    form = find_form(site.then.form, site.op, plan.templates)
                    origin = replace(_origin(site), form=site.then.form, rank=site.then.rank)
                    substitute(model, bodies[site.name], form, [origin], places)
    disable_fast_paths(model, names)


def _origin(site: SitePlan) -> Provenance:
    form, rank = site.choice
    return Provenance(site.rule, site.location, site.name, form, rank)


def mismatches(model: nn.Module, plan: Plan) -> str:
    """How ``model`` differs from what the plan was made for; empty if every site is there."""
    reference = prepared(model)
    if problems := hold_planned(reference, plan.sites):
        return _told(problems)
    problems = [
        f"it has no batch norm {pair.norm} after a convolution {pair.convolution}"
        for pair in plan.folded
        if not _foldable(reference, pair)
    ]
    if problems:
        return _told(problems)
    fold_batch_norms(reference, plan.folded)
    places: dict[nn.Module, str] = {}
    for site in plan.sites:
        try:
            module = operator_at(reference, site.name)
            shape = shape_of(module)
        except (AttributeError, ValueError):  # nothing of that name, or not a matrix
            problems.append(f"it has no {site.op} layer {site.name}")
            continue
        wanted = f"{site.operator}{'' if site.bias else WITHOUT_BIAS}"
        if describe(shape) != wanted:
            problems.append(f"{site.name} is {describe(shape)}, the plan has {wanted}")
        elif isinstance(module, Factorized) or canonicalize(module=module)["op"] != site.op:
            problems.append(f"{site.name} is a {type(module).__name__}, not a {site.op} layer")
        elif module in places:
            problems.append(f"{site.name} is the same layer as {places[module]}")
        elif (reason := _unfit(site, shape, plan)) or (reason := _not_held(reference, site)):
            problems.append(f"{site.name}: {reason}")
        places[module] = site.name
    if not problems and isinstance(reference, fx.GraphModule):
        problems = [
            f"the layers of {name} do not read the same values"
            for name, sites in plan.bundles.items()
            if len({_reads(reference, site.name) for site in sites}) > 1
        ]
    return _told(problems)


def _told(problems: list[str]) -> str:
    more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
    return "; ".join(problems[:5]) + more


def _unfit(site: SitePlan, shape: Any, plan: Plan) -> str | None:
    """Why a layer cannot take the form, where that is no matter of its sizes (``max_norm``)."""
    if site.form is None or site.bundle:
        return None
    return fit(find_form(site.form, site.op, plan.templates), [shape]).misfit()


def _not_held(model: nn.Module, site: SitePlan) -> str | None:
    """What has other entries of the channels that a site reads than the plan says."""
    for each in site.held:
        found = per_channel(model, each.name, site.in_features)
        if isinstance(found, str) or found.parameters != each.parameters:
            return f"{each.name} has no {each.parameters} parameters of each channel"
    return None


def _reads(model: fx.GraphModule, path: str) -> tuple[Any, ...]:
    """The value that each call of a module reads."""
    calls = (n for n in model.graph.nodes if n.op == "call_module" and n.target == path)
    return tuple((*node.args, *node.kwargs.values()) for node in calls)


def _reference(model: nn.Module, plan: Plan) -> nn.Module:
    """The tree in which the sites of a plan are named."""
    reference = prepared(model)
    hold_planned(reference, plan.sites)
    fold_batch_norms(reference, plan.folded)
    return reference


def _foldable(model: nn.Module, pair: Folded) -> bool:
    """Whether both modules of a pair are there, and fit each other."""
    try:
        convolution, norm = operator_at(model, pair.convolution), model.get_submodule(pair.norm)
    except AttributeError:
        return False
    return (
        (kind := kind_of(convolution)) is not None
        and kind.shape(convolution).takes == "patches"
        and isinstance(norm, _BatchNorm)
        and norm.running_mean is not None
        and norm.num_features == kind.shape(convolution).out_features
    )


WITHOUT_BIAS = " without bias"


def describe(shape: Shape) -> str:
    """An operator as messages name it: ``linear 8→4 without bias``."""
    return f"{shape}{'' if shape.bias else WITHOUT_BIAS}"
