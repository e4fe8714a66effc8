"""The module that stands where an operator stood.

A bare ``nn.Sequential`` in the place of an ``nn.Linear`` breaks models that read
``.weight``, ``.out_features`` or ``.bias`` of their layers.  The facade runs the factorized
body (an ``fx.GraphModule``) and still answers to all that.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from fxcompress.forms import Form, JointForm, Rank
from fxcompress.operators.modules import shape_of
from fxcompress.rewrite.lazy import lazy, read_only

_OWN = {*nn.Module().__dict__, "training"}


class Factorized(nn.Module):
    """A factorized operator with the attributes of the one that it replaces.

    Attributes:
        body: the fx graph that runs; its parameters are ordinary, trainable ones.
        form: name of the form.
        kind: the form itself.
        rank: its rank.
        shape: of the operator that it replaces; ``weight`` is reported in the layout in which
            that one stored it.
    """

    body: fx.GraphModule

    def __init__(
        self, original: nn.Module, body: fx.GraphModule, form: Form | JointForm, rank: Rank
    ) -> None:
        super().__init__()
        for key, value in original.__dict__.items():
            if key not in _OWN:
                self.__dict__[key] = value
        self.form = form.name
        self.kind = form
        self.rank = rank
        self.shape = shape_of(original)
        self.stored_size = tuple(original.weight.shape)  # type: ignore[arg-type]
        self.replaces = type(original).__name__
        self.body = body
        self.train(original.training)

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        # nn.Linear calls its argument ``input``, Hugging Face's Conv1D ``x``; it may be named.
        (value,) = (*args, *kwargs.values())
        out: Tensor = self.body(value)
        return out

    @property
    def weight(self) -> Tensor:
        """The dense weight that the factors stand for: differentiable, computed on demand.

        A write to it, or to a view of it, raises ``RuntimeError``.
        """
        return lazy(self.stored_size, next(self._whole().parameters()), self.dense)

    def dense(self) -> Tensor:
        """The dense weight, computed at once."""
        return self.shape.stored(self._weight())

    @property
    def bias(self) -> Tensor | None:
        """The dense bias: the parameter itself if the form keeps it, or computed; None without one.

        A write to a computed one raises.
        """
        bias = self._bias()
        return None if bias is None else read_only(bias)

    def _whole(self) -> nn.Module:
        """All that computes this operator."""
        return self.body

    def _weight(self) -> Tensor:
        assert isinstance(self.kind, Form)
        return self.kind.weight(self.body, self.shape)

    def _bias(self) -> Tensor | None:
        assert isinstance(self.kind, Form)
        return self.kind.bias(self.body, self.shape)

    def extra_repr(self) -> str:
        return f"{self.replaces} as {self.form} of rank {self.rank}"

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("weight", "bias"):
            raise AttributeError(
                f"{name} of a factorized layer is computed from its factors and cannot be "
                "assigned; train or replace the parameters of .body"
            )
        super().__setattr__(name, value)
