"""Put a body in the place of an operator.

In an ``fx.GraphModule`` the matched nodes are replaced by the nodes of the body, *in its
graph*; in any other module the leaf is replaced by a facade that runs the same body.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import fx, nn

from fxcompress.forms import LinearShape
from fxcompress.graph.canonical import is_hf_conv1d
from fxcompress.rewrite.facade import Factorized
from fxcompress.rewrite.replace import replace_module


@dataclass(frozen=True)
class Provenance:
    """Where a new node comes from; stored in ``node.meta["fxcompress"]`` as a dict."""

    rule: str
    location: str
    site: str
    form: str
    rank: int


def linear_shape(module: nn.Module) -> LinearShape:
    """Shape, type and device of a linear module (``nn.Linear`` or Hugging Face's ``Conv1D``)."""
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    rows, columns = weight.shape
    n, m = (rows, columns) if is_hf_conv1d(module) else (columns, rows)
    bias = getattr(module, "bias", None) is not None
    return LinearShape(n, m, bias, weight.dtype, weight.device)


def substitute(model: nn.Module, body: fx.GraphModule, origin: Provenance) -> None:
    """Replace the operator at ``origin.site`` by ``body``; changes ``model``.

    Nodes of an fx graph keep the metadata of the node they replace (the last one also its
    value's), and all carry their :class:`Provenance`.
    """
    original = model.get_submodule(origin.site)
    for parameter in body.parameters():
        parameter.requires_grad_(any(p.requires_grad for p in original.parameters()))
    body.train(original.training)
    if isinstance(model, fx.GraphModule):
        calls = [n for n in model.graph.nodes if n.op == "call_module" and n.target == origin.site]
        if calls:
            replace_module(model, original, body)
            for node in calls:
                _inline(model.graph, node, body, origin)
            model.graph.lint()
            model.recompile()
            return
    facade = Factorized(original, body, origin.form, origin.rank, is_hf_conv1d(original))
    replace_module(model, original, facade)


def _inline(graph: fx.Graph, node: fx.Node, body: fx.GraphModule, origin: Provenance) -> None:
    """Replace one ``call_module`` node by the nodes of a body that hangs at the same path."""
    value = node.args[0] if node.args else next(iter(node.kwargs.values()))
    copies: dict[fx.Node, object] = {}
    provenance: dict[str, Any] = {"fxcompress": {**asdict(origin), "node": node.name}}
    stack: dict[str, Any] = {
        key: node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in node.meta
    }
    with graph.inserting_before(node):
        for inner in body.graph.nodes:
            if inner.op == "placeholder":
                copies[inner] = value
            elif inner.op == "output":
                result = copies[inner.args[0]]
                assert isinstance(result, fx.Node)
                result.meta = {**node.meta, **provenance}
                node.replace_all_uses_with(result)
            else:
                copy = graph.node_copy(inner, copies.__getitem__)  # type: ignore[arg-type]
                if inner.op in ("call_module", "get_attr"):
                    copy.target = f"{origin.site}.{inner.target}"
                copy.meta = {**stack, **provenance}
                copies[inner] = copy
    graph.erase_node(node)
