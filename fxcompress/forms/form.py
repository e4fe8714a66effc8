"""What a form of a factorization is.

A form says what rank r costs, builds the fx body that replaces an operator, and can tell
the dense weight that the body stands for.  A :class:`Form` is written for one operator, a
:class:`JointForm` for several on one input; what all stages work with is either of them
together with its operators (:mod:`fxcompress.forms.fitted`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from fxcompress.forms.body import Body, dense_bias_of, dense_weight_of
from fxcompress.forms.ordered import order_input
from fxcompress.forms.target import Losses, Rank, Ranks, Target, Truncations, View
from fxcompress.operators.linear import LinearShape
from fxcompress.operators.shape import Shape

Counts = NDArray[np.int64]

Shapes = Sequence[LinearShape]


class FormError(Exception):
    """A form that does not suit a site at this rank, with the reason; the site is replanned."""


class Form(ABC):
    """One way to spend r ranks on one operator.  Instances are stateless and can be pickled.

    A new form says its :attr:`name`, what it costs (:meth:`parameters`), and builds and fills a
    body; what it shares with truncation to rank r (the loss, the product that it computes) is
    here already.  ``fxcompress.register_form(MyForm())`` makes it known to rule files.

    The weight of a shape is in canonical layout throughout (:mod:`fxcompress.operators.shape`).
    """

    name: str
    operators: frozenset[str] = frozenset({"linear"})
    view: View = "matrix"
    """How it sees a weight as a matrix."""
    trains_as: str | None = None
    """Name of a form for the same operators with the same factors, whose body is trained in this
    one's place while ranks are found (:mod:`fxcompress.isvt`); None for itself."""
    remarks: Mapping[str, str] = {}
    """What torch functions in the body are for, by their names, where reports say so."""

    def full_rank(self, shape: Any) -> Rank:
        """The rank at which nothing is lost: min(m, n), unless the form counts otherwise."""
        rank: int = shape.full_rank
        return rank

    def misfit(self, shape: Any) -> str | None:
        """Why the form cannot take an operator of this shape, or None."""
        return None

    @abstractmethod
    def parameters(self, shape: Any, ranks: Ranks) -> Counts:
        """Weight entries at each rank (the bias, which stays, not counted)."""

    def macs(self, shape: Any, ranks: Ranks) -> Counts:
        """Multiply-accumulates at each rank; by default one per weight entry and position."""
        rows: int = shape.rows
        return self.parameters(shape, ranks) * rows

    def places(self, shape: Any) -> int:
        """In how many blocks a body may put channels in order, at most; 0 if it never does.

        What :meth:`fill` makes of an :meth:`empty` body (:mod:`fxcompress.forms.ordered`).
        """
        return 0

    def put_in_order(self, body: fx.GraphModule, shape: Any, blocks: int) -> None:
        """Make a body without an order put its input in one, which is not filled in yet."""
        order_input(body, shape.in_features, blocks, shape.device)

    def bytes(self, shape: Any, ranks: Ranks) -> Counts:
        """Bytes of everything stored at each rank, at most (the bias not counted)."""
        size: int = shape.dtype.itemsize
        return self.parameters(shape, ranks) * size + self.places(shape) * torch.int32.itemsize

    def truncations(self, target: Target) -> Truncations:
        """The approximations that it chooses from; by default those of its view."""
        return target.truncations(self.view)

    def losses(self, target: Target, ranks: Ranks) -> Losses:
        """Predicted loss at each rank, non-increasing; by default that of truncation."""
        return self.truncations(target).losses(ranks)

    def factors(self, target: Target, rank: Any) -> tuple[Tensor, ...]:
        """What the body is to compute the product of: for a matrix, (m x k) and (k x n).

        By default the first r components of the decomposition.
        """
        return self.truncations(target).factors(rank)

    def product(self, shape: Any, factors: Sequence[Tensor]) -> Tensor:
        """The dense weight (canonical layout) that factors stand for."""
        left, right = factors
        return left @ right

    @abstractmethod
    def empty(self, shape: Any, rank: Any) -> fx.GraphModule:
        """The body with uninitialized parameters: what a saved state dict is loaded into.

        It maps what the operator maps: (..., n) to (..., m) for a linear one.
        ``torch.fx.symbolic_trace`` makes one of any module.
        """

    @abstractmethod
    def fill(self, body: fx.GraphModule, factors: Sequence[Tensor], bias: Tensor | None) -> None:
        """Make the body compute the product of :meth:`factors` with its input, plus the bias.

        For a linear operator that is ``left @ right @ x + bias``.

        Raises:
            FormError: the form cannot represent this product faithfully.
        """

    def weight(self, body: fx.GraphModule, shape: Any) -> Tensor:
        """The dense weight (canonical layout) that the body stands for, differentiable."""
        return dense_weight_of(body, shape.in_features)

    def bias(self, body: fx.GraphModule, shape: Any) -> Tensor | None:
        """The dense bias (m) that the body stands for, differentiable; None without one."""
        return dense_bias_of(body, shape.in_features) if shape.bias else None


