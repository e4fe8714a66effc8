"""Convolutions of all kinds, and the dense quadratic form to compare with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fxcompress.operators.convolution import ConvShape

CASES: dict[str, dict[str, Any]] = {
    "1d": {"dims": 1, "kernel_size": 5, "padding": 2},
    "1d, same, circular": {
        "dims": 1, "kernel_size": 4, "padding": "same", "padding_mode": "circular",
    },
    "2d": {"dims": 2, "kernel_size": 3, "padding": 1},
    "2d, strided, dilated, groups": {
        "dims": 2, "kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0),
        "dilation": (1, 2), "groups": 2,
    },
    "2d, valid": {"dims": 2, "kernel_size": 3, "padding": "valid", "stride": 2},
    "2d, same, dilated": {"dims": 2, "kernel_size": (2, 3), "padding": "same", "dilation": 2},
    "2d, reflect": {"dims": 2, "kernel_size": 3, "padding": (2, 1), "padding_mode": "reflect"},
    "2d, replicate": {
        "dims": 2, "kernel_size": (3, 5), "padding": (1, 2), "padding_mode": "replicate",
        "stride": 3,
    },
    "pointwise": {"dims": 2, "kernel_size": 1},
    "pointwise, strided, groups": {"dims": 2, "kernel_size": 1, "stride": 2, "groups": 2},
    "depthwise": {"dims": 2, "kernel_size": 3, "groups": 6, "out": 12},
    "3d": {"dims": 3, "kernel_size": (2, 3, 2), "stride": (1, 2, 1)},
    "transposed 1d": {"dims": 1, "kernel_size": 3, "stride": 2, "padding": 3, "transposed": True},
    "transposed 2d, groups": {
        "dims": 2, "kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1, "groups": 2,
        "transposed": True,
    },
    "transposed 2d, dilated": {
        "dims": 2, "kernel_size": (2, 3), "stride": (3, 1), "dilation": (2, 1),
        "transposed": True,
    },
    "transposed 3d": {"dims": 3, "kernel_size": 2, "stride": 2, "transposed": True},
}  # fmt: skip

CLASSES = {
    (False, 1): nn.Conv1d, (False, 2): nn.Conv2d, (False, 3): nn.Conv3d,
    (True, 1): nn.ConvTranspose1d, (True, 2): nn.ConvTranspose2d, (True, 3): nn.ConvTranspose3d,
}  # fmt: skip

SIDE = 7


def build(case: dict[str, Any], n: int = 6, m: int = 8, bias: bool = True) -> nn.Module:
    """A convolution in float64 with random values."""
    words = dict(case)
    cls = CLASSES[words.pop("transposed", False), words.pop("dims")]
    m = words.pop("out", m)
    layer: nn.Module = cls(n, m, bias=bias, **words).double()
    return layer


def data(layer: Any, items: int = 2) -> Tensor:
    """An input for it."""
    sides = [SIDE] * len(layer.kernel_size)
    return torch.randn(items, layer.in_channels, *sides, dtype=torch.float64)


def spd(size: int, condition: float = 100.0) -> Tensor:
    """A random symmetric positive definite matrix."""
    basis, _ = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))
    return (basis * torch.linspace(1 / condition, 1, size, dtype=torch.float64)) @ basis.T


def factors(shape: ConvShape) -> tuple[Tensor, Tensor]:
    """Random factors A (g x n/g·k x n/g·k) and G (g x m/g x m/g)."""
    a = torch.stack([spd(shape.group_in * shape.taps) for _ in range(shape.groups)])
    return a, torch.stack([spd(shape.group_out) for _ in range(shape.groups)])


def dense_loss(change: Tensor, a: Tensor, g: Tensor) -> float:
    """``½ Σ tr(G Δ A Δᵀ)`` over the groups of a change (g x m/g x n/g x kernel)."""
    parts = zip(change.flatten(2), a, g, strict=True)
    return sum(0.5 * float(torch.trace(h @ d @ b @ d.T)) for d, b, h in parts)
