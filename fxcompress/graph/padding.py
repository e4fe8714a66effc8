"""Which rows of which value are padding, in one forward pass over one batch.

A batch says it by a mask (batch x positions) beside its tensors::

    {"input_ids": ..., "attention_mask": ...}                       # of all but decoder_*
    {..., "decoder_input_ids": ..., "decoder_attention_mask": ...}  # of decoder_*
    {"src": ..., "src_key_padding_mask": ...}                       # of torch: true is padding

From these tensors it is followed through the operators (:mod:`fxcompress.graph.following`), to
wherever rows are flattened, routed, transposed, joined or picked.  A batch without a masked
position is not followed: all of its rows count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from fxcompress.errors import CalibrationError
from fxcompress.graph.eager import eager
from fxcompress.graph.following import Following
from fxcompress.graph.marks import PAD, Unfollowed, sample_marks

_IGNORED = -100
"""A label that is none, as torch and Hugging Face have it."""


class Padding:
    """What is known of the rows of a pass; by itself: of one without padding.

    Attributes:
        sizes: samples and positions of the tensors of the batch.
    """

    def __init__(self, sizes: frozenset[tuple[int, int]] = frozenset()) -> None:
        self.sizes = sizes

    def swapped(self, rows: Tensor) -> bool:
        """Whether rows (positions, samples, features) are, by their sizes, not samples first."""
        if rows.dim() != 3 or not self.sizes:
            return False
        first, second = rows.shape[:2]
        return (
            first != second
            and (second, first) in self.sizes
            and ((first, second) not in self.sizes)
        )

    def row_marks(self, rows: Tensor, where: str, dims: int = 1) -> Tensor | None:
        """Marks (:mod:`fxcompress.graph.marks`) of the rows of a value.

        Args:
            rows: the value (..., features), or (...) if ``dims`` is 0.
            where: named in errors.
            dims: how many dimensions make a row.

        Returns:
            (...); None if none of them is padding.

        Raises:
            CalibrationError: which of them are padding could not be followed.
        """
        return None

    def real(self, rows: Tensor, where: str, dims: int = 1) -> Tensor | None:
        """Which rows of a value count, as :meth:`row_marks`."""
        marks = self.row_marks(rows, where, dims)
        return None if marks is None else marks != PAD

    def clean(self, data: Tensor) -> Tensor:
        """A value with zeros for what is not finite at padding: nobody looks at it there."""
        return data

    def marks_of(self, value: Tensor) -> Tensor | None:
        """Marks of the entries of a value, of its shape; None if none of them is padding.

        Raises:
            CalibrationError: which of them are padding could not be followed.
        """
        return None

    def mark(self, value: Tensor, marks: Tensor | None) -> None:
        """Say of a value that was not computed here which entries are padding."""

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside is not followed."""
        yield


NONE = Padding()


class _Followed(Padding):
    def __init__(self, following: Following, sizes: frozenset[tuple[int, int]]) -> None:
        super().__init__(sizes)
        self.following = following

    def row_marks(self, rows: Tensor, where: str, dims: int = 1) -> Tensor | None:
        try:
            marks = self.following.marks(rows)
        except Unfollowed as error:
            raise CalibrationError(
                f"which rows of {where} are padding cannot be told: {error}; pass batches "
                "without padding (one sequence each, or sequences of one length) and a mask of ones"
            ) from error
        if marks is None:
            return None
        if dims:
            # A row is padding if there is padding in it, and nothing real.
            marks = marks.flatten(-dims).amax(-1)
        return marks if bool((marks == PAD).any()) else None

    def marks_of(self, value: Tensor) -> Tensor | None:
        try:
            marks = self.following.marks(value)
        except Unfollowed as error:
            raise CalibrationError(f"which rows are padding cannot be told: {error}") from error
        return None if marks is None else marks.clone()

    def mark(self, value: Tensor, marks: Tensor | None) -> None:
        if marks is not None:
            self.following.mark(value, marks)

    def clean(self, data: Tensor) -> Tensor:
        if not data.is_floating_point():
            return data
        try:
            marks = self.following.marks(data)
        except Unfollowed:
            return data
        if marks is None:
            return data
        return data.masked_fill((marks == PAD) & ~data.isfinite(), 0)

    @contextmanager
    def paused(self) -> Iterator[None]:
        with self.following.paused(), torch._C.DisableTorchFunction():
            yield


