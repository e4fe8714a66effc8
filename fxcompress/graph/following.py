"""Follow marks of padding through a forward pass, operator by operator.

Every tensor has marks (:mod:`fxcompress.graph.marks`) *by storage*: one a storage entry, read with
the tensor's own sizes and strides.  So views need no rule, and a write through one is seen in
all.  Below autograd and vmap few operators remain: what computes entry by entry is known by its
tag; what moves entries is run on the marks; reductions, products, convolutions and attention have
a rule each.  After any other operator it is unknown which rows are padding, and why.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from fxcompress.graph.follow_rules import WRITES, AtenCall, constant
from fxcompress.graph.marks import PAD, Unfollowed


@dataclass(eq=False)
class _Shadow:
    """Marks of a storage.

    Attributes:
        alive: says whether the storage still is.
        marks: one for each entry.
        itemsize: of an entry, in bytes.
        soft: the values are derived from a mask itself: where they meet others, these decide.
        lost: why nothing is known any more; empty if all is.
    """

    alive: Any
    marks: Tensor
    itemsize: int
    soft: bool
    lost: str = ""


class Following(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, knows which entries of which tensors belong to padding."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._shadows: dict[int, _Shadow] = {}
        self._sweep = 1024

    # ---- reading and writing -----------------------------------------------------

    def marks(self, tensor: Tensor) -> Tensor | None:
        """Marks of a tensor's entries, of its shape; None if all are neutral.

        Raises:
            Unfollowed: they are not known.
        """
        shadow = self._shadow(tensor)
        if shadow is None:
            return None
        if shadow.lost:
            raise Unfollowed(shadow.lost)
        return _viewed(shadow, tensor)

    def _read(self, tensor: Tensor, soft: bool) -> Tensor | None:
        shadow = self._shadow(tensor)
        hidden = shadow is None or (shadow.soft and not soft)
        return None if hidden else self.marks(tensor)

    def mark(self, tensor: Tensor, marks: Tensor | None, *, soft: bool = False) -> None:
        """Set the marks of a tensor's entries; they broadcast.  None makes them neutral."""
        shadow = self._shadow(tensor)
        if shadow is None:
            if marks is None or not tensor.numel():
                return
            shadow = self._new(tensor, marks.dtype, soft)
        if shadow.itemsize != tensor.element_size():
            shadow.lost = shadow.lost or "a value is written to as one of another type"
            return
        if marks is not None and marks.dtype.itemsize > shadow.marks.dtype.itemsize:
            shadow.marks = shadow.marks.to(marks.dtype)
        shadow.soft = soft if shadow.marks.numel() == tensor.numel() else shadow.soft and soft
        if shadow.marks.numel() == tensor.numel():
            shadow.lost = ""
        view = _viewed(shadow, tensor)
        with torch.no_grad():
            if marks is None:
                view.zero_()
            else:
                view.copy_(marks.expand(tensor.shape))

    def lose(self, tensor: Tensor, why: str, *, soft: bool = False) -> None:
        """From here on it is not known which entries of a tensor are padding."""
        if not tensor.numel():
            return
        shadow = self._shadow(tensor) or self._new(tensor, torch.uint8, soft)
        shadow.lost, shadow.soft = why, shadow.soft and soft

    def _new(self, tensor: Tensor, dtype: torch.dtype, soft: bool) -> _Shadow:
        storage = tensor.untyped_storage()
        if len(self._shadows) >= self._sweep:
            gone = [key for key, each in self._shadows.items() if each.alive.expired()]
            for key in gone:
                del self._shadows[key]
            self._sweep = 2 * len(self._shadows) + 1024
        size = tensor.element_size()
        entries = torch.zeros(storage.nbytes() // size, dtype=dtype, device=tensor.device)
        alive = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        shadow = _Shadow(alive, entries, size, soft)
        self._shadows[storage._cdata] = shadow
        return shadow

    def _shadow(self, tensor: Tensor) -> _Shadow | None:
        try:
            key = tensor.untyped_storage()._cdata
        except (NotImplementedError, RuntimeError):
            return None  # without memory of its own: sparse, or wrapped
        found = self._shadows.get(key)
        if found is not None and found.alive.expired():
            del self._shadows[key]
            return None
        return found

    def _blank(self, target: Tensor) -> None:
        """What token values are written to: what is left of a constant stands for no token."""
        if self._shadow(target) is not None or target.layout != torch.strided:
            return
        whole = torch.empty(0, dtype=target.dtype, device=target.device)
        whole.set_(target.untyped_storage())
        if whole.numel() and constant(whole):
            self._new(target, torch.uint8, soft=False).marks.fill_(PAD)

    def keep(self, tensors: list[Tensor]) -> None:
        """Forget all but these: what is known of them stays for as long as they do."""
        kept = {shadow for tensor in tensors if (shadow := self._shadow(tensor)) is not None}
        self._shadows = {key: each for key, each in self._shadows.items() if each in kept}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside is not followed."""
        with _disable_current_modes():
            yield

    # ---- one operator ------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        shadows = [shadow for each in given if (shadow := self._shadow(each)) is not None]
        if shadows and func._schema.name in WRITES and not all(each.soft for each in shadows):
            self._blank(args[0])
        out = func(*args, **kwargs)
        if not shadows:
            return out
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        mutable = func._schema.is_mutable
        if not mutable:
            places = {each.untyped_storage()._cdata for each in given}
            results = [
                each for each in results
                if each.layout == torch.strided and each.untyped_storage()._cdata not in places
            ]  # fmt: skip
            if not results:
                return out  # a view
        # What a mask itself was made to says nothing beside values of tokens.
        soft = all(shadow.soft for shadow in shadows)
        call = AtenCall(func, args, kwargs, results, partial(self._read, soft=soft))
        with torch.no_grad():
            try:
                found = call.follow()
            except Unfollowed as error:
                for each in results:
                    self.lose(each, str(error), soft=soft)
            else:
                for each, marks in zip(results, found, strict=True):
                    self.mark(each, marks, soft=soft)
        return out


def _viewed(shadow: _Shadow, tensor: Tensor) -> Tensor:
    marks, size = shadow.marks, tensor.element_size()
    if size < shadow.itemsize:  # a complex value seen as pairs
        marks = marks.repeat_interleave(shadow.itemsize // size)
    elif size > shadow.itemsize:
        group = size // shadow.itemsize
        marks = marks[: len(marks) // group * group].view(-1, group).amax(1)
    return marks.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
