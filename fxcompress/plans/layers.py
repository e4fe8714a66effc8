"""What a body consists of, for reports: its layers, and the functions between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import fx, nn

from fxcompress.forms import Body, Fitted, find_form, fit
from fxcompress.forms.narrow import narrowed
from fxcompress.forms.ordered import ordering
from fxcompress.operators.modules import shape_of
from fxcompress.plans.plan import Part, Plan, SitePlan


def layers(body: Body) -> list[tuple[Part, ...]]:
    """What each operator of a body consists of, in the order in which it runs.

    What is shared stands with the first, its paths below ``shared``.
    """
    if body.kept is not None:  # smaller layers of the same kind, in the places of these
        return [(_layer("", head.get_submodule("layer")),) for head in body.heads]
    shared = () if body.shared is None else _parts(body.shared, "shared.")
    heads = [_parts(head) for head in body.heads]
    return [(*shared, *heads[0]), *heads[1:]]


def left(site: SitePlan, plan: Plan, beside: Fitted) -> Fitted:
    """The form that a site takes beside a narrowing, for what that leaves of it.

    Args:
        site: of a hidden value that is narrowed.
        plan: that it is of.
        beside: the form of the hidden value.

    Raises:
        KeyError: there is no form of that name.
    """
    assert site.then is not None
    _, width, member = site.narrowing
    form = find_form(site.then.form, site.op, plan.templates)
    return fit(form, [narrowed(beside.shapes, width)[member]], order=site.order)


def site_layers(sites: Sequence[SitePlan], bodies: Mapping[str, Body]) -> list[tuple[Part, ...]]:
    """What each of the sites that are rewritten together consists of then.

    Args:
        sites: of one group.
        bodies: by the name of the group, and of a site that takes a form beside a narrowing.
    """
    parts = layers(bodies[sites[0].group])
    for index, site in enumerate(sites):
        if site.then is not None:
            (parts[index],) = layers(bodies[site.name])
    return parts


def _parts(graph: fx.GraphModule, prefix: str = "") -> tuple[Part, ...]:
    parts = []
    told = ordering(graph)  # by the order that the plan has
    for node in graph.graph.nodes:
        if node in told or node.target is torch.narrow:  # a view
            continue
        if node.op == "call_module":
            module = graph.get_submodule(node.target)
            path = f"{prefix}{node.target}"
            parts.append(_layer(path, module))
        elif node.op == "call_function":
            parts.append(Part(path="", op=node.target.__name__))
        elif node.op == "call_method":
            parts.append(Part(path="", op=node.target))
    return tuple(parts)


def _layer(path: str, module: nn.Module) -> Part:
    try:
        shape = shape_of(module)
    except ValueError:
        return Part(path=path, op=type(module).__name__)
    n, m, kernel = shape.in_features, shape.out_features, shape.kernel_size
    return Part(path=path, op=shape.op, in_features=n, out_features=m, kernel=kernel)
