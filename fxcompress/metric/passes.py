"""A pass over the calibration data that shows every site's inputs and output gradients.

Inputs are seen by a forward hook on the site's module, output gradients by a hook on the
*tensor* that it returns: module backward hooks break when an in-place activation follows.
Parameters need no gradient, so the backward pass is the cheap half of a training step.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fxcompress.errors import CalibrationError
from fxcompress.forms.shape import Shape
from fxcompress.graph.inputs import (
    Forward,
    device_of,
    output_mask,
    padding_mask,
    run_model,
    to_device,
)
from fxcompress.metric.output import Loss, OutputKind
from fxcompress.metric.starts import FisherKind, Start, backward_starts


class SiteFacts(Protocol):
    """What a pass needs to know of a site."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> Shape: ...
    @property
    def source(self) -> str: ...
    @property
    def calls(self) -> int: ...


InputKey = tuple[str, tuple[Any, ...]]


def input_key(site: SiteFacts) -> InputKey:
    """Equal for sites that see the same rows: the same value, read in the same way."""
    return site.source, site.shape.reading


class Visitor(Protocol):
    """What is done with the values of a pass.

    Attributes:
        backward: whether gradients are wanted.
    """

    backward: bool

    def input(self, site: SiteFacts, data: Tensor, mask: Tensor | None) -> bool:
        """The input of a call, once for all sites on it; whether it is finite."""

    def keep(self, site: SiteFacts, data: Tensor) -> Tensor | None:
        """What of the input of a call is wanted together with its gradient; it takes memory."""

    def predicted(self, count: int) -> None:
        """The batch makes so many predictions; backward passes follow."""

    def gradient(
        self, site: SiteFacts, data: Tensor | None, gradient: Tensor, mask: Tensor | None
    ) -> bool:
        """The gradient of a call's output, with what was kept; whether it is finite."""

    def end(self) -> None:
        """A backward pass has ended."""


@dataclass(frozen=True)
class Draws:
    """What the outputs of a model mean, and where the labels of its predictions come from.

    Attributes:
        output: the families of the outputs.
        fisher: how the mean over labels is taken.
        seed: of all that is drawn.
    """

    output: OutputKind = "auto"
    fisher: FisherKind = "sampled"
    seed: int = 0


DRAWS = Draws()


@dataclass(frozen=True)
class Passed:
    """How a pass went.

    Attributes:
        batches: number of batches seen.
        predictions: number of predictions in them, 0 without a backward pass.
        kind: output family, ``"loss"`` for a user's loss, ``"none"`` without a backward pass.
    """

    batches: int
    predictions: int
    kind: str


def run_pass(
    model: nn.Module,
    sites: Sequence[SiteFacts],
    batches: Iterable[Any],
    visitor: Visitor,
    *,
    drawn: Draws = DRAWS,
    loss: Loss | None = None,
    forward: Forward | None = None,
    tick: Callable[[], None] = lambda: None,
) -> Passed:
    """Run a model over batches and show a visitor what happens at its sites.

    Args:
        model: runs in eval mode; modes and ``requires_grad`` are restored afterwards.
        sites: each ``name`` is the path of a module.
        batches: see :mod:`fxcompress.graph.inputs`; gone through once.
        visitor: is shown the values.
        drawn: what the outputs mean, and where labels come from.
        loss: the user's own negative log-likelihood instead of all that.
        forward: how to call the model on a batch.
        tick: called after every batch.

    Raises:
        CalibrationError: no batches; a batch that the model rejects; values that are not
            finite (naming the site and the batch); a site that no data reached.
    """
    session = _Session(model, sites, visitor)
    generator = torch.Generator(device_of(model)).manual_seed(drawn.seed)
    count = predictions = 0
    kind = "none"
    with session.attached():
        for batch in batches:
            session.begin(count, padding_mask(batch))
            with torch.set_grad_enabled(visitor.backward):
                result = _forward(model, batch, forward, count)
                if visitor.backward:
                    with _named(count):
                        starts = backward_starts(
                            result, to_device(batch, device_of(model)), kind=drawn.output,
                            fisher=drawn.fisher, loss=loss, mask=output_mask(batch),
                            generator=generator,
                        )  # fmt: skip
                        visitor.predicted(starts.predictions)
                        for at, start in enumerate(starts.passes):
                            _backward(start, again=at + 1 < len(starts.passes))
                            visitor.end()
                    predictions += starts.predictions
                    kind = starts.kind
            count += 1
            tick()
    if not count:
        raise CalibrationError(
            "the metric needs calibration data, and the iterable given was empty "
            "or exhausted; pass a list of batches or a fresh DataLoader"
        )
    if visitor.backward and not predictions:
        raise CalibrationError(
            "the calibration batches hold no prediction at all: they are empty, or their "
            "attention_mask is zero everywhere"
        )
    session.require_reached()
    return Passed(count, predictions, kind)


