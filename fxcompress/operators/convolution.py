"""Convolutions and transposed convolutions in one to three dimensions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from fxcompress.operators.shape import ConvShape

_CLASSES: Mapping[str, type[nn.Module]] = {
    "conv1d": nn.Conv1d,
    "conv2d": nn.Conv2d,
    "conv3d": nn.Conv3d,
    "conv_transpose1d": nn.ConvTranspose1d,
    "conv_transpose2d": nn.ConvTranspose2d,
    "conv_transpose3d": nn.ConvTranspose3d,
}


def bare_convolution(shape: ConvShape) -> nn.Module:
    """An uninitialized convolution."""
    more = {"output_padding": shape.output_padding} if shape.transposed else {}
    layer: nn.Module = nn.utils.skip_init(  # type: ignore[no-untyped-call]
        _CLASSES[shape.op],
        shape.in_channels,
        shape.out_channels,
        shape.kernel_size,
        stride=shape.stride,
        padding=shape.padding,
        dilation=shape.dilation,
        groups=shape.groups,
        bias=shape.bias,
        padding_mode=shape.padding_mode,
        dtype=shape.dtype,
        device=shape.device,
        **more,
    )
    return layer


def convolution_shape(module: Any) -> ConvShape:
    """Shape, type and device of a convolution module."""
    return ConvShape(
        in_channels=module.in_channels,
        out_channels=module.out_channels,
        kernel_size=tuple(module.kernel_size),
        stride=tuple(module.stride),
        padding=module.padding if isinstance(module.padding, str) else tuple(module.padding),
        dilation=tuple(module.dilation),
        groups=module.groups,
        bias=module.bias is not None,
        padding_mode=module.padding_mode,
        transposed=module.transposed,
        output_padding=tuple(module.output_padding) if module.transposed else (),
        dtype=module.weight.dtype,
        device=module.weight.device,
    )
