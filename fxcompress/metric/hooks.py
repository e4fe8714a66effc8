"""Hooks that see every site's inputs and output gradients while a model runs.

Inputs are seen by a forward hook on the site's module, output gradients by a hook on the
*tensor* that it returns: module backward hooks break when an in-place activation follows.

To each of these tensors a zero is added, and it is the gradient of this zero that is asked for.  So
the backward pass goes from the output to the sites and no further: it is the cheap half of a
training step, as no parameter needs a gradient, and nothing outside of the model gets a ``.grad``
(soft prompts, the head of a loss, the batches) or loses its graph.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fxcompress.errors import CalibrationError
from fxcompress.graph.marks import PAD
from fxcompress.graph.padding import NONE, Padding
from fxcompress.graph.physical import base, folded, is_differentiated, outside, physical
from fxcompress.metric.masks import input_mask, is_swapped, output_marks
from fxcompress.metric.starts import Start
from fxcompress.metric.visitor import InputKey, SiteFacts, Visitor, input_key
from fxcompress.operators.applied import displayed, operator_at
from fxcompress.operators.shape import channels_of, extents_of
from fxcompress.operators.stacked import Matrix


@dataclass
class _Call:
    """One call of a site.

    Attributes:
        rows: that count.
        swapped: whether its values are (positions, samples, features).
        answered: whether a gradient came back.
    """

    rows: int
    swapped: bool = False
    answered: bool = False


@contextmanager
def still(model: nn.Module) -> Iterator[None]:
    """Have a model in eval mode, and compute with aliases of its parameters that do not learn.

    The parameters themselves are those of the user's model, which may be trained meanwhile.
    """
    training = [module for module in model.modules() if module.training]
    aliases: dict[int, nn.Parameter] = {}
    learning = [
        (module._parameters, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.requires_grad
    ]
    try:
        model.eval()
        for place, name, parameter in learning:
            if id(parameter) not in aliases:
                aliases[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
            place[name] = aliases[id(parameter)]
        yield
    finally:
        for place, name, parameter in learning:
            place[name] = parameter
        for module in training:
            module.training = True


@dataclass
class Session:
    """The hooks of one pass.

    Attributes:
        model: in eval mode while they are attached.
        sites: that have hooks.
        visitor: is shown what they see.
        watched: paths of other modules, of which is told whether they ran.
        padding: of the batch that is looked at.
        batch: what errors call it.
        backward: whether a backward pass runs.
    """

    model: nn.Module
    sites: Sequence[SiteFacts]
    visitor: Visitor
    watched: Sequence[str] = ()
    padding: Padding = NONE
    batch: int = 0
    backward: bool = False

    def __post_init__(self) -> None:
        self.seen: dict[InputKey, list[tuple[weakref.ref[Tensor], int]]] = {}
        self.calls: dict[str, int] = {}
        self.zeros: dict[torch.device, Tensor] = {}
        self.rows: dict[str, int] = defaultdict(int)
        self.answered: dict[str, int] = defaultdict(int)
        self.ran: set[str] = set()

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Have the hooks on the model, its parameters frozen."""
        handles = []
        try:
            for site in self.sites:
                module = operator_at(self.model, site.name)
                handles.append(module.register_forward_hook(self._hook(site), with_kwargs=True))
            for name in self.watched:
                ran = partial(self._see_run, displayed(self.model, name))
                handles.append(self.model.get_submodule(name).register_forward_hook(ran))
            with still(self.model):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def descend(
        self, start: Start, again: bool, further: Sequence[Tensor] = ()
    ) -> Sequence[Tensor | None]:
        """Go back to all sites.

        Args:
            start: where from.
            again: whether there is more to come of the same forward pass.
            further: values that what is before the sites was computed from.

        Returns:
            The gradients of ``further``; None where no gradient came.
        """
        self.backward = True
        zeros = [*self.zeros.values()]
        found = _backward(start, [*zeros, *further], again)
        self.backward = False
        return found[len(zeros) :]

    def begin(self, batch: int, padding: Padding, turn: int) -> None:
        """Forget the batch before: the next one follows.

        Args:
            batch: what errors call it.
            padding: of it.
            turn: that it has in the pass.
        """
        self.batch, self.padding = batch, padding
        self.visitor.begin(turn)
        self.seen = defaultdict(list)
        self.calls = defaultdict(int)

    def require_shared(self) -> None:
        """Layers that share inputs share their moments: none may have been left out."""
        first: dict[InputKey, SiteFacts] = {}
        for site in self.sites:
            other = first.setdefault(input_key(site), site)
            if self.calls[site.name] != self.calls[other.name]:
                raise CalibrationError(_not_shared(site.name, self.batch))

    def experts(self) -> frozenset[str]:
        """Names of the sites that are experts of a stack: a router says which rows reach one."""
        sites = (site.name for site in self.sites)
        return frozenset(n for n in sites if isinstance(self.model.get_submodule(n), Matrix))

    def _hook(self, site: SiteFacts) -> Callable[[nn.Module, Any, Any, Tensor], Tensor | None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, out: Tensor) -> Tensor | None:
            data: Tensor = args[0] if args else next(iter(kwargs.values()))
            # A checkpoint runs its part again during the backward pass: the same rows.
            again = torch._C._current_graph_task_id() != -1
            with self.padding.paused():
                rows = self._rows_of(site, out, data)
                if not again:
                    self._see_input(site, data, out)
                    self.rows[site.name] += rows
            if not (self.visitor.backward and torch.is_grad_enabled()):
                return None
            if is_differentiated(out):
                raise CalibrationError(
                    f"the model takes derivatives of {site.name} inside its forward (torch.func), "
                    "and what the layer does to them has no measure here; leave it out of the "
                    "rules (unless: [{name: ...}]), or choose metric: {kind: activation}"
                )
            # No leaf, so that an in-place activation may follow; a sum is seen by autograd inside
            # of vmap, too.
            out = out + self._zero(out.device)
            with outside(data), self.padding.paused():
                marks = output_marks(self.padding, site, out)
                swapped = self.padding.swapped(out) if marks is None else is_swapped(marks, out)
                plain = self.padding.clean(self._plain(site, data))
                kept = self.visitor.keep(site, plain.transpose(0, 1) if swapped else plain)
            inner, ordered = base(out)
            if not inner.requires_grad:
                raise CalibrationError(
                    f"{site.name} runs where no gradient can be followed (inside of torch.cond or "
                    "another higher-order operator); leave it out of the rules "
                    "(unless: [{name: ...}]), or choose metric: {kind: activation}"
                )
            mask = None if marks is None else marks != PAD
            see = partial(self._see_gradient, site, _Call(rows, swapped), kept, mask, ordered)
            inner.register_hook(see)  # type: ignore[no-untyped-call]
            return out

        return hook

    @staticmethod
    def _plain(site: SiteFacts, data: Tensor) -> Tensor:
        return physical(data, extents_of(site.shape)).detach()

    def _rows_of(self, site: SiteFacts, out: Tensor, data: Tensor) -> int:
        real = input_mask(self.padding, site, data, out)
        return out.numel() // site.shape.out_features if real is None else int(real.sum())

    def _zero(self, device: torch.device) -> Tensor:
        """What makes the values of a device depend on something that has a gradient."""
        if device not in self.zeros:
            self.zeros[device] = torch.zeros((), device=device, requires_grad=True)
        return self.zeros[device]

    def _see_input(self, site: SiteFacts, data: Tensor, out: Tensor) -> None:
        version = -1 if data.is_inference() else data._version
        call, self.calls[site.name] = self.calls[site.name], self.calls[site.name] + 1
        seen = self.seen[input_key(site)]
        if call < len(seen):
            if seen[call][0]() is data and seen[call][1] == version:
                return
            raise CalibrationError(_not_shared(site.name, self.batch))
        seen.append((weakref.ref(data), version))
        with outside(data):
            plain = self.padding.clean(self._plain(site, data))
            finite = self.visitor.input(site, plain, input_mask(self.padding, site, data, out))
        self._require_finite(finite, site, "input")

    def _see_run(self, name: str, *_: Any) -> None:
        self.ran.add(name)

    def _see_gradient(
        self,
        site: SiteFacts,
        call: _Call,
        data: Tensor | None,
        mask: Tensor | None,
        ordered: Callable[[Tensor], Tensor],
        gradient: Tensor,
    ) -> None:
        if not self.backward:
            return  # of a derivative that the model takes itself
        if not call.answered:  # by the first of several backward passes
            call.answered = True
            self.answered[site.name] += call.rows
        if not gradient.numel():
            return  # an expert that nothing was sent to
        gradient = folded(ordered(gradient.detach()), extents_of(site.shape))
        if mask is not None:
            gradient = gradient.masked_fill(~mask.unsqueeze(channels_of(site.shape)), 0)
        if call.swapped:
            gradient, mask = gradient.transpose(0, 1), None if mask is None else mask.T
        finite = self.visitor.gradient(site, data, gradient, mask)
        self._require_finite(finite, site, "output gradient")

    def _require_finite(self, finite: bool, site: SiteFacts, what: str) -> None:
        if not finite:
            raise CalibrationError(
                f"{what} of {site.name} has NaN or infinite values on calibration batch "
                f"{self.batch}; check the batch and the model's weights (a float16 model can "
                "overflow: try model.float())"
            )


def _backward(start: Start, inputs: Sequence[Tensor], again: bool) -> Sequence[Tensor | None]:
    if not any(tensor.requires_grad for tensor in start.tensors):
        raise CalibrationError(
            "no gradient reaches the model's output: it runs under no_grad or detaches its result; "
            "pass a forward= that does not, or choose metric: {kind: activation}"
        )
    try:
        pairs = zip(start.tensors, start.scaled, strict=True)
        needed = [(tensor, gradient) for tensor, gradient in pairs if tensor.requires_grad]
        tensors, gradients = zip(*needed, strict=True)
        if not inputs:
            return ()
        return torch.autograd.grad(
            tensors, inputs, gradients, retain_graph=again, allow_unused=True
        )
    except CalibrationError:
        raise
    except Exception as error:
        raise CalibrationError(
            f"the backward pass failed: {type(error).__name__}: {error}\n"
            "metric: {kind: activation} needs none"
        ) from error


def _not_shared(name: str, batch: int) -> str:
    return (
        f"{name} shared its input with another layer when the model was recorded, "
        f"but not on calibration batch {batch}; pass examples=[...] of both kinds"
    )
