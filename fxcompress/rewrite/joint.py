"""Rewritten layers that have a part in common, computed once per forward pass.

before::

    q_proj, k_proj, v_proj = nn.Linear, nn.Linear, nn.Linear

after::

    q_proj = JointMember(shared=..., body=...)      # holds the shared part
    k_proj, v_proj = JointMember(body=...), ...     # refer to it

Each layer is still called by itself, at its own place in the model's ``forward``: nothing
is known of the others but that they are given the same input.  So the first one that is asked
computes the shared part, and keeps it until all of them had it.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxcompress.forms import JointForm, Rank
from fxcompress.forms.body import Member, dense_bias_of, dense_weight_of
from fxcompress.rewrite.facade import Factorized


@dataclass(frozen=True, eq=False)
class _Computed:
    """Values of the shared part, and all that they hold for.

    Attributes:
        x: the input.
        state: what else decides the values, or the graph of autograd behind them.
        values: of the shared part.
        versions: of the values, as they were computed.
        served: members that had them.
    """

    x: weakref.ref[Tensor]
    state: tuple[Any, ...]
    values: tuple[Tensor, ...]
    versions: tuple[int, ...]
    served: frozenset[int]


class Shared:
    """The shared part of several layers with its last values.

    Values are handed out again only to a member that did not have them yet, for the same
    tensor object in the same version, with the parameters, the gradient and autocast modes and
    the hooks on saved tensors as they were.  So a second pass over the same tensor, an input
    that was changed in place, an optimizer's step and the recomputation of a checkpointed
    segment all compute anew.  Once every member was served nothing is kept.

    Where versions do not exist (tensors made in ``torch.inference_mode``), every member computes
    the shared part for itself: correct, and no faster than layers of their own.  So it does while
    torch compiles, where nothing tells of a write to the input.  In graphs for training the
    compiler merges what is computed twice; in graphs for inference it does not (torch 2.13).

    Attributes:
        module: maps the input to a tuple of values.
        members: how many layers share it.
    """

    def __init__(self, module: fx.GraphModule, members: int) -> None:
        self.module = module
        self.members = members
        self._computed: _Computed | None = None

    def values(self, x: Tensor, member: int) -> tuple[Tensor, ...]:
        """The values for an input (..., n), as seen by one of the members."""
        if torch.compiler.is_compiling() or x.is_inference():
            return self._compute(x)
        state = self._state(x)
        known = self._computed
        if known is not None and _holds(known, x, state, member):
            known = replace(known, served=known.served | {member})
        else:
            values = self._compute(x)
            versions = tuple(value._version for value in values)
            known = _Computed(
                weakref.ref(x, self._forget), state, values, versions, frozenset([member])
            )
        self._computed = None if len(known.served) == self.members else known
        return known.values

    def _compute(self, x: Tensor) -> tuple[Tensor, ...]:
        values: tuple[Tensor, ...] = self.module(x)
        return values

    def _state(self, x: Tensor) -> tuple[Any, ...]:
        return (
            x._version,
            torch.is_grad_enabled(),
            torch.is_autocast_enabled(x.device.type),
            torch.get_autocast_dtype(x.device.type),
            torch._C._autograd._top_saved_tensors_default_hooks(True),
            tuple((id(p), p._version, p.requires_grad) for p in self.module.parameters()),
        )

    def _forget(self, x: weakref.ref[Tensor]) -> None:
        if self._computed is not None and self._computed.x is x:
            self._computed = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_computed": None}


def _holds(known: _Computed, x: Tensor, state: tuple[Any, ...], member: int) -> bool:
    return (
        known.x() is x
        and known.state == state
        and member not in known.served
        and all(v._version == n for v, n in zip(known.values, known.versions, strict=True))
    )


class JointMember(Factorized):
    """One of several factorized operators with a shared part.

    Attributes:
        joint: the shared part; the first member holds its parameters as ``shared``.
        index: which of the members this is.
    """

    joint: Shared

    def __init__(
        self,
        original: nn.Module,
        head: fx.GraphModule,
        form: JointForm,
        rank: Rank,
        joint: Shared,
        index: int,
    ) -> None:
        super().__init__(original, head, form, rank)
        self.joint = joint
        self.index = index
        if index == 0:
            self.shared = joint.module
        self.train(original.training)

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        (x,) = (*args, *kwargs.values())
        out: Tensor = self.body(x, *self.joint.values(x, self.index))
        return out

    def _whole(self) -> nn.Module:
        return Member(self.joint.module, self.body)

    def _weight(self) -> Tensor:
        return dense_weight_of(self._whole(), self.shape.in_features)

    def _bias(self) -> Tensor | None:
        if not self.shape.bias:
            return None
        assert isinstance(self.kind, JointForm)
        kept = self.kind.bias(self.body)
        return dense_bias_of(self._whole(), self.shape.in_features) if kept is None else kept
