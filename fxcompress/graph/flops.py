"""Count the floating point operations of a forward pass."""

from __future__ import annotations

from typing import Any

from torch.utils.flop_counter import FlopCounterMode


class _NoModules:
    """Stands in for torch's ``ModuleTracker``: everything counts for the whole."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


class FlopCounter(FlopCounterMode):
    """torch's counter, without its count by module.

    To tell modules apart it hooks into every module call of the process and asks for the
    gradient functions of its arguments, which a view of a parameter under ``no_grad`` has not.
    """

    def __init__(self) -> None:
        super().__init__(display=False)
        self.mod_tracker: Any = _NoModules()
