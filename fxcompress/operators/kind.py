"""What a kind of operators is: all that the package knows of it beside its shape."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from fxcompress.operators.calls import Application, Call
from fxcompress.operators.shape import CPU, Shape
from fxcompress.operators.words import AttributeValue


class Kind(ABC):
    """Operators that are recognized, measured and rewritten in the same way.

    Attributes:
        name: of its file.
        classes: of torch's modules that are operators of the kind.
        methods: of a class that make its operator what it is.
    """

    name: str
    classes: tuple[type[nn.Module], ...]
    methods: tuple[str, ...] = ("forward",)

    def owns(self, module: nn.Module) -> bool:
        """Whether a module is an operator of the kind, or of a class made from one."""
        return isinstance(module, self.classes)

    def is_plain(self, module: nn.Module) -> bool:
        """Whether a module computes what its base class does, in the same way."""
        base = next((cls for cls in self.classes if isinstance(module, cls)), None)
        own = type(module)
        return base is not None and all(
            getattr(own, method, None) is getattr(base, method, None) for method in self.methods
        )

    def attributes(
        self, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> dict[str, AttributeValue]:
        """Attributes of a module as it is called (without ``dtype``)."""
        return self.shape(module).attributes

    def op(self, module: nn.Module) -> str:
        """The canonical operator of a module."""
        return self.name

    def obstacle(self, attributes: Mapping[str, AttributeValue]) -> str | None:
        """Why an operator with these attributes cannot be rewritten; None if it can."""
        return None

    @abstractmethod
    def shape(self, module: Any) -> Shape:
        """Shape, type and device of a module of the kind."""

    @abstractmethod
    def parse(
        self, text: str, bias: bool, dtype: torch.dtype, device: torch.device = CPU
    ) -> Shape | None:
        """The shape that ``str()`` describes; None if the text is about another kind."""

    @abstractmethod
    def application(self, call: Call, is_weight: Callable[[Any], bool]) -> Application | None:
        """What a function call applies to what; None if it applies no weight of this kind.

        Args:
            call: of any function.
            is_weight: whether an argument is one.
        """
