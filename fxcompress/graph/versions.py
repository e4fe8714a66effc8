"""Tell whether a tensor was written to between two looks at it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from torch import Tensor

Version = tuple[int, int]


class Versions:
    """Versions of tensors: two looks at one tensor saw the same values if these are equal.

    ``_version`` alone is not enough: ``x.data`` has a counter of its own, and tensors made in
    inference mode have none.  So writes are counted per storage as well, as they are seen.
    """

    def __init__(self) -> None:
        self.writes: dict[int, int] = defaultdict(int)

    def of(self, tensor: Tensor) -> Version:
        """The version of a tensor."""
        return counter(tensor), self.writes.get(storage(tensor), 0)

    def notice(self, name: str, arguments: Sequence[Tensor], before: Sequence[int]) -> None:
        """Count the writes of a function call.

        Args:
            name: of the function.
            arguments: tensors that it was given.
            before: their counters when it was called.
        """
        for index, (tensor, count) in enumerate(zip(arguments, before, strict=True)):
            unseen = index == 0 and tensor.is_inference() and writes_in_place(name)
            if unseen or counter(tensor) != count:
                self.writes[storage(tensor)] += 1


def counter(tensor: Tensor) -> int:
    """Torch's own count of writes; -1 for a tensor without one."""
    return -1 if tensor.is_inference() else tensor._version


def storage(tensor: Tensor) -> int:
    """Address of a tensor's memory; 0 if it has none of its own (meta, vmap, sparse)."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):
        return 0


def writes_in_place(name: str) -> bool:
    """Whether a torch function writes to its first argument, by its name.

    >>> [writes_in_place(name) for name in ("relu_", "__setitem__", "__iadd__")]
    [True, True, True]
    >>> [writes_in_place(name) for name in ("relu", "__add__", "__invert__")]
    [False, False, False]
    """
    if name.startswith("__"):
        return name in ("__setitem__", "__set__") or (
            name.startswith("__i") and hasattr(Tensor, f"__{name[3:]}")
        )
    return name.endswith("_")
