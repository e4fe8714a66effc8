"""What a body consists of, for reports: its layers, and the functions between them."""

from __future__ import annotations

import torch
from torch import fx, nn

from fxcompress.forms import Body
from fxcompress.forms.ordered import ordering
from fxcompress.operators.modules import shape_of
from fxcompress.plans.plan import Part


def layers(body: Body) -> list[tuple[Part, ...]]:
    """What each operator of a body consists of, in the order in which it runs.

    What is shared stands with the first, its paths below ``shared``.
    """
    if body.kept is not None:  # smaller layers of the same kind, in the places of these
        return [(_layer("", head.get_submodule("linear")),) for head in body.heads]
    shared = () if body.shared is None else _parts(body.shared, "shared.")
    heads = [_parts(head) for head in body.heads]
    return [(*shared, *heads[0]), *heads[1:]]


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
