"""Fused kernels that would bypass a rewritten layer.

Of ``nn.TransformerEncoder``, and those of Hugging Face for all experts of a layer.

In eval mode ``nn.TransformerEncoderLayer`` hands the weights of all its layers to one fused
kernel.  A rewritten layer still answers to ``.weight``, so the outputs would be right, and
nothing would be saved.  Two attributes that torch itself consults switch that path off.

One thing changes with it: under a ``src_key_padding_mask`` the fused path returns zeros where
the padding is, and the ordinary one (which torch takes in training, too) whatever comes out.

Experts of transformers run in one batched or grouped product, which takes nothing but a stack of
matrices of one size.  ``config._experts_implementation`` switches to the loop over experts that
their own ``forward`` is; the module gets a configuration of its own, for the rest of the model
keeps the one that it has.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn

from fxcompress.graph.paths import containing
from fxcompress.operators.stacked import Stack


def disable_fast_paths(model: nn.Module, above: Sequence[str] | None = None) -> None:
    """Switch the fused path off in encoder layers and encoders; changes ``model``.

    Args:
        model: anything.
        above: only where they contain one of these module paths.
    """
    wanted = None if above is None else containing(above)
    for name, module in model.named_modules():
        if wanted is not None and name not in wanted:
            continue
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
        elif _runs_at_once(module):
            config = copy.copy(module.config)
            config._experts_implementation_internal = "eager"  # the property sets those below, too
            module.config = config


def _runs_at_once(module: Any) -> bool:
    """Whether a module is the experts of a Hugging Face model, and runs them in one product."""
    config = vars(module).get("config")
    told = getattr(config, "_experts_implementation_internal", None)
    stacked = any(p is not None and p.dim() == 3 for p in module._parameters.values())
    piled = any(isinstance(each, Stack) for each in module._modules.values())
    decorated = "is_transposed" in vars(module) and hasattr(type(module).forward, "__wrapped__")
    return (stacked or piled) and decorated and told not in (None, "eager")
