"""Stacks of matrices of which a ``forward`` applies one at a time: the experts of a mixture.

before::

    self.up = nn.Parameter(...)                 # experts x m x n
    y = F.linear(x[rows], self.up[expert])      # in the forward of the module that has it

after::

    self.up = Stack(...)                        # up.0, up.1, ...: one operator for every expert
    y = F.linear(x[rows], self.up[expert])      # runs up.<expert>.product(x[rows])

A batched product (``torch.bmm(x, self.up)``) runs all of them.  Anything else computes with the
dense stack.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxcompress.operators.applied import Applied, StandIn
from fxcompress.operators.linear import LinearShape
from fxcompress.operators.shape import Shape

_BATCHED = ("bmm", "matmul", "__matmul__")


class Matrix(Applied):
    """One matrix of a stack; others of the stack may have other sizes."""

    def become(self, applies: Shape, weight: nn.Parameter) -> None:
        """Take another weight.

        Args:
            applies: the shape of the operator that it makes.
            weight: as it is stored.
        """
        self.product = applies.applying(weight).train(self.training)
        self.applies = applies
        self.size = tuple(weight.shape)


class Stack(StandIn):
    """A parameter (experts x rows x columns) as one object for each matrix of it.

    Children are named by their numbers; each is a :class:`Matrix`.
    """

    def __init__(self, parameter: nn.Parameter, applies: Shape) -> None:
        """Make one of a parameter, whose memory the matrices share.

        Args:
            parameter: experts x the stored size of ``applies``.
            applies: what each matrix is applied as.
        """
        super().__init__()
        for number, matrix in enumerate(parameter.detach()):
            own = nn.Parameter(matrix, requires_grad=parameter.requires_grad)
            child = Matrix(applies.applying(own), applies, tuple(matrix.shape))
            self.add_module(str(number), child)

    @property
    def matrices(self) -> Sequence[Matrix]:
        """The objects for the matrices, in order."""
        return [*self._modules.values()]  # type: ignore[list-item]

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self._modules), *self.matrices[0].size))

    @property
    def ndim(self) -> int:
        return 3

    @property
    def dtype(self) -> torch.dtype:
        return self.matrices[0].dtype

    @property
    def device(self) -> torch.device:
        return self.matrices[0].device

    @property
    def T(self) -> Any:
        return self.dense().permute(2, 1, 0)

    @property
    def mT(self) -> Any:
        return self.dense().mT

    def dense(self) -> Tensor:
        """The dense stack.

        Raises:
            ValueError: the matrices have several sizes, as narrowing leaves them.
        """
        sizes = dict.fromkeys(matrix.size for matrix in self.matrices)
        if len(sizes) > 1:
            raise ValueError(
                f"the experts have matrices of several sizes ({', '.join(map(str, sizes))}), which "
                "are no one tensor: read them one by one, by an index"
            )
        return torch.stack([matrix.dense() for matrix in self.matrices])

    def __getitem__(self, index: Any) -> Any:
        """The object for one matrix; the dense values for any other index."""
        if isinstance(index, Tensor) and not index.dim() and index.dtype != torch.bool:
            index = int(index)
        if isinstance(index, int) and not isinstance(index, bool):
            return self.matrices[index]
        return self.dense()[index]

    def __iter__(self) -> Iterator[Matrix]:
        return iter(self.matrices)

    def answer(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
        """A batched product with the stack: (experts x rows x n) to (experts x rows x m)."""
        if name not in _BATCHED or len(args) != 2 or kwargs or args[1] is not self:
            return None
        data, applied = args[0], self.matrices[0].applies
        if not isinstance(data, Tensor) or data.dim() != 3 or not applied.is_mirrored:
            return None
        if data.shape[::2] != (len(self), applied.in_features):
            return None
        return torch.stack([x @ matrix for x, matrix in zip(data, self, strict=True)])


def stack_at(model: nn.Module, weight: str) -> nn.Parameter | Stack | None:
    """The stack that a weight is a matrix of by its name (``experts.up.3``): as it is now.

    Args:
        model: has the stack.
        weight: name of one matrix, or of anything else.

    Returns:
        The parameter, or the object in its place; None if the name is of no such matrix.
    """
    path, _, number = weight.rpartition(".")
    holder, _, name = path.rpartition(".")
    if not number.isdigit() or not name:
        return None
    try:
        owner = model.get_submodule(holder)
    except AttributeError:
        return None
    found = owner._modules.get(name)
    if isinstance(found, Stack):
        return found if int(number) < len(found) else None
    parameter = owner._parameters.get(name)
    if parameter is None or parameter.dim() != 3 or int(number) >= len(parameter):
        return None
    return parameter


def parameter_of(model: nn.Module, weight: str) -> str:
    """Name of the parameter that a weight of a rewritten model was, or was a matrix of."""
    return weight.rpartition(".")[0] if isinstance(stack_at(model, weight), Stack) else weight


def pile(model: nn.Module, weight: str, shape: Shape) -> None:
    """Put a :class:`Stack` in the place of a parameter; changes ``model``.

    Args:
        model: has the parameter.
        weight: its name.
        shape: of the operator that functions make of each matrix.

    Raises:
        ValueError: the matrices are not of that shape.
    """
    path, _, name = weight.rpartition(".")
    owner = model.get_submodule(path)
    parameter = owner._parameters[name]
    if parameter is None or tuple(parameter.shape[1:]) != shape.stored_size:
        raise ValueError(f"it has no parameter {weight} of matrices of {shape}")
    stack = Stack(parameter, shape).train(owner.training)
    del owner._parameters[name]
    owner._modules[name] = stack


def restore(model: nn.Module, weight: str, parameter: nn.Parameter) -> None:
    """Undo :func:`pile`; no operator must have been rewritten."""
    path, _, name = weight.rpartition(".")
    owner = model.get_submodule(path)
    del owner._modules[name]
    owner._parameters[name] = parameter


def ways(parameter: nn.Parameter) -> tuple[LinearShape, LinearShape]:
    """The operators that a matrix of a stack may be: of (m x n), and of (n x m)."""
    _, m, n = parameter.shape
    stored = LinearShape(n, m, False, parameter.dtype, parameter.device)
    return stored, LinearShape(m, n, False, parameter.dtype, parameter.device, transposed=True)


def release_memory(model: nn.Module) -> None:
    """Give matrices of stacks memory of their own, where some were rewritten; changes ``model``."""
    for module in model.modules():
        if isinstance(module, Stack):
            for parameter in module.parameters():
                if parameter.untyped_storage().nbytes() > parameter.nbytes:
                    parameter.data = parameter.data.clone()
