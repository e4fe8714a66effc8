"""Fused kernels of ``nn.TransformerEncoder`` that would bypass a rewritten layer.

In eval mode ``nn.TransformerEncoderLayer`` hands the weights of all its layers to one fused
kernel.  A rewritten layer still answers to ``.weight``, so the outputs would be right, and
nothing would be saved.  Two attributes that torch itself consults switch that path off.
"""

from __future__ import annotations

from torch import nn


def disable_fast_paths(model: nn.Module, sites: list[str]) -> None:
    """Switch the fused path off in every encoder layer (and encoder) above a rewritten site."""
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if not any(site.startswith(prefix) for site in sites):
            continue
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
