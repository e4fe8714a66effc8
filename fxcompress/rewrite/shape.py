"""What a linear module looks like to a form."""

from __future__ import annotations

import torch
from torch import nn

from fxcompress.forms import LinearShape
from fxcompress.graph.canonical import is_hf_conv1d


def linear_shape(module: nn.Module) -> LinearShape:
    """Shape, type and device of a linear module (``nn.Linear`` or Hugging Face's ``Conv1D``)."""
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    rows, columns = weight.shape
    n, m = (rows, columns) if is_hf_conv1d(module) else (columns, rows)
    bias = getattr(module, "bias", None) is not None
    return LinearShape(n, m, bias, weight.dtype, weight.device)
