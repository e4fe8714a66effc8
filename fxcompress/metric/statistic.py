"""Statistics that a metric brings along: sums over the data that no other needs.

A statistic is a *sum*, so all that is to be known of it is its size and what a batch adds.  It is
accumulated in float64; two of them are put together by addition, and each is kept as one tensor.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

from torch import Tensor


class Statistic(ABC):
    """A mean over the data at every site.  Instances are stateless.

    Every operator is a linear map of rows in g groups: a group maps rows of n inputs (patches of a
    convolution; one-hot vectors of an embedding) to rows of m outputs.  Of anything but a
    convolution there is one group.
    """

    name: str
    """Its key in :attr:`fxcompress.metric.Moments.own`."""
    reads: Literal["inputs", "gradients", "weights"]
    """What is summed up: rows of inputs; rows of gradients of outputs; or the gradients of the
    weight of every sample, which take the memory of the weight once a sample."""

    @abstractmethod
    def size(self, m: int, n: int) -> tuple[int, ...]:
        """Of the sum of one group (m x n); that of inputs does not depend on m."""

    @abstractmethod
    def added(self, found: Tensor) -> Tensor:
        """What some rows, or the weight's gradients of some samples, add to the sum (g x size).

        Args:
            found: rows without padding (g x rows x n) or (g x rows x m); or (samples x g x m x n).
                Gradients are those of the negative log-likelihood of labels that are drawn for
                every prediction: the squares of samples add up to the Fisher.
        """

    @property
    def backward(self) -> bool:
        """Whether the statistic needs gradients of the output.

        Without them it is a mean over rows; with them, a sum per prediction.
        """
        return self.reads != "inputs"