@contextmanager
def follow_padding(model: nn.Module, batch: Any) -> Iterator[tuple[Any, Padding]]:
    """Follow the padding of a batch through what runs inside.

    NaN at padding is set to zero as it arises where gradients are taken: an attention that sees
    nothing makes it, and its gradient would go to every key.

    Args:
        model: that runs inside.
        batch: see :mod:`fxcompress.graph.inputs`; it is not changed.

    Yields:
        The batch to run on, a copy if there is padding in it; and what is known of the rows, also
        afterwards of what :func:`settle` keeps.

    Raises:
        CalibrationError: a mask belongs to none of the tensors.
    """
    two = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    sources = [*_sources(batch, two)]
    sizes = frozenset(
        (leaf.shape[0], leaf.shape[1])
        for leaf in _leaves(batch)
        if isinstance(leaf, Tensor) and leaf.dim() in (2, 3)
    )
    if not sources:
        yield batch, Padding(sizes)
        return
    following = Following()
    batch = _copied(batch, following, {id(tensor): marks for tensor, *marks in sources})
    padding = _Followed(following, sizes)
    with ExitStack() as stack:
        stack.enter_context(eager())  # compiled regions hide their operators
        if torch.is_grad_enabled():
            stack.enter_context(_Guard(following))
        stack.enter_context(following)
        yield batch, padding


def settle(padding: Padding, *values: Any) -> None:
    """Forget what is known of all tensors but those in ``values``, for the sake of memory."""
    if isinstance(padding, _Followed):
        leaves = [leaf for leaf in _leaves(values) if isinstance(leaf, Tensor)]
        padding.following.keep(leaves)


# ---- what a batch says ----------------------------------------------------------------


def _sources(batch: Any, two: bool) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """Tensors of a batch with their marks, and whether they are masks themselves.

    Args:
        batch: or a part of one.
        two: whether the model has an encoder and a decoder.
    """
    if isinstance(batch, (list, tuple)):
        for each in batch:
            yield from _sources(each, two)
        return
    if not isinstance(batch, Mapping):
        return
    masks = _masks(batch)
    for value in batch.values():
        if isinstance(value, (Mapping, list, tuple)) and not masks:
            yield from _sources(value, two)
    for name, real in masks.items():
        if bool(real.all()):
            continue
        marks, used = sample_marks(real), False
        for key, value in batch.items():
            if _mask_of(key, masks, two or _decodes(batch)) != name:
                continue
            if key == name:
                yield value, marks, True
                continue
            for leaf in _leaves(value):
                fitted = _fitted(marks, leaf)
                if fitted is not None:
                    used = True
                    yield leaf, fitted, False
        if not used:
            raise CalibrationError(
                f"the batch's {name} of shape {tuple(real.shape)} masks positions, and no tensor "
                "beside it has such a batch and such positions: which rows of the layers are "
                "padding cannot be told; pass batches without padding, and a mask of ones"
            )
    labels = batch.get("labels")
    if two and isinstance(labels, Tensor) and not _decodes(batch):
        yield from _from_labels(labels)


def _masks(batch: Mapping[Any, Any]) -> dict[str, Tensor]:
    """The masks (batch x positions) of a batch by name, true where a position is real."""
    found = {}
    for key, value in batch.items():
        if not isinstance(value, Tensor) or value.dim() != 2:
            continue
        if key in ("attention_mask", "decoder_attention_mask"):
            found[key] = value.bool()
        elif str(key).endswith("key_padding_mask") and not str(key).startswith("memory"):
            found[key] = ~value if value.dtype == torch.bool else value == 0
    return found