def _forward(model: nn.Module, batch: Any, forward: Forward | None, index: int) -> Any:
    try:
        return run_model(model, batch, forward)
    except CalibrationError:
        raise
    except Exception as error:
        raise CalibrationError(
            f"the model rejected calibration batch {index}: {type(error).__name__}: {error}\n"
            "A batch is a tensor, a tuple (positional arguments) or a mapping (keyword "
            "arguments); for (input, label) pairs pass forward=lambda model, batch: model(batch[0])"
        ) from error


@contextmanager
def _named(index: int) -> Iterator[None]:
    """Lets every error say on which batch it happened."""
    try:
        yield
    except CalibrationError as error:
        if f"calibration batch {index}" in str(error):
            raise
        raise CalibrationError(f"on calibration batch {index}: {error}") from error


def _backward(start: Start, again: bool) -> None:
    if not any(tensor.requires_grad for tensor in start.tensors):
        raise CalibrationError(
            "no gradient reaches the model's output: it runs under no_grad or detaches its result; "
            "pass a forward= that does not, or choose metric: {kind: activation}"
        )
    try:
        pairs = zip(start.tensors, start.gradients, strict=True)
        needed = [(tensor, gradient) for tensor, gradient in pairs if tensor.requires_grad]
        tensors, gradients = zip(*needed, strict=True)
        torch.autograd.backward(tensors, gradients, retain_graph=again)
    except CalibrationError:
        raise
    except Exception as error:
        raise CalibrationError(
            f"the backward pass failed: {type(error).__name__}: {error}\n"
            "metric: {kind: activation} needs none"
        ) from error


@dataclass
class _Session:
    """The hooks of one pass."""

    model: nn.Module
    sites: Sequence[SiteFacts]
    visitor: Visitor
    mask: Tensor | None = None
    batch: int = 0

    def __post_init__(self) -> None:
        self.seen: dict[InputKey, list[tuple[weakref.ref[Tensor], int]]] = {}
        self.calls: dict[str, int] = {}
        self.reached: set[str] = set()

    @contextmanager
    def attached(self) -> Iterator[None]:
        training = [module for module in self.model.modules() if module.training]
        learning = [p for p in self.model.parameters() if p.requires_grad]
        handles = []
        try:
            self.model.eval()
            for parameter in learning:
                parameter.requires_grad_(False)
            for site in self.sites:
                module = self.model.get_submodule(site.name)
                handles.append(module.register_forward_hook(self._hook(site), with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()
            for parameter in learning:
                parameter.requires_grad_(True)
            for module in training:
                module.training = True

    def begin(self, batch: int, mask: Tensor | None) -> None:
        self.batch, self.mask = batch, None if mask is None else mask.to(device_of(self.model))
        self.seen = defaultdict(list)
        self.calls = defaultdict(int)

    def require_reached(self) -> None:
        unreached = [site.name for site in self.sites if site.name not in self.reached]
        if unreached:
            raise CalibrationError(
                f"no calibration data reached {', '.join(unreached[:5])}"
                f"{' and others' if len(unreached) > 5 else ''}: the layer runs on the example "
                "input but on none of the calibration batches"
            )

    def _hook(self, site: SiteFacts) -> Callable[[nn.Module, Any, Any, Tensor], Tensor | None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, out: Tensor) -> Tensor | None:
            data: Tensor = args[0] if args else next(iter(kwargs.values()))
            self._see_input(site, data)
            if not torch.is_grad_enabled():
                return None
            replaced = None
            if not out.requires_grad:
                # The first sites of the network; the clone is no leaf, so that an in-place
                # activation may follow.
                out = replaced = out.detach().requires_grad_().clone()
            kept = self.visitor.keep(site, data.detach())
            out.register_hook(partial(self._see_gradient, site, kept, self.mask))  # type: ignore[no-untyped-call]
            return replaced

        return hook

    def _see_input(self, site: SiteFacts, data: Tensor) -> None:
        if data.numel():
            self.reached.add(site.name)
        version = -1 if data.is_inference() else data._version
        call, self.calls[site.name] = self.calls[site.name], self.calls[site.name] + 1
        seen = self.seen[input_key(site)]
        if call < len(seen):
            if seen[call][0]() is data and seen[call][1] == version:
                return
            raise CalibrationError(
                f"{site.name} shared its input with another layer when the model was recorded, "
                f"but not on calibration batch {self.batch}; pass examples=[...] of both kinds"
            )
        seen.append((weakref.ref(data), version))
        self._require_finite(self.visitor.input(site, data.detach(), self.mask), site, "input")

    def _see_gradient(
        self, site: SiteFacts, data: Tensor | None, mask: Tensor | None, gradient: Tensor
    ) -> None:
        finite = self.visitor.gradient(site, data, gradient, mask)
        self._require_finite(finite, site, "output gradient")

    def _require_finite(self, finite: bool, site: SiteFacts, what: str) -> None:
        if not finite:
            raise CalibrationError(
                f"{what} of {site.name} has NaN or infinite values on calibration batch "
                f"{self.batch}; check the batch and the model's weights (a float16 model can "
                "overflow: try model.float())"
            )
