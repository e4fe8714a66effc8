"""What a batch is, and how a model is called on one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fxcompress.graph.eager import eager
from fxcompress.graph.randomness import own_stream

Forward = Callable[[nn.Module, Any], Any]
"""``forward(model, batch)`` returns the model's output on a batch of the user's own kind."""


def run_model(model: nn.Module, batch: Any, forward: Forward | None = None) -> Any:
    """Call ``model`` on ``batch``, moved to the model's device.

    A tensor is one positional argument, a tuple or list several, a mapping (a Hugging Face
    ``BatchEncoding`` too) keyword arguments.  With ``forward`` the user decides.  Whatever is
    compiled runs as it was written, and the user's random generators stay where they are.
    """
    batch = to_device(batch, device_of(model))
    with eager(), own_stream():
        if forward is not None:
            return forward(model, batch)
        if isinstance(batch, Mapping):
            return model(**batch)
        if isinstance(batch, (tuple, list)):
            return model(*batch)
        return model(batch)


def device_of(model: nn.Module) -> torch.device:
    """The device of the first parameter or buffer; the CPU for a model without any."""
    for tensor in [*model.parameters(), *model.buffers()]:
        return tensor.device
    return torch.device("cpu")


def to_device(batch: Any, device: torch.device) -> Any:
    """Move all tensors of a batch; Hugging Face's ``BatchEncoding`` becomes a dict."""
    if isinstance(batch, Mapping):
        batch = dict(batch)

    def move(leaf: Any) -> Any:
        # Not .to() where it would do nothing: a recording has a node for that.
        return leaf.to(device) if isinstance(leaf, Tensor) and leaf.device != device else leaf

    return tree_map(move, batch)
