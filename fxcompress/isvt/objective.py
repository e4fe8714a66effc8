"""What the rounds of ISVT descend on, and batches cut into pieces that fit the memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_flatten, tree_unflatten

from fxcompress.graph.inputs import (
    Forward,
    device_of,
    run_model,
    to_device,
)
from fxcompress.graph.padding import NONE, Padding, follow_padding, settle
from fxcompress.isvt.features import Features, Outputs
from fxcompress.metric.output import Loss, NotFinite, OutputKind, divergence_sum, loss_sum


@dataclass(frozen=True, eq=False)
class Objective:
    """A mean over predictions: the KL divergence from the dense model, or the user's loss.

    Attributes:
        dense: the dense model, in eval mode; None for a loss.
        loss: the user's; None for the divergence.
        output: families of the outputs, for the divergence.
        forward: how to call a model on a batch.
        features: what is added to the divergence; None for nothing.
    """

    dense: nn.Module | None
    loss: Loss | None
    output: OutputKind
    forward: Forward | None
    features: Features | None = None

    def sum(self, model: nn.Module, batch: Any, reference: Any = None) -> tuple[Tensor, int]:
        """Sum over the predictions of a batch, in nats, differentiable; and how many they are.

        Args:
            model: to judge.
            batch: that it is given.
            reference: what the dense model says of the batch, if that is known.

        Raises:
            CalibrationError: the loss fails or is not one value per prediction, or outputs are not
                finite.
        """
        features = self.features
        with follow_padding(model, batch) as (batch, mask):
            with self._watched(model, mask) as own:
                result = run_model(model, batch, self.forward)
            if self.loss is not None:
                return loss_sum(self.loss, result, to_device(batch, device_of(model)), mask)
        settle(mask, result)
        with self._watched(self.dense) as wanted:
            if reference is None or features is not None:
                reference = self.reference(batch)
        total, count = divergence_sum(reference, result, self.output, mask)
        if features is not None:
            distance = features.distance(wanted, own)
            total = total + count * distance.to(total.device)
        return total, count

    @torch.no_grad()
    def reference(self, batch: Any) -> Any:
        """What the dense model says of a batch; None if it is not asked."""
        return None if self.dense is None else run_model(self.dense, batch, self.forward)

    def _watched(
        self, model: nn.Module | None, mask: Padding = NONE
    ) -> AbstractContextManager[Outputs]:
        if self.features is None or model is None:
            return nullcontext({})
        return self.features.outputs(model, mask)

    @torch.no_grad()
    def mean(
        self, model: nn.Module, batches: Sequence[Any], references: Sequence[Any] = ()
    ) -> float:
        """The objective on batches; infinite if it is not finite, or outputs are not.

        Args:
            model: to judge.
            batches: that it is given.
            references: what the dense model says of each, if that is known.
        """
        total, predictions = 0.0, 0
        for batch, reference in itertools.zip_longest(batches, references):
            try:
                value, count = self.sum(model, batch, reference)
            except NotFinite:
                return float("inf")
            total += float(value)
            predictions += count
        mean = total / max(predictions, 1)
        return mean if mean < float("inf") else float("inf")  # NaN, too


def references(objective: Objective, batches: Sequence[Any], memory: float) -> list[Any]:
    """What the dense model says of batches that will be asked about again and again.

    Args:
        objective: has the dense model.
        batches: to ask about.
        memory: in bytes; if they need more, nothing is kept.
    """
    out, size = [], 0
    for batch in batches:
        out.append(objective.reference(batch))
        leaves = tree_flatten(dict(out[-1]) if isinstance(out[-1], Mapping) else out[-1])[0]
        size += sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))
        if size > memory:
            return []
    return out


def samples(batch: Any) -> int | None:
    """How many samples a batch holds; None if it cannot be cut: tensors of unequal length."""
    leaves = tree_flatten(dict(batch) if isinstance(batch, Mapping) else batch)[0]
    lengths = {len(leaf) if leaf.dim() else None for leaf in leaves if isinstance(leaf, Tensor)}
    return lengths.pop() if len(lengths) == 1 else None


def pieces(batch: Any, size: int | None) -> Iterator[Any]:
    """A batch cut along the first dimension into pieces of at most so many samples."""
    count = samples(batch)
    if size is None or count is None or count <= size:
        yield batch
        return
    leaves, tree = tree_flatten(dict(batch) if isinstance(batch, Mapping) else batch)
    for start in range(0, count, size):
        parts = [x[start : start + size] if isinstance(x, Tensor) else x for x in leaves]
        yield tree_unflatten(parts, tree)


@torch.enable_grad()
def fitting(objective: Objective, model: nn.Module, batch: Any, memory: float) -> int | None:
    """How many samples fit into an amount of memory, by what autograd keeps for one of them.

    Args:
        objective: that is differentiated.
        model: whose parameters learn.
        batch: one of those to come.
        memory: in bytes, for what is kept between forward and backward.

    Returns:
        At least 1; None if the batch cannot be cut: tensors of unequal length, a model that
        takes batches of one size only, or one in which samples depend on one another.
    """
    count = samples(batch)
    if count is None or count <= 1:
        return count or None
    kept: dict[int, int] = {}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in parameters:
            kept[place] = tensor.untyped_storage().nbytes()
        return tensor

    piece = next(pieces(batch, 1))
    try:
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            value, _ = objective.sum(model, piece)
            del value
    except Exception:
        return None  # it insists on its batch size
    size = max(1, int(memory // max(sum(kept.values()), 1)))
    return size if size >= count or _alone(objective, model, batch, piece) else None


@torch.no_grad()
def _alone(objective: Objective, model: nn.Module, batch: Any, piece: Any) -> bool:
    """Whether the first sample of a batch fares alone as among the others."""
    among, alone = (
        tree_flatten(dict(out) if isinstance(out, Mapping) else out)[0]
        for out in (run_model(model, each, objective.forward) for each in (batch, piece))
    )
    pairs = [
        (one[: len(other)].double(), other.double())
        for one, other in zip(among, alone, strict=False)
        if isinstance(one, Tensor) and isinstance(other, Tensor) and one.is_floating_point()
        and one.dim() and one.shape[1:] == other.shape[1:]
    ]  # fmt: skip
    return all(
        float((one - other).norm()) <= 1e-3 * float(one.norm()) + 1e-12 for one, other in pairs
    )
