"""Carry out a plan on a model: what ``compile`` and ``load`` have in common."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx, nn

from fxcompress.plan import Plan
from fxcompress.rewrite.attention import expand_attention
from fxcompress.rewrite.fast_paths import disable_fast_paths
from fxcompress.rewrite.lift import lift
from fxcompress.rewrite.skeleton import prepared
from fxcompress.rewrite.substitute import Provenance, linear_shape, substitute


def apply_plan(model: nn.Module, plan: Plan, bodies: Mapping[str, fx.GraphModule]) -> None:
    """Substitute every rewritten site of ``plan`` by its body; changes ``model``.

    Args:
        model: with the structure that the plan was made for.
        plan: says which sites are rewritten, and how.
        bodies: per site name, filled or empty.
    """
    sites = [site.name for site in plan.rewritten]
    expand_attention(model, above=sites)
    if isinstance(model, fx.GraphModule):
        lift(model, only=sites)
    for site in plan.rewritten:
        assert site.form is not None
        assert site.rank is not None
        origin = Provenance(site.rule, site.location, site.name, site.form, site.rank)
        substitute(model, bodies[site.name], origin)
    disable_fast_paths(model, sites)


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
