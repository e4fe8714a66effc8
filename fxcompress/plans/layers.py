"""What a body consists of, for reports: its layers, and the functions between them."""

from __future__ import annotations

from torch import fx, nn

from fxcompress.forms import ConvShape, JointBody
from fxcompress.operators.modules import shape_of
from fxcompress.plans.plan import Part


def layers(body: fx.GraphModule, prefix: str = "") -> tuple[Part, ...]:
    """The operators of a body in the order in which they run.

    Args:
        body: the fx graph of a form.
        prefix: of the paths, ``"shared."``.
    """
    parts = []
    for node in body.graph.nodes:
        if node.op == "call_module":
            module = body.get_submodule(node.target)
            path = f"{prefix}{node.target}"
            parts.append(_layer(path, module))
        elif node.op == "call_function":
            parts.append(Part(path="", op=node.target.__name__))
        elif node.op == "call_method":
            parts.append(Part(path="", op=node.target))
    return tuple(parts)


def joint_layers(body: JointBody) -> list[tuple[Part, ...]]:
    """The operators of each member of a body; what is shared stands with the first."""
    shared = layers(body.shared, "shared.")
    heads = [layers(head) for head in body.heads]
    return [(*shared, *heads[0]), *heads[1:]]


def _layer(path: str, module: nn.Module) -> Part:
    try:
        shape = shape_of(module)
    except ValueError:
        return Part(path=path, op=type(module).__name__)
    kernel = shape.kernel_size if isinstance(shape, ConvShape) else ()
    n, m = shape.in_features, shape.out_features
    return Part(path=path, op=shape.op, in_features=n, out_features=m, kernel=kernel)
