"""What a metric is: the statistics it needs, and the quadratic form it makes of them at a site."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from fxcompress.metric.moments import Moments, Named
from fxcompress.metric.quadratic import Grouped, QuadraticForm
from fxcompress.metric.statistic import Statistic
from fxcompress.metric.whiten import Whiteners
from fxcompress.operators.shape import Shape, is_grouped

Need = Named | Statistic
"""A statistic that :class:`Moments` has a name for, or another."""


class Metric(ABC):
    """Which small changes of a weight matter, and by how much.  Instances are stateless.

    A new metric says its :attr:`name` and what it :attr:`needs`, and makes a form of it
    (:meth:`form`); if that is a Kronecker product, it is a
    :class:`~fxcompress.metric.kronecker.KroneckerMetric` of its two factors.
    ``fxcompress.register_metric(MyMetric())`` makes it known to rule files.
    """

    name: str
    """As written in a rule file."""
    unit: str = "nats per prediction"
    """What the predicted loss of a site is measured in."""
    needs: frozenset[Need] = frozenset()
    """Statistics to gather: those of :class:`Moments` by name, or others themselves; none if no
    calibration is needed."""
    damped: tuple[bool, bool] = (False, False)
    """Whether damping of the input and of the output factor makes a difference."""
    directions: bool = False
    """Whether losses are measured anew along the components that were found, in a second pass over
    the data."""

    @abstractmethod
    def form(self, moments: Moments, damping: tuple[float, float]) -> QuadraticForm:
        """The quadratic form at one site, or on one group of a convolution.

        Args:
            moments: of the site or of the group.
            damping: of the input and of the output factor, relative to their mean eigenvalues.

        Raises:
            ValueError: a moment is not finite.
        """

    def quadratic(self, shape: Shape, moments: Moments, whiteners: Whiteners) -> QuadraticForm:
        """The quadratic form at one site.

        Args:
            shape: of the operator.
            moments: of the site.
            whiteners: of factors, for metrics that have some; know the damping.

        Raises:
            ValueError: a moment is not finite.
        """
        groups = by_group(shape)
        if not groups:
            return self.form(moments, whiteners.damping)
        each = (moments.group(at) for at in range(groups))
        return Grouped(tuple(self.form(part, whiteners.damping) for part in each))

    def undamped_loss(self, shape: Shape, moments: Moments, change: Tensor) -> float:
        """Loss of a change of a weight by the moments themselves, undamped.

        For moments that the change was not chosen by: there is nothing to be careful about.

        Args:
            shape: of the operator.
            moments: of the site, of any floating type.
            change: Δ (canonical layout), float64.
        """
        wide = moments.changed(lambda each: each.to(torch.float64))
        return self.quadratic(shape, wide, Whiteners((0.0, 0.0))).loss(change)

    @property
    def backward(self) -> bool:
        """Whether the metric needs gradients of the output."""
        return any(
            each.backward if isinstance(each, Statistic) else each != "input" for each in self.needs
        )


def by_group(shape: Shape) -> int:
    """How many groups a weight's layout has a dimension for; 0 if it is one matrix."""
    return shape.matrix[0] if is_grouped(shape) else 0
