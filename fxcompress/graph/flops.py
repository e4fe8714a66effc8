"""Count the floating point operations of a forward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from fxcompress.graph.randomness import draws

_DISABLED = torch._C._disabled_torch_dispatch_impl


class FlopCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what runs inside, by the formulas of ``torch.utils.flop_counter``.

    Not torch's own ``FlopCounterMode``: to count by module, that one hooks into every module
    call of the process and asks for the gradient functions of arguments, which a view of a
    parameter has none of under ``no_grad``; and it lets no nested tensor and no higher-order
    operator pass.

    Attributes:
        total: operations so far; two for a multiply-accumulate.
        drew: whether one of them drew random numbers.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0
        self.drew = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(each.__torch_dispatch__ is not _DISABLED for each in types):
            return NotImplemented  # what such a class computes with plain tensors comes by again
        if func is torch.ops.higher_order.cond:
            chosen, yes, no, operands = args
            with self:
                return (yes if chosen else no)(*operands)
        if not isinstance(func, torch._ops.OpOverload):
            return func(*args, **kwargs)  # what other higher-order operators do inside is not seen
        if func._can_decompose():
            with self:
                return func.decompose(*args, **kwargs)
        self.drew = self.drew or draws(func)
        out = func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=out)
        return out
