"""One pass over the calibration data: second moments for every site.

Inputs are seen by a forward hook on the site's module, output gradients by a hook on the
*tensor* that it returns: module backward hooks break when an in-place activation follows.
Parameters need no gradient, so the backward pass is the cheap half of a training step.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fxcompress.errors import CalibrationError
from fxcompress.graph.inputs import Forward, device_of, padding_mask, run_model, to_device
from fxcompress.metric.metric import Metric
from fxcompress.metric.moments import LARGEST_OUTPUT, GramSum, Moments
from fxcompress.metric.output import (
    Loss,
    OutputGradient,
    OutputKind,
    loss_gradient,
    sampled_gradient,
)


class Target(Protocol):
    """What calibration needs to know of a site."""

    @property
    def name(self) -> str: ...
    @property
    def in_features(self) -> int: ...
    @property
    def out_features(self) -> int: ...
    @property
    def source(self) -> str: ...
    @property
    def calls(self) -> int: ...


@dataclass(frozen=True, eq=False)
class Calibration:
    """The outcome of the data pass.

    Attributes:
        moments: per site name; sites with one input share one ``Moments.input`` tensor.
        batches: number of batches seen.
        predictions: number of predictions that the Fisher is a mean over.
        kind: output family, ``"loss"`` for a user's loss, ``"none"`` without a backward pass.
    """

    moments: Mapping[str, Moments]
    batches: int = 0
    predictions: int = 0
    kind: str = "none"


Tick = Callable[[], None]


def calibrate(
    model: nn.Module,
    sites: Sequence[Target],
    batches: Iterable[Any],
    metric: Metric,
    *,
    output: OutputKind = "auto",
    loss: Loss | None = None,
    forward: Forward | None = None,
    seed: int = 0,
    tick: Tick = lambda: None,
) -> Calibration:
    """Gather the moments that ``metric`` needs at every site.

    Args:
        model: runs in eval mode; modes and ``requires_grad`` are restored afterwards.
        sites: each ``name`` is the path of a module that maps (..., n) to (..., m).
        batches: see :mod:`fxcompress.graph.inputs`; gone through once.
        metric: says which statistics are needed.
        output: family of the output distribution.
        loss: the user's own negative log-likelihood instead of sampled labels.
        forward: how to call the model on a batch.
        seed: of the sampled labels.
        tick: called after every batch.

    Raises:
        CalibrationError: no batches; a batch that the model rejects; values that are not
            finite (naming the site and the batch); a site that no data reached.
    """
    if not metric.needs or not sites:
        return Calibration({site.name: Moments() for site in sites})
    session = _Session(model, sites, metric)
    generator = torch.Generator(device_of(model)).manual_seed(seed)
    backward = bool(metric.needs & {"output", "weight"})
    count = predictions = 0
    kind = "none"
    with session.attached():
        for batch in batches:
            session.begin(count, padding_mask(batch))
            with torch.set_grad_enabled(backward):
                result = _forward(model, batch, forward, count)
                if backward:
                    with _named(count):
                        batch = to_device(batch, device_of(model)) if loss else batch
                        start = (
                            loss_gradient(result, batch, loss)
                            if loss
                            else sampled_gradient(result, output, session.mask, generator)
                        )
                        _backward(start)
                    predictions += start.predictions
                    kind = start.kind
            session.end()
            count += 1
            tick()
    if not count:
        raise CalibrationError(
            f"metric {metric.name} needs calibration data, and the iterable given was empty "
            "or exhausted; pass a list of batches or a fresh DataLoader"
        )
    if backward and not predictions:
        raise CalibrationError(
            "the calibration batches hold no prediction at all: they are empty, or their "
            "attention_mask is zero everywhere"
        )
    return Calibration(session.finish(predictions), count, predictions, kind)


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


def _backward(start: OutputGradient) -> None:
    if not start.tensor.requires_grad:
        raise CalibrationError(
            "no gradient reaches the model's output: it runs under no_grad or detaches its result; "
            "pass a forward= that does not, or choose metric: {kind: activation}"
        )
    try:
        torch.autograd.backward(start.tensor, start.gradient)
    except CalibrationError:
        raise
    except Exception as error:
        raise CalibrationError(
            f"the backward pass failed: {type(error).__name__}: {error}\n"
            "metric: {kind: activation} needs none"
        ) from error


@dataclass
class _Session:
    """Hooks and running sums of one data pass."""

    model: nn.Module
    sites: Sequence[Target]
    metric: Metric
    mask: Tensor | None = None
    batch: int = 0

    def __post_init__(self) -> None:
        device = device_of(self.model)
        self.inputs: dict[str, GramSum] = {}  # by input, shared between sites
        self.outputs: dict[str, GramSum] = {}
        self.weights: dict[str, Tensor] = {}
        self.rows: dict[str, int] = defaultdict(int)
        self.pending: dict[str, list[Tensor]] = defaultdict(list)
        self.seen: dict[str, list[tuple[weakref.ref[Tensor], int]]] = {}
        self.calls: dict[str, int] = {}
        for site in self.sites:
            exact = any(
                p.dtype == torch.float64 for p in self.model.get_submodule(site.name).parameters()
            )
            dtype = torch.float64 if exact else torch.float32
            if "input" in self.metric.needs and site.source not in self.inputs:
                self.inputs[site.source] = GramSum(site.in_features, device, dtype)
            if "output" in self.metric.needs:
                wide = site.out_features >= LARGEST_OUTPUT
                self.outputs[site.name] = GramSum(site.out_features, device, dtype, diagonal=wide)
            if "weight" in self.metric.needs:
                self.weights[site.name] = torch.zeros(
                    site.out_features, dtype=torch.float64, device=device
                )

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

    def end(self) -> None:
        for name, products in self.pending.items():
            self.weights[name] += _row_means(torch.stack(products).sum(0))
        self.pending.clear()

    def finish(self, predictions: int) -> dict[str, Moments]:
        unreached = [site.name for site in self.sites if not self.rows[site.source]]
        if unreached:
            raise CalibrationError(
                f"no calibration data reached {', '.join(unreached[:5])}"
                f"{' and others' if len(unreached) > 5 else ''}: the layer runs on the example "
                "input but on none of the calibration batches"
            )
        grams = {key: gram.finish(self.rows[key]) for key, gram in self.inputs.items()}
        return {
            site.name: Moments(
                input=grams.get(site.source),
                output=self.outputs[site.name].finish(predictions) if self.outputs else None,
                weight=self.weights[site.name] / predictions if self.weights else None,
            )
            for site in self.sites
        }

    # ---- hooks -------------------------------------------------------------------

    def _hook(self, site: Target) -> Callable[[nn.Module, Any, Any, Tensor], Tensor | None]:
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
            held = data.detach() if "weight" in self.metric.needs else None
            out.register_hook(partial(self._see_gradient, site, held))  # type: ignore[no-untyped-call]
            return replaced

        return hook

    def _see_input(self, site: Target, data: Tensor) -> None:
        version = -1 if data.is_inference() else data._version
        call, self.calls[site.name] = self.calls[site.name], self.calls[site.name] + 1
        seen = self.seen[site.source]
        if call < len(seen):
            if seen[call][0]() is data and seen[call][1] == version:
                return
            raise CalibrationError(
                f"{site.name} shared its input with another layer when the model was recorded, "
                f"but not on calibration batch {self.batch}; pass examples=[...] of both kinds"
            )
        seen.append((weakref.ref(data), version))
        rows = self._rows(data)
        self.rows[site.source] += len(rows)
        gram = self.inputs.get(site.source)
        if gram is not None:
            self._require_finite(gram.add(rows), site, "input")

    def _see_gradient(self, site: Target, data: Tensor | None, gradient: Tensor) -> None:
        gram = self.outputs.get(site.name)
        if gram is not None:
            self._require_finite(gram.add(self._rows(gradient)), site, "output gradient")
        if data is not None:
            if site.calls > 1:  # the same weight used again: sum before squaring
                self.pending[site.name].append(_sample_products(data, gradient))
            elif data.dim() <= 2:  # one position a sample: (g_i a_j)² = g_i² a_j²
                squares = data.to(torch.float64).square().mean(-1, keepdim=True)
                weighted = gradient.to(torch.float64).square() * squares
                self.weights[site.name] += weighted.reshape(-1, site.out_features).sum(0)
            else:
                self.weights[site.name] += _row_means(_sample_products(data, gradient))
            self._require_finite(
                bool(self.weights[site.name].sum().isfinite()), site, "weight gradient"
            )

    def _rows(self, data: Tensor) -> Tensor:
        rows = data.detach()
        if self.mask is not None and rows.dim() == 3 and rows.shape[:2] == self.mask.shape:
            return rows[self.mask]
        return rows.reshape(-1, rows.shape[-1])

    def _require_finite(self, finite: bool, site: Target, what: str) -> None:
        if not finite:
            raise CalibrationError(
                f"{what} of {site.name} has NaN or infinite values on calibration batch "
                f"{self.batch}; check the batch and the model's weights (a float16 model can "
                "overflow: try model.float())"
            )


def _sample_products(data: Tensor, gradient: Tensor) -> Tensor:
    """Gradient of the weight for every sample, ``Σ_t g_t a_tᵀ`` (samples x m x n).

    The first dimension counts samples; a matrix (rows x features) is one position a sample.
    """
    wide = torch.promote_types(data.dtype, torch.float32)
    a, g = data.to(wide), gradient.to(wide)
    a = a.reshape(len(a), -1, a.shape[-1])
    g = g.reshape(len(g), -1, g.shape[-1])
    return g.transpose(1, 2) @ a


def _row_means(products: Tensor) -> Tensor:
    """Mean square along each row, summed over samples: (samples x m x n) to (m), float64."""
    return products.square().mean(2, dtype=torch.float64).sum(0)
