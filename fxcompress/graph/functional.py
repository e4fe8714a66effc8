"""Attributes of ``F.conv2d``, ``F.embedding`` and their like: those that the modules have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fxcompress.graph.operator import AttributeValue

CONVOLUTIONS = {
    *("conv1d", "conv2d", "conv3d"),
    *("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
}
_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED_ARGUMENTS = (*_ARGUMENTS[:5], "output_padding", "groups", "dilation")


def functional_attributes(
    op: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, AttributeValue]:
    """Attributes of a function that applies a convolution or looks up an embedding.

    >>> import torch
    >>> args = (torch.zeros(1, 4, 8, 8), torch.zeros(6, 2, 3, 3))
    >>> found = functional_attributes("conv2d", args, {"groups": 2})
    >>> [found[key] for key in ("in_channels", "out_channels", "kernel_size", "stride")]
    [4, 6, (3, 3), (1, 1)]

    Args:
        op: the operator; any other one has none here.
        args: what it was called with.
        kwargs: likewise.
    """
    if op == "embedding":
        # F.embedding takes the table second, torch.embedding first.
        tensors = (each for each in (*args, *kwargs.values()) if isinstance(each, Tensor))
        table = next(each for each in tensors if not _is_index(each))
        rows, width = table.shape
        return {"num_embeddings": rows, "embedding_dim": width, "dtype": dtype_name(table)}
    return _convolution(op, args, kwargs) if op in CONVOLUTIONS else {}


def dtype_name(tensor: Tensor) -> str:
    """``"float32"`` for ``torch.float32``."""
    return str(tensor.dtype).removeprefix("torch.")


def _convolution(
    op: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, AttributeValue]:
    transposed = op.startswith("conv_transpose")
    names = _TRANSPOSED_ARGUMENTS if transposed else _ARGUMENTS
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    weight = given["weight"]
    first, second, *kernel = weight.shape
    groups = given.get("groups", 1)
    channels = (first, second * groups) if transposed else (second * groups, first)

    def each(name: str, default: int) -> AttributeValue:
        value = given.get(name, default)
        if isinstance(value, str):
            return value
        sizes = (value,) if isinstance(value, int) else tuple(value)
        return sizes * len(kernel) if len(sizes) == 1 else sizes

    return {
        "in_channels": channels[0],
        "out_channels": channels[1],
        "kernel_size": tuple(kernel),
        "stride": each("stride", 1),
        "padding": each("padding", 0),
        "dilation": each("dilation", 1),
        "groups": groups,
        "bias": given.get("bias") is not None,
        "padding_mode": "zeros",
        "dtype": dtype_name(weight),
    }


def _is_index(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex())
