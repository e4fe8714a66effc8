"""What a form of a factorization is.

A form says what rank r costs, builds the fx body that replaces an operator, and can tell
the dense weight that the body stands for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

Ranks = NDArray[np.int64]
Counts = NDArray[np.int64]


CPU = torch.device("cpu")


class FormError(Exception):
    """A form that does not suit a site at this rank, with the reason; the site is replanned."""


@dataclass(frozen=True)
class LinearShape:
    """A linear operator as a form sees it: W is (m x n) = (out_features x in_features)."""

    in_features: int
    out_features: int
    bias: bool
    dtype: torch.dtype = torch.float32
    device: torch.device = CPU

    @property
    def full_rank(self) -> int:
        return min(self.in_features, self.out_features)


class Form(ABC):
    """One way to spend r ranks on an operator.  Instances are stateless."""

    name: str
    operators: frozenset[str]

    @abstractmethod
    def parameters(self, shape: LinearShape, ranks: Ranks) -> Counts:
        """Weight entries at each rank (the bias, which stays, not counted)."""

    @abstractmethod
    def macs(self, shape: LinearShape, ranks: Ranks) -> Counts:
        """Multiply-accumulates per position at each rank."""

    @abstractmethod
    def bytes(self, shape: LinearShape, ranks: Ranks) -> Counts:
        """Bytes of everything stored at each rank (the bias not counted)."""

    @abstractmethod
    def empty(self, shape: LinearShape, rank: int) -> fx.GraphModule:
        """The body with uninitialized parameters: what a saved state dict is loaded into."""

    @abstractmethod
    def fill(self, body: fx.GraphModule, left: Tensor, right: Tensor, bias: Tensor | None) -> None:
        """Make the body compute ``left @ right @ x + bias`` (m x r, r x n, m).

        Raises:
            FormError: the form cannot represent this product faithfully.
        """

    @abstractmethod
    def weight(self, body: fx.GraphModule) -> Tensor:
        """The dense weight (m x n) that the body stands for, differentiable."""

    @abstractmethod
    def bias(self, body: fx.GraphModule) -> Tensor | None:
        """The dense bias (m) that the body stands for, differentiable."""


def bare_linear(n: int, m: int, bias: bool, shape: LinearShape) -> nn.Linear:
    """An uninitialized linear layer of the site's type and device."""
    layer: nn.Linear = nn.utils.skip_init(  # type: ignore[no-untyped-call]
        nn.Linear, n, m, bias=bias, dtype=shape.dtype, device=shape.device
    )
    return layer


def assign(parameter: Tensor, value: Tensor) -> None:
    """Copy a value into a parameter, in the parameter's type."""
    with torch.no_grad():
        parameter.copy_(value)


def linear(body: fx.GraphModule, name: str) -> nn.Linear:
    """A linear layer of a body."""
    layer = body.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return layer
