"""A form together with the operators that it may rewrite: what all stages work with.

A form for one operator and a form for several look alike from here: they take a tuple of
operators and make a :class:`Body` of one graph per operator, and of what these share.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, fx

from fxcompress.forms.body import Body, dense_bias_of, dense_weight_of
from fxcompress.forms.form import Counts, Form, JointForm
from fxcompress.forms.target import Losses, Rank, Ranks, Target
from fxcompress.operators.linear import LinearShape
from fxcompress.operators.shape import Shape


class Fitted(ABC):
    """A form and its operators.

    Attributes:
        form: the form.
        shapes: of the operators.
    """

    form: Form | JointForm
    shapes: tuple[Shape, ...]

    @property
    @abstractmethod
    def projects(self) -> bool:
        """Whether the form has factors of its own, and asks for the metric again to make them."""

    @property
    @abstractmethod
    def predicts(self) -> bool:
        """Whether the form has losses of its own, not those of truncation."""

    @abstractmethod
    def full_rank(self) -> Rank:
        """The rank at which nothing is lost."""

    @abstractmethod
    def misfit(self) -> str | None:
        """Why the form cannot take these operators, or None."""

    @abstractmethod
    def parameters(self, ranks: Ranks) -> Counts:
        """Weight entries of all operators together at each rank (biases not counted)."""

    @abstractmethod
    def macs(self, ranks: Ranks) -> Counts:
        """Multiply-accumulates of all operators together at each rank."""

    @abstractmethod
    def bytes(self, ranks: Ranks) -> Counts:
        """Bytes of everything stored at each rank (biases not counted)."""

    def break_even(self) -> int | None:
        """The lowest rank with no fewer weights than the operators; None for pairs of ranks.

        It is the full rank of a form that saves at every rank below that one.
        """
        full, dense = self.full_rank(), sum(shape.weights for shape in self.shapes)
        if not isinstance(full, int):
            return None

        def saves_nothing(rank: int) -> bool:
            return bool(self.parameters(np.array([rank]))[0] >= dense)

        return 1 + bisect_left(range(1, full), True, key=saves_nothing)

    def losses(self, target: Target, ranks: Ranks) -> Losses:
        """Predicted loss of all operators together at each rank."""
        return self.form.losses(target, ranks)

    def factors(self, target: Target, rank: Rank) -> tuple[Tensor, ...]:
        """What the body is to compute the product of."""
        return self.form.factors(target, cast(Any, rank))

    @abstractmethod
    def products(self, factors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The dense weight (canonical layout) of every operator that factors stand for."""

    @abstractmethod
    def empty(self, rank: Rank) -> Body:
        """The body with uninitialized parameters."""

    @abstractmethod
    def fill(self, body: Body, factors: Sequence[Tensor], biases: Sequence[Tensor | None]) -> None:
        """Make the body compute the products of its input, plus the biases.

        Raises:
            FormError: the form cannot represent these products faithfully.
        """

    @abstractmethod
    def weights(self, body: Body) -> tuple[Tensor, ...]:
        """The dense weight (canonical layout) of every operator, differentiable."""

    @abstractmethod
    def biases(self, body: Body) -> tuple[Tensor | None, ...]:
        """The dense bias of every operator: a parameter if the form keeps it, or computed."""


def fit(form: Form | JointForm, shapes: Sequence[Shape]) -> Fitted:
    """A form for these operators.

    Raises:
        ValueError: it is for another number or kind of operators.
    """
    if isinstance(form, JointForm):
        if len(shapes) < 2 or any(shape.op not in form.operators for shape in shapes):
            raise ValueError(f"{form.name} is for several linear operators")
        return _Joint(form, tuple(cast("LinearShape", shape) for shape in shapes))
    if len(shapes) != 1:
        raise ValueError(f"{form.name} is for one operator")
    return _Single(form, shapes[0])


class _Single(Fitted):
    """A form of one operator."""

    form: Form

    def __init__(self, form: Form, shape: Shape) -> None:
        self.form, self.shape, self.shapes = form, shape, (shape,)

    @property
    def projects(self) -> bool:
        return type(self.form).factors is not Form.factors

    @property
    def predicts(self) -> bool:
        return type(self.form).losses is not Form.losses

    def full_rank(self) -> Rank:
        return self.form.full_rank(self.shape)

    def misfit(self) -> str | None:
        return self.form.misfit(self.shape)

    def parameters(self, ranks: Ranks) -> Counts:
        return self.form.parameters(self.shape, ranks)

    def macs(self, ranks: Ranks) -> Counts:
        return self.form.macs(self.shape, ranks)

    def bytes(self, ranks: Ranks) -> Counts:
        return self.form.bytes(self.shape, ranks)

    def products(self, factors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (self.form.product(self.shape, factors),)

    def empty(self, rank: Rank) -> Body:
        return Body(None, (self.form.empty(self.shape, rank),))

    def fill(self, body: Body, factors: Sequence[Tensor], biases: Sequence[Tensor | None]) -> None:
        (head,), (bias,) = body.heads, biases
        self.form.fill(head, factors, bias)

    def weights(self, body: Body) -> tuple[Tensor, ...]:
        return (self.form.weight(body.heads[0], self.shape),)

    def biases(self, body: Body) -> tuple[Tensor | None, ...]:
        return (self.form.bias(body.heads[0], self.shape),)


class _Joint(Fitted):
    """A form of several linear operators on one input."""

    form: JointForm
    shapes: tuple[LinearShape, ...]

    def __init__(self, form: JointForm, shapes: tuple[LinearShape, ...]) -> None:
        self.form, self.shapes = form, shapes

    @property
    def projects(self) -> bool:
        return type(self.form).factors is not JointForm.factors

    @property
    def predicts(self) -> bool:
        return type(self.form).losses is not JointForm.losses

    def full_rank(self) -> Rank:
        return self.form.full_rank(self.shapes)

    def misfit(self) -> str | None:
        return self.form.misfit(self.shapes)

    def parameters(self, ranks: Ranks) -> Counts:
        return self.form.parameters(self.shapes, ranks)

    def macs(self, ranks: Ranks) -> Counts:
        return self.form.macs(self.shapes, ranks)

    def bytes(self, ranks: Ranks) -> Counts:
        return self.form.bytes(self.shapes, ranks)

    def products(self, factors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        left, right = factors
        return tuple(part @ right for part in self._lefts(left))

    def empty(self, rank: Rank) -> Body:
        assert isinstance(rank, int)
        return self.form.empty(self.shapes, rank)

    def fill(self, body: Body, factors: Sequence[Tensor], biases: Sequence[Tensor | None]) -> None:
        left, right = factors
        self.form.fill(body, self._lefts(left), right, biases)

    def weights(self, body: Body) -> tuple[Tensor, ...]:
        n = self.shapes[0].in_features
        return tuple(dense_weight_of(body.member(at), n) for at in range(len(self.shapes)))

    def biases(self, body: Body) -> tuple[Tensor | None, ...]:
        return tuple(
            self._bias(body, at, body.heads[at]) if shape.bias else None
            for at, shape in enumerate(self.shapes)
        )

    def _bias(self, body: Body, index: int, head: fx.GraphModule) -> Tensor:
        kept = self.form.bias(head)
        if kept is not None:
            return kept
        return dense_bias_of(body.member(index), self.shapes[0].in_features)

    def _lefts(self, left: Tensor) -> tuple[Tensor, ...]:
        return torch.split(left, [shape.out_features for shape in self.shapes])
