"""The units of budgets, one class each: what it counts, and how amounts of it are written.

A new unit is a class here and its place in :data:`UNITS`: rule files, plans, budgets and reports
know it from there.  Known without torch, so that rules can be checked without it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeAlias


class Unit(ABC):
    """What a budget is about.

    Attributes:
        word: as rule files and plans have it.
        text: as reports have it.
        one: a single one, ``"parameter"``.
    """

    word: str
    text: str
    one: str

    def amount(self, number: float) -> str:
        """An amount to the last digit: ``884,736``."""
        return f"{number:,.0f}"

    def named(self, number: float) -> str:
        """An amount with its unit: ``884,736 parameters``."""
        return f"{self.amount(number)} {self.text}"


class CountedUnit(Unit):
    """A unit that follows from shapes, exactly; biases count.

    Attributes:
        per_row: whether it counts for every row of the recorded example, or once for the weights.
        exact: whether tables show all digits.
    """

    per_row = False
    exact = False

    @abstractmethod
    def of_operator(self, shape: Any) -> int:
        """Amount of an operator as it is.

        Args:
            shape: its shape (:mod:`fxcompress.operators.shape`).
        """

    @abstractmethod
    def of_form(self, form: Any, ranks: Any) -> Any:
        """Amounts of a form in place of operators, all together, at each rank.

        Args:
            form: with its operators (:class:`fxcompress.forms.Fitted`).
            ranks: (k), or pairs of ranks (k x 2).

        Returns:
            At each rank (k), integers.
        """

    @abstractmethod
    def of_head(self, head: Any, shape: Any) -> int:
        """Amount of one operator's own part of a joint body.

        Args:
            head: the module.
            shape: of the operator that it stands for.
        """

    def of_channels(self, held: Any, channels: int) -> int:
        """Amount of what is held of some channels.

        Args:
            held: of one channel each (:class:`fxcompress.operators.per_channel.PerChannel`).
            channels: how many.
        """
        return channels * sum(getattr(each, self.word, 0) for each in held)

    @abstractmethod
    def of_model(self, model: Any, recording: Any) -> int:
        """Amount of a whole model.

        Args:
            model: a module.
            recording: of it (:class:`fxcompress.graph.recorder.Recording`).
        """


class _Parameters(CountedUnit):
    """Entries of parameters."""

    word, text, one = "parameters", "parameters", "parameter"
    exact = True

    def of_operator(self, shape: Any) -> int:
        return int(shape.weights) + _biases(shape)

    def of_form(self, form: Any, ranks: Any) -> Any:
        return form.parameters(ranks) + _biases(*form.shapes)

    def of_head(self, head: Any, shape: Any) -> int:
        return sum(parameter.numel() for parameter in head.parameters())

    def of_model(self, model: Any, recording: Any) -> int:
        return self.of_head(model, None)


class _Macs(CountedUnit):
    """Multiply-accumulates of the recorded example; adding a bias is none."""

    word, text, one = "macs", "MACs", "MAC"
    per_row = True

    def of_operator(self, shape: Any) -> int:
        return int(shape.macs)

    def of_form(self, form: Any, ranks: Any) -> Any:
        return form.macs(ranks)

    def of_head(self, head: Any, shape: Any) -> int:
        weights = PARAMETERS.of_head(head, shape) - _biases(shape)
        return weights * int(shape.rows)

    def of_model(self, model: Any, recording: Any) -> int:
        return int(recording.macs)


class _Bytes(CountedUnit):
    """Bytes of parameters and buffers as stored."""

    word, text, one = "bytes", "bytes", "byte"

    def of_operator(self, shape: Any) -> int:
        return PARAMETERS.of_operator(shape) * int(shape.dtype.itemsize)

    def of_form(self, form: Any, ranks: Any) -> Any:
        return form.bytes(ranks) + _biases(*form.shapes) * form.shapes[0].dtype.itemsize

    def of_head(self, head: Any, shape: Any) -> int:
        tensors = (*head.parameters(), *head.buffers())
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def of_model(self, model: Any, recording: Any) -> int:
        return self.of_head(model, None)


class _Latency(Unit):
    """Seconds, measured on this machine operator by operator."""

    word, text, one = "latency", "measured time", "second"

    def amount(self, number: float) -> str:
        return f"{1e3 * number:.3g} ms"

    def named(self, number: float) -> str:
        return self.amount(number)


def _biases(*shapes: Any) -> int:
    """Entries of the biases of operators."""
    return sum(shape.out_features for shape in shapes if shape.bias)


PARAMETERS = _Parameters()
MACS = _Macs()

UNITS: Mapping[str, Unit] = {unit.word: unit for unit in (PARAMETERS, MACS, _Bytes(), _Latency())}
"""All units by their words, in the order in which reports have them."""

COUNTED = tuple(unit for unit in UNITS.values() if isinstance(unit, CountedUnit))
"""Units of which every operator and every model has an amount."""

if TYPE_CHECKING:
    UnitWord: TypeAlias = str
    CountedWord: TypeAlias = str
else:
    UnitWord = Literal[tuple(UNITS)]
    CountedWord = Literal[tuple(unit.word for unit in COUNTED)]
