"""What nodes of a rewritten fx graph say of their values: ``meta["val"]`` and ``["tensor_meta"]``.

Passes over graphs of ``torch.export`` go by them, so new nodes have them wherever the nodes that
they read do.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.passes.shape_prop import _extract_tensor_metadata


def value_metas(body: fx.GraphModule, inputs: Sequence[fx.Node]) -> dict[fx.Node, dict[str, Any]]:
    """``val`` and ``tensor_meta`` of the nodes of a body, whichever the inputs have.

    Args:
        body: that is put into a graph.
        inputs: nodes of that graph that it reads.

    Returns:
        Node -> entries; nothing if an input has none.
    """
    keys = [key for key in ("val", "tensor_meta") if all(key in node.meta for node in inputs)]
    if not keys:
        return {}
    given = (node.meta.get("val") for node in inputs)
    modes = (value.fake_mode for value in given if isinstance(value, FakeTensor))
    mode = next(modes, None) or FakeTensorMode()
    seen = _Seen(_faked(mode, body))
    values = [_fake(mode, node) for node in inputs]
    with mode:
        try:
            seen.run(*values)
        except Exception:
            # An operator of a template that has no shapes without values: as before, it has none.
            return {}
    metas = {}
    for node in body.graph.nodes:
        value = seen.values.get(node.name)
        if isinstance(value, Tensor):
            both = {"val": value, "tensor_meta": _extract_tensor_metadata(value)}
            metas[node] = {key: both[key] for key in keys}
    return metas


class _Seen(fx.Interpreter):
    """Keeps the value of every node, by its name."""

    def __init__(self, body: fx.GraphModule) -> None:
        super().__init__(body)
        self.values: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = self.values[n.name] = super().run_node(n)
        return value


def _fake(mode: FakeTensorMode, node: fx.Node) -> Any:
    value = node.meta.get("val")
    if isinstance(value, FakeTensor):
        return value
    if isinstance(value, Tensor):
        return mode.from_tensor(value)
    meta = node.meta["tensor_meta"]
    with mode:
        return torch.empty(meta.shape, dtype=meta.dtype)


def _faked(mode: FakeTensorMode, body: fx.GraphModule) -> fx.GraphModule:
    """A body with tensors that have no values."""
    memo = {
        id(tensor): nn.Parameter(fake, tensor.requires_grad)
        if isinstance(tensor, nn.Parameter)
        else fake
        for tensor in (*body.parameters(), *body.buffers())
        for fake in (mode.from_tensor(tensor.detach(), static_shapes=True),)
    }
    return copy.deepcopy(body, memo)
