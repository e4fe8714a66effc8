"""Carry out a plan on a model: what ``compile`` and ``load`` have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx, nn

from fxcompress.forms import JointBody, LinearShape, find_form, find_joint_form
from fxcompress.plan import Plan, SitePlan
from fxcompress.rewrite.attention import expand_attention
from fxcompress.rewrite.fast_paths import disable_fast_paths
from fxcompress.rewrite.lift import lift
from fxcompress.rewrite.shape import linear_shape
from fxcompress.rewrite.skeleton import prepared
from fxcompress.rewrite.substitute import Provenance, substitute, substitute_joint


@dataclass(frozen=True, eq=False)
class Bodies:
    """What takes the place of the sites of a plan.

    Attributes:
        single: by site name.
        joint: by the name of the bundle.
    """

    single: Mapping[str, fx.GraphModule]
    joint: Mapping[str, JointBody]


def empty_bodies(plan: Plan, device: torch.device) -> Bodies:
    """Bodies without values, for a state dict to be loaded into."""
    single = {}
    for site in plan.rewritten:
        if not site.bundle:
            form, rank = site.choice
            single[site.name] = find_form(form, plan.templates).empty(_shape_of(site, device), rank)
    joint = {}
    for name, sites in plan.bundles.items():
        form, rank = sites[0].choice
        shapes = [_shape_of(site, device) for site in sites]
        joint[name] = find_joint_form(form, plan.templates).empty(shapes, rank)
    return Bodies(single, joint)


def apply_plan(model: nn.Module, plan: Plan, bodies: Bodies) -> None:
    """Substitute every rewritten site of ``plan`` by its body; changes ``model``.

    Args:
        model: with the structure that the plan was made for.
        plan: says which sites are rewritten, and how.
        bodies: filled or empty.
    """
    names = [site.name for site in plan.rewritten]
    expand_attention(model, above=names)
    if isinstance(model, fx.GraphModule):
        lift(model, only=names)
    for site in plan.rewritten:
        if not site.bundle:
            form = find_form(site.choice[0], plan.templates)
            substitute(model, bodies.single[site.name], form, _origin(site))
    for name, sites in plan.bundles.items():
        joint = find_joint_form(sites[0].choice[0], plan.templates)
        substitute_joint(model, bodies.joint[name], joint, [_origin(site) for site in sites])
    disable_fast_paths(model, names)


def _shape_of(site: SitePlan, device: torch.device) -> LinearShape:
    """The shape of a site as its plan has it."""
    dtype = getattr(torch, site.dtype)
    return LinearShape(site.in_features, site.out_features, site.bias, dtype, device)


def _origin(site: SitePlan) -> Provenance:
    form, rank = site.choice
    return Provenance(site.rule, site.location, site.name, form, rank)


def mismatches(model: nn.Module, plan: Plan) -> str:
    """How ``model`` differs from what the plan was made for; empty if every site is there."""
    reference = prepared(model)  # sites are named in this tree
    problems = []
    for site in plan.rewritten:
        try:
            shape = linear_shape(reference.get_submodule(site.name))
        except (AttributeError, ValueError):  # nothing of that name, or not a matrix
            problems.append(f"it has no linear layer {site.name}")
            continue
        found = _describe(shape.in_features, shape.out_features, shape.bias)
        wanted = _describe(site.in_features, site.out_features, site.bias)
        if found != wanted:
            problems.append(f"{site.name} is {found}, the plan has {wanted}")
    more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
    return "; ".join(problems[:5]) + more


def _describe(n: int, m: int, bias: bool) -> str:
    return f"linear {n}→{m}{'' if bias else ' without bias'}"
