"""What a module that can be rewritten looks like to a form."""

from __future__ import annotations

import sys

from torch import Tensor, nn

from fxcompress.operators.convolution import convolution_shape
from fxcompress.operators.shape import EmbeddingShape, LinearShape, Shape


def is_hf_conv1d(module: nn.Module) -> bool:
    """Hugging Face's ``Conv1D``: a linear layer with an (in, out) weight."""
    library = sys.modules.get("transformers.pytorch_utils")
    return library is not None and isinstance(module, library.Conv1D)


def shape_of(module: nn.Module) -> Shape:
    """Shape, type and device of a linear, convolution or embedding module.

    Raises:
        ValueError: it is none of these.
    """
    if isinstance(module, nn.modules.conv._ConvNd):
        return convolution_shape(module)
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise ValueError(f"{type(module).__name__} has no weight that is a matrix")
    rows, columns = weight.shape
    if isinstance(module, nn.Embedding):
        return EmbeddingShape(
            rows,
            columns,
            weight.dtype,
            weight.device,
            module.padding_idx,
            module.sparse,
            module.scale_grad_by_freq,
            module.max_norm,
        )
    transposed = is_hf_conv1d(module)
    n, m = (rows, columns) if transposed else (columns, rows)
    bias = getattr(module, "bias", None) is not None
    return LinearShape(n, m, bias, weight.dtype, weight.device, transposed)


def canonical_weight(module: nn.Module) -> Tensor:
    """The weight of a module in canonical layout, whichever way it is stored."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return shape_of(module).canonical(weight)