def _mask_of(key: Any, masks: Mapping[str, Tensor], two: bool) -> str | None:
    """The name of the mask that an entry of a batch belongs to."""
    text = str(key)
    if text in masks:
        return text
    if text.endswith("mask"):
        return None
    for name in masks:
        prefix = name.removesuffix("key_padding_mask").removesuffix("_")
        if name.endswith("key_padding_mask") and prefix and text == prefix:
            return name
    if text.startswith("decoder_") or (text == "labels" and "decoder_attention_mask" in masks):
        return "decoder_attention_mask"
    if text == "labels" and two:
        return None
    if "attention_mask" in masks:
        return "attention_mask"
    return "key_padding_mask" if "key_padding_mask" in masks else None


def _decodes(batch: Mapping[Any, Any]) -> bool:
    return any(str(key).startswith("decoder_") for key in batch)


def _from_labels(labels: Tensor) -> Iterator[Any]:
    """Labels that a decoder's inputs are made of: shifted by one, and -100 where there are none."""
    if labels.dim() != 2 or not bool((labels == _IGNORED).any()):
        return
    real = torch.ones_like(labels, dtype=torch.bool)
    real[:, :-1] = labels[:, 1:] != _IGNORED
    yield labels, sample_marks(real), False


def _fitted(marks: Tensor, value: Any) -> Tensor | None:
    """Marks (batch x positions) as those of a tensor that has both dimensions."""
    if not isinstance(value, Tensor) or value.dim() < 2:
        return None
    batch, positions = marks.shape
    rest = (1,) * (value.dim() - 2)
    if value.shape[:2] == (batch, positions):
        return marks.reshape(batch, positions, *rest)
    if value.dim() > 2 and value.shape[:2] == (positions, batch):
        return marks.T.reshape(positions, batch, *rest)
    if value.dim() > 2 and value.shape[0] == batch and value.shape[-1] == positions:
        return marks.reshape(batch, *rest, positions)
    return None


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return [leaf for each in value.values() for leaf in _leaves(each)]
    if isinstance(value, (list, tuple)):
        return [leaf for each in value for leaf in _leaves(each)]
    if isinstance(value, Tensor):
        return [value]
    fields = vars(value).values() if hasattr(value, "__dict__") else tree_leaves(value)
    return [leaf for leaf in fields if isinstance(leaf, Tensor)]


def _copied(batch: Any, following: Following, marks: Mapping[int, Any]) -> Any:
    """A batch with marked copies: no two of them share memory."""
    if isinstance(batch, Tensor):
        if id(batch) not in marks:
            return batch
        found, soft = marks[id(batch)]
        copy = batch.detach().clone(memory_format=torch.contiguous_format)
        following.mark(copy, found.to(copy.device), soft=soft)
        return copy.requires_grad_(batch.requires_grad)
    if isinstance(batch, Mapping):
        return {key: _copied(value, following, marks) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        parts = [_copied(each, following, marks) for each in batch]
        named = hasattr(batch, "_fields")
        return type(batch)(*parts) if named else type(batch)(parts)
    return batch


# ---- NaN at padding -------------------------------------------------------------------


class _Guard(TorchFunctionMode):
    """Keeps NaN at padding from spreading through a backward pass.

    Where an operator returns NaN at padding, zeros take its place, and the gradients that it
    passes on to padding are kept free of NaN.
    """

    def __init__(self, following: Following) -> None:
        super().__init__()
        self.following = following

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        if not isinstance(out, Tensor) or not out.is_floating_point():
            return out
        if any(out is leaf for leaf in args):
            return out
        bad = self._bad(out)
        if bad is None:
            return out
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                padded = self._padded(leaf)
                if padded is not None:
                    leaf.register_hook(partial(_cleared, padded))  # type: ignore[no-untyped-call]
        return out.masked_fill(bad, 0)

    def _padded(self, tensor: Tensor) -> Tensor | None:
        try:
            marks = self.following.marks(tensor)
        except Unfollowed:
            return None
        return None if marks is None else marks == PAD

    def _bad(self, tensor: Tensor) -> Tensor | None:
        with self.following.paused():
            padded = self._padded(tensor)
            if padded is None:
                return None
            bad = padded & tensor.detach().isnan()
            return bad if bool(bad.any()) else None


def _cleared(padded: Tensor, gradient: Tensor) -> Tensor:
    return gradient.masked_fill(padded & gradient.isnan(), 0)
