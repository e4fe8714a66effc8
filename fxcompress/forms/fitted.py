"""A form together with the operators that it may rewrite: what all stages work with.

A form for one operator and a form for several look alike from here: they take a tuple of
operators and make a :class:`Body` of one graph per operator, and of what these share.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxcompress.forms.body import Body, dense_bias_of, dense_weight_of
from fxcompress.forms.form import Counts, Form, JointForm
from fxcompress.forms.target import Losses, Rank, Ranks, Target
from fxcompress.operators.per_channel import PerChannel
from fxcompress.operators.shape import Shape


def fit(
    form: Form | JointForm,
    shapes: Sequence[Shape],
    held: Sequence[PerChannel] = (),
    *,
    order: int | None = None,
) -> Fitted:
    """A form for these operators.

    Args:
        form: of one operator, or of several.
        shapes: of the operators.
        held: of a hidden value, what else goes with its channels.
        order: in how many blocks its body puts channels in order; None where that is not known
            yet, as it depends on the weight.

    Raises:
        ValueError: it is for another number or kind of operators.
    """
    if isinstance(form, JointForm):
        if len(shapes) < 2 or any(shape.op not in form.operators for shape in shapes):
            raise ValueError(f"{form.name} is for several operators of its kinds")
    elif len(shapes) != 1:
        raise ValueError(f"{form.name} is for one operator")
    return Fitted(form, tuple(shapes), tuple(held), order)


class Fitted:
    """A form and its operators; made by :func:`fit`.

    Attributes:
        form: the form.
        shapes: of the operators.
        held: of a hidden value, what operators between these have of every channel.
        order: in how many blocks its body puts channels in order; None if that is not known yet.
        projects: whether the form has factors of its own, and asks for the metric to make them.
        predicts: whether the form has losses of its own, not those of truncation.
    """

    def __init__(
        self,
        form: Form | JointForm,
        shapes: tuple[Shape, ...],
        held: tuple[PerChannel, ...] = (),
        order: int | None = None,
    ) -> None:
        self.form, self.shapes, self.held, self.order = form, shapes, held, order
        self._joint = isinstance(form, JointForm)
        self._form: Any = form  # whose methods take one shape, or all of them:
        self._shape: Any = shapes if self._joint else shapes[0]
        plain: Any = JointForm if self._joint else Form
        self.projects: bool = type(form).factors is not plain.factors
        self.predicts: bool = type(form).losses is not plain.losses

    def full_rank(self) -> Rank:
        """The rank at which nothing is lost."""
        found: Rank = self._form.full_rank(self._shape)
        return found

    def misfit(self) -> str | None:
        """Why the form cannot take these operators, or None."""
        found: str | None = self._form.misfit(self._shape)
        return found

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

    def parameters(self, ranks: Ranks) -> Counts:
        """Weight entries of all operators together at each rank (biases not counted).

        What else goes with the channels of a hidden value is taken off.
        """
        found: Counts = self._form.parameters(self._shape, ranks)
        return found - self._gone(ranks, sum(each.parameters for each in self.held))

    def macs(self, ranks: Ranks) -> Counts:
        """Multiply-accumulates of all operators together at each rank."""
        found: Counts = self._form.macs(self._shape, ranks)
        return found

    def _gone(self, ranks: Ranks, of_channel: int) -> Counts | int:
        """What goes with the channels that go, given how much of it goes with one."""
        full = self.full_rank() if of_channel else 0
        assert isinstance(full, int)
        return of_channel * (full - ranks) if of_channel else 0

    def places(self) -> int:
        """In how many blocks a body may put channels in order, at most; 0 if it never does."""
        found: int = 0 if self._joint else self._form.places(self._shape)
        return found

    def bytes(self, ranks: Ranks) -> Counts:
        """Bytes of everything stored at each rank (biases not counted), at most.

        They are exact once the order is known.
        """
        found: Counts = self._form.bytes(self._shape, ranks)
        fewer = 0 if self.order is None else self.places() - self.order
        gone = self._gone(ranks, sum(each.bytes for each in self.held))
        return found - fewer * torch.int32.itemsize - gone

    def losses(self, target: Target, ranks: Ranks) -> Losses:
        """Predicted loss of all operators together at each rank."""
        return self.form.losses(target, ranks)

    def factors(self, target: Target, rank: Rank) -> tuple[Tensor, ...]:
        """What the body is to compute the product of; of several operators stacked."""
        found: tuple[Tensor, ...] = self._form.factors(target, rank)
        return found

    def products(self, factors: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """The dense weight (canonical layout) of every operator that factors stand for.

        None for an operator whose weight stays as it is.
        """
        if self._joint:
            return tuple(self._form.products(self._shape, factors))
        return (self._form.product(self._shape, factors),)

    def empty(self, rank: Rank) -> Body:
        """The body with uninitialized parameters."""
        made = self._form.empty(self._shape, rank)
        if self.order:
            self._form.put_in_order(made, self._shape, self.order)
        return made if self._joint else Body(None, (made,))

    def fill(self, body: Body, factors: Sequence[Tensor], biases: Sequence[Tensor | None]) -> None:
        """Make the body compute the products with its input, plus the biases.

        Raises:
            FormError: the form cannot represent these products faithfully.
        """
        if self._joint:
            self._form.fill_from(self._shape, body, factors, biases)
        else:
            self._form.fill(body.heads[0], factors, biases[0])

    def weights(self, body: Body) -> tuple[Tensor, ...]:
        """The dense weight (canonical layout) of every operator, differentiable."""
        if not self._joint:
            return (self._form.weight(body.heads[0], self._shape),)
        n = self.shapes[0].in_features
        return tuple(dense_weight_of(body.member(at), n) for at in range(len(self.shapes)))

    def biases(self, body: Body) -> tuple[Tensor | None, ...]:
        """The dense bias of every operator: a parameter if the form keeps it, or computed."""
        if not self._joint:
            return (self._form.bias(body.heads[0], self._shape),)
        return tuple(
            self._bias(body, at) if shape.bias else None for at, shape in enumerate(self.shapes)
        )

    def _bias(self, body: Body, index: int) -> Tensor:
        kept: Tensor | None = self._form.bias(body.heads[index])
        if kept is not None:
            return kept
        return dense_bias_of(body.member(index), self.shapes[0].in_features)
