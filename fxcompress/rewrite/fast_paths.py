"""Fused kernels of ``nn.TransformerEncoder`` that would bypass a rewritten layer.

In eval mode ``nn.TransformerEncoderLayer`` hands the weights of all its layers to one fused
kernel.  A rewritten layer still answers to ``.weight``, so the outputs would be right, and
nothing would be saved.  Two attributes that torch itself consults switch that path off.

One thing changes with it: under a ``src_key_padding_mask`` the fused path returns zeros where
the padding is, and the ordinary one (which torch takes in training, too) whatever comes out.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from fxcompress.graph.paths import containing


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
