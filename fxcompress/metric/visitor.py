"""What is done with the values of a pass over the data (:mod:`fxcompress.metric.passes`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from fxcompress.collective import Processes
from fxcompress.errors import CalibrationError
from fxcompress.metric.moments import Moments
from fxcompress.operators.shape import Shape


class SiteFacts(Protocol):
    """What a pass needs to know of a site."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> Shape: ...
    @property
    def source(self) -> str: ...
    @property
    def calls(self) -> int: ...


InputKey = tuple[str, tuple[Any, ...]]


def input_key(site: SiteFacts) -> InputKey:
    """Equal for sites that see the same rows: the same value, read in the same way."""
    return site.source, site.shape.reading


class Visitor(Protocol):
    """What is done with the values of a pass.

    A mask says which rows count: positions of a value (its shape without features; of a
    convolution, items x extents of its output; of an embedding, of its look-ups).  What it leaves
    out is never NaN in inputs, and zero in gradients.

    Attributes:
        backward: whether gradients are wanted.
    """

    backward: bool

    def begin(self, batch: int) -> None:
        """A batch begins; its place is the same whoever has it."""

    def input(self, site: SiteFacts, data: Tensor, mask: Tensor | None) -> bool:
        """The input of a call, once for all sites on it; whether it is finite."""

    def keep(self, site: SiteFacts, data: Tensor) -> Any:
        """What of the input of a call is wanted together with its gradient; it takes memory."""

    def predicted(self, count: int) -> None:
        """The batch makes so many predictions; backward passes follow."""

    def gradient(self, site: SiteFacts, data: Any, gradient: Tensor, mask: Tensor | None) -> bool:
        """The gradient of a call's output, with what was kept; whether it is finite."""

    def start(self, exponent: int) -> None:
        """A backward pass begins, whose gradients are to be multiplied by ``2^exponent``."""

    def end(self) -> None:
        """A backward pass has ended."""


class Sums(Visitor, Protocol):
    """A visitor that sums up statistics."""

    def reduce(self, processes: Processes) -> None:
        """Add up what all processes have seen; each of them goes on with the sums of all."""

    def finish(self, site: SiteFacts, predictions: int, found: Moments) -> Moments:
        """The moments of a site, with the means; the sums are given up.

        Args:
            site: asked about once.
            predictions: that gradients are a mean over.
            found: of other sums.
        """


class Several(Sums):
    """Sums that see one pass together."""

    def __init__(self, visitors: Sequence[Sums]) -> None:
        self.visitors = visitors
        self.backward = any(each.backward for each in visitors)

    def begin(self, batch: int) -> None:
        for each in self.visitors:
            each.begin(batch)

    def input(self, site: SiteFacts, data: Tensor, mask: Tensor | None) -> bool:
        finite = [each.input(site, data, mask) for each in self.visitors]
        return all(finite)

    def keep(self, site: SiteFacts, data: Tensor) -> list[Any]:
        return [each.keep(site, data) for each in self.visitors]

    def predicted(self, count: int) -> None:
        for each in self.visitors:
            each.predicted(count)

    def gradient(
        self, site: SiteFacts, data: list[Any], gradient: Tensor, mask: Tensor | None
    ) -> bool:
        pairs = zip(self.visitors, data, strict=True)
        finite = [each.gradient(site, kept, gradient, mask) for each, kept in pairs]
        return all(finite)

    def start(self, exponent: int) -> None:
        for each in self.visitors:
            each.start(exponent)

    def end(self) -> None:
        for each in self.visitors:
            each.end()

    def reduce(self, processes: Processes) -> None:
        for each in self.visitors:
            each.reduce(processes)

    def finish(self, site: SiteFacts, predictions: int, found: Moments) -> Moments:
        for each in self.visitors:
            found = each.finish(site, predictions, found)
        return found


def same_samples(site: SiteFacts, first: int, now: int) -> None:
    """Require that two calls of one layer are about the same samples.

    Raises:
        CalibrationError: they are not.
    """
    if first != now:
        raise CalibrationError(
            f"{site.name} is called on {first} samples and on {now} in one pass, so that the "
            "gradient of its weight cannot be told sample by sample: choose metric: {kind: kfac}, "
            "or exclude the layer (unless: [{name: ...}])"
        )