class JointForm(ABC):
    """One way to spend r ranks on several operators that read the same value.

    They are seen as one operator whose weight is stacked from theirs (Σm x n).  What they have
    in common is computed once (:attr:`Body.shared`).
    """

    name: str
    operators: frozenset[str] = frozenset({"linear"})
    view: View = "matrix"
    """How it sees the stacked weight as a matrix."""
    trains_as: str | None = None
    """As of :class:`Form`: name of a joint form."""
    hidden: bool = False
    """Whether the last operator reads what the others produce, instead of all reading one input."""
    remarks: Mapping[str, str] = {}
    """As of :class:`Form`."""

    def full_rank(self, shapes: Shapes) -> int:
        """The rank at which nothing is lost: min(Σm, n)."""
        return min(sum(shape.out_features for shape in shapes), shapes[0].in_features)

    def misfit(self, shapes: Shapes) -> str | None:
        """Why the form cannot take operators of these shapes, or None."""
        return None

    @abstractmethod
    def parameters(self, shapes: Shapes, ranks: Ranks) -> Counts:
        """Weight entries of all operators together, the shared ones once (biases not counted)."""

    def macs(self, shapes: Shapes, ranks: Ranks) -> Counts:
        """Multiply-accumulates, all operators together; one per weight entry and position."""
        return self.parameters(shapes, ranks) * shapes[0].rows

    def bytes(self, shapes: Shapes, ranks: Ranks) -> Counts:
        """Bytes of everything stored (biases not counted)."""
        return self.parameters(shapes, ranks) * shapes[0].dtype.itemsize

    def truncations(self, target: Target) -> Truncations:
        """The approximations that it chooses from; by default those of its view."""
        return target.truncations(self.view)

    def losses(self, target: Target, ranks: Ranks) -> Losses:
        """Predicted loss of all operators at each rank; by default that of truncation."""
        return self.truncations(target).losses(ranks)

    def factors(self, target: Target, rank: int) -> tuple[Tensor, Tensor]:
        """What the bodies are to compute the products of: (Σm x k) and (k x n).

        By default the first r components of the stacked weight.
        """
        left, right = self.truncations(target).factors(rank)
        return left, right

    def products(self, shapes: Shapes, factors: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """The dense weight of every operator that factors stand for; None for what stays."""
        left, right = factors
        return tuple(part @ right for part in _by_operator(shapes, left))

    @abstractmethod
    def empty(self, shapes: Shapes, rank: int) -> Body:
        """The body with uninitialized parameters."""

    def fill_from(
        self,
        shapes: Shapes,
        body: Body,
        factors: Sequence[Tensor],
        biases: Sequence[Tensor | None],
    ) -> None:
        """Give the body the values of :meth:`factors`; by default :meth:`fill` does it.

        Raises:
            FormError: the form cannot represent these products faithfully.
        """
        left, right = factors
        self.fill(body, _by_operator(shapes, left), right, biases)

    @abstractmethod
    def fill(
        self,
        body: Body,
        lefts: Sequence[Tensor],
        right: Tensor,
        biases: Sequence[Tensor | None],
    ) -> None:
        """Make head i compute ``lefts[i] @ right @ x + biases[i]`` (m_i x r, r x n).

        Raises:
            FormError: the form cannot represent these products faithfully.
        """

    def bias(self, head: fx.GraphModule) -> Tensor | None:
        """The parameter of a head that is the dense bias (m_i); None if there is no such one."""
        return None


def bare_linear(n: int, m: int, bias: bool, shape: Shape) -> nn.Linear:
    """An uninitialized linear layer of the site's type and device."""
    layer: nn.Linear = nn.utils.skip_init(  # type: ignore[no-untyped-call]
        nn.Linear, n, m, bias=bias, dtype=shape.dtype, device=shape.device
    )
    return layer


def assign(parameter: Tensor, value: Tensor) -> None:
    """Copy a value into a parameter, in the parameter's type."""
    with torch.no_grad():
        parameter.copy_(value)


def balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Factors (m x r, r x n), scaled to equal norms in every component; their product stays.

    It trains best and suits narrow types.
    """
    balance = (right.norm(dim=1) / left.norm(dim=0)).sqrt()
    balance = balance.where(balance.isfinite() & (balance > 0), balance.new_ones(()))
    return left * balance, right / balance[:, None]


def balanced_parts(lefts: Sequence[Tensor], right: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """Factors of products that share the right one, scaled to equal norms over all of them."""
    left, right = balanced(torch.cat(list(lefts)), right)
    return torch.split(left, [len(part) for part in lefts]), right


def linear(body: fx.GraphModule, name: str) -> nn.Linear:
    """A linear layer of a body."""
    return cast("nn.Linear", body.get_submodule(name))


def _by_operator(shapes: Shapes, left: Tensor) -> tuple[Tensor, ...]:
    """The rows of a stacked factor (Σm x r) that belong to each operator."""
    parts: tuple[Tensor, ...] = torch.split(left, [shape.out_features for shape in shapes])
    return parts
