"""The module that stands where an operator stood.

A bare ``nn.Sequential`` in the place of an ``nn.Linear`` breaks models that read
``.weight``, ``.out_features`` or ``.bias`` of their layers.  The facade runs the factorized
body (an ``fx.GraphModule``) and still answers to all that.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from fxcompress.forms import Form, JointForm
from fxcompress.graph.canonical import is_hf_conv1d
from fxcompress.rewrite.lazy import lazy
from fxcompress.rewrite.shape import linear_shape

_OWN = {*nn.Module().__dict__, "training"}


class Factorized(nn.Module):
    """A factorized operator with the attributes of the one that it replaces.

    Attributes:
        body: the fx graph that runs; its parameters are ordinary, trainable ones.
        form: name of the form.
        kind: the form itself.
        rank: its rank.
        shape: of the operator that it replaces.
        transposed: ``weight`` is reported as (in x out), as Hugging Face's ``Conv1D`` has it.
    """

    body: fx.GraphModule

    def __init__(
        self, original: nn.Module, body: fx.GraphModule, form: Form | JointForm, rank: int
    ) -> None:
        super().__init__()
        for key, value in original.__dict__.items():
            if key not in _OWN:
                self.__dict__[key] = value
        self.form = form.name
        self.kind = form
        self.rank = rank
        self.shape = linear_shape(original)
        self.transposed = is_hf_conv1d(original)
        self.replaces = type(original).__name__
        self.body = body
        self.train(original.training)

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        # nn.Linear calls its argument ``input``, Conv1D calls it ``x``; either may be named.
        (value,) = (*args, *kwargs.values())
        out: Tensor = self.body(value)
        return out

    @property
    def weight(self) -> Tensor:
        """The dense weight that the factors stand for: differentiable, computed on demand."""
        m, n = self.shape.out_features, self.shape.in_features
        size = (n, m) if self.transposed else (m, n)
        return lazy(size, next(self._whole().parameters()), self.dense)

    def dense(self) -> Tensor:
        """The dense weight, computed at once."""
        return self._weight().T if self.transposed else self._weight()

    @property
    def bias(self) -> Tensor | None:
        """The dense bias, likewise; None if there is none."""
        return self._bias()

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
