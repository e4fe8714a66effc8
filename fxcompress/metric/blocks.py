"""Passes over the data that go back block by block, in the memory of one block.

First the model is run over all batches, and what its blocks return is kept.  Then, from the last
block to the first, each is run again over all batches, on what the blocks before it returned, and
from what comes back the gradients at its own values and at these.  It is activation checkpointing
(Chen et al. 2016, arXiv 1604.06174) with the loops over blocks and batches exchanged: one forward
pass more than all at once, and the same gradients.

It is the model's own ``forward`` that is run: blocks before the one that is looked at return what
they returned before, and behind that one it ends.  What stands between blocks (masks, positions, a
residual read) simply runs again, so that nothing has to be known of what crosses a cut: gradients
of whatever a block returned add up over all later blocks that made use of it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from fxcompress.collective import Processes
from fxcompress.errors import CalibrationError
from fxcompress.graph.blocks import below
from fxcompress.graph.calling import called_through
from fxcompress.graph.inputs import device_of, to_device
from fxcompress.graph.padding import Padding, follow_padding, settle
from fxcompress.metric.hooks import Session, still
from fxcompress.metric.passes import (
    Passed,
    Section,
    Whole,
    named,
    passed,
    run_batch,
)
from fxcompress.metric.seeds import seeded
from fxcompress.metric.starts import Start, Starts, backward_starts
from fxcompress.metric.visitor import Visitor

REPRODUCED = 64.0
"""Rounding errors by which a block may return something else when it is run again."""


class Uncuttable(CalibrationError):
    """A model that cannot be run block by block; the message says why."""


class _End(BaseException):
    """Ends a forward pass behind a block; no ``except Exception`` of a model stops it."""


@dataclass(frozen=True, eq=False)
class _Returned:
    """What a block returned on a batch.

    Attributes:
        leaves: tensors, parked, and plain values.
        form: of what they are the leaves of.
        marks: which entries of each are padding; None for nothing.
    """

    leaves: tuple[Any, ...]
    form: TreeSpec
    marks: tuple[Tensor | None, ...]


@dataclass(eq=False)
class _Batch:
    """What is known of a batch on the way back.

    Attributes:
        returned: by the place of a block; nothing of one that did not run.
        starts: the powers of two that the gradients of each backward pass are in.
        predictions: how many it holds.
        gradients: of what a block returned, by (backward pass, block), a leaf each.
    """

    returned: dict[int, _Returned] = field(default_factory=dict)
    starts: tuple[int, ...] = ()
    predictions: int = 0
    gradients: dict[tuple[int, int], list[Tensor | None]] = field(default_factory=dict)


class Blocks:
    """Passes (:class:`fxcompress.metric.passes.Passes`) through a model that is cut into blocks.

    Args:
        whole: the model, its data (a sequence), and how it is run.  Sections have the places of
            blocks, their number for what comes after the last; from the last to the first.
        blocks: paths of modules in the order in which they are run, each once at most in a batch.
        park: puts a tensor where it takes no memory.
        tick: called after every batch of the forward pass.

    Raises:
        Uncuttable: a block ran twice.
        CalibrationError: the model rejects a batch.
    """

    def __init__(
        self,
        whole: Whole,
        blocks: Sequence[str],
        park: Callable[[Tensor], Tensor],
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        assert isinstance(whole.data, Sequence)
        self.whole, self.model, self.data, self.blocks = whole, whole.model, whole.data, blocks
        self.park = park
        self.places = range(len(self.data)) if whole.places is None else whole.places
        self.turns = range(len(self.data)) if whole.turns is None else whole.turns
        self.kind = "none"
        self._batches = [_Batch() for _ in self.data]
        self._came_back: set[int] = set()
        with still(self.model), torch.no_grad():
            for at, batch in enumerate(self.data):
                with named(self.places[at]), follow_padding(self.model, batch) as (batch, padding):
                    self._run_forward(at, batch, padding)
                settle(padding)
                tick()

    @property
    def sections(self) -> Sequence[Section]:
        """Some sites each, with the place of the block that they are in."""
        return self.whole.sections

    @property
    def batches(self) -> int:
        """How many there are in this process."""
        return len(self.data)

    @property
    def processes(self) -> Processes:
        """Whose data are gone through together."""
        return self.whole.processes

    @property
    def predictions(self) -> int:
        """How many there are in all batches of this process; 0 before the last section has run."""
        return sum(batch.predictions for batch in self._batches)

    def run(
        self, section: Section, visitor: Visitor, tick: Callable[[], None] = lambda: None
    ) -> Passed:
        """Show a visitor what happens in a block (:class:`fxcompress.metric.passes.Passes`)."""
        at_end = section.block == len(self.blocks)
        session = Session(self.model, section.sites, visitor, self.whole.watched)
        first = section.block not in self._came_back
        with session.attached():
            for at, batch in enumerate(self._batches):
                if at_end or section.block in batch.returned:
                    self._run_section(at, section.block, session, visitor, first)
                tick()
        self._came_back.add(section.block)
        return passed(
            session, len(self.data), self.predictions, self.kind, self.whole.everywhere,
            self.processes,
        )  # fmt: skip

    def state(self) -> dict[str, Any]:
        """Gradients at what blocks returned (:class:`fxcompress.metric.passes.Passes`)."""
        batches = [(b.starts, b.predictions, b.gradients) for b in self._batches]
        return {"kind": self.kind, "came back": sorted(self._came_back), "batches": batches}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up such gradients (:class:`fxcompress.metric.passes.Passes`)."""
        self.kind, self._came_back = state["kind"], {*state["came back"]}
        for batch, known in zip(self._batches, state["batches"], strict=True):
            batch.starts, batch.predictions, batch.gradients = known

    # ---- forwards ----------------------------------------------------------------

    def _run_forward(self, at: int, data: Any, padding: Padding) -> None:
        """Keep what blocks return on a batch."""
        batch, last = self._batches[at], len(self.blocks) - 1

        def call(place: int, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            found = module._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]
            if place in batch.returned:
                raise Uncuttable(f"{self.blocks[place]} runs more than once on a batch")
            leaves, form = tree_flatten(found)
            batch.returned[place] = _Returned(
                tuple(self._copied(x) if isinstance(x, Tensor) else x for x in leaves),
                form,
                tuple(self._marks(x, padding) if isinstance(x, Tensor) else None for x in leaves),
            )
            if place == last:
                raise _End
            return found

        with self._calling(dict.fromkeys(range(len(self.blocks)), call)):
            run_batch(self.model, data, self.whole.forward, self.places[at])

    def _copied(self, value: Tensor) -> Tensor:
        """A copy of a value, which somebody may write to later."""
        parked = self.park(value.detach())
        same = parked.untyped_storage().data_ptr() == value.untyped_storage().data_ptr()
        return parked.clone() if same else parked

    @staticmethod
    def _marks(value: Tensor, padding: Padding) -> Tensor | None:
        try:
            return padding.marks_of(value)
        except CalibrationError as error:
            raise Uncuttable(str(error)) from error

    @contextmanager
    def _calling(self, calls: Mapping[int, Callable[..., Any]]) -> Iterator[None]:
        """Have blocks called through functions of their place, and end where one says so."""
        with ExitStack() as stack:
            for place, call in calls.items():
                module = self.model.get_submodule(self.blocks[place])
                stack.enter_context(called_through([module], partial(call, place)))
            with suppress(_End):
                yield

    # ---- and back ----------------------------------------------------------------

    def _run_section(
        self,
        at: int,
        block: int,
        session: Session,
        visitor: Visitor,
        first: bool,
    ) -> None:
        """Run a block again on a batch, and go back through it.

        Args:
            at: place of the batch.
            block: place of the block; their number for what comes after the last.
            session: has the hooks.
            visitor: is shown the values.
            first: whether the gradients of the blocks before are to be kept.
        """
        place, batch, last = self.places[at], self._batches[at], block == len(self.blocks)
        with torch.set_grad_enabled(visitor.backward), named(place):
            with follow_padding(self.model, self.data[at]) as (data, padding):
                session.begin(place, padding, self.turns[at])
                again = _Again(self.blocks, block, batch.returned, visitor.backward, padding)
                with self._calling(again.calls):
                    again.result = run_batch(self.model, data, self.whole.forward, place)
                session.require_shared()
                again.require_end()
                starts = None
                if visitor.backward:
                    starts = (
                        self._starts(again.result, data, padding, self.turns[at])
                        if last
                        else again.starts(batch)
                    )
            settle(padding)
            if starts is None:
                return
            if last:
                self.kind, batch.predictions = starts.kind, starts.predictions
                batch.starts = tuple(start.exponent for start in starts.passes)
            visitor.predicted(batch.predictions)
            sources = again.sources if first else []
            for number, start in enumerate(starts.passes):
                if not last and not any(tensor.requires_grad for tensor in start.tensors):
                    continue  # nobody reads what it returns
                visitor.start(start.exponent)
                more = number + 1 < len(starts.passes)
                found = session.descend(start, more, [leaf for _, _, leaf in sources])
                for (source, leaf, _), gradient in zip(sources, found, strict=True):
                    if gradient is not None:
                        self._add(batch, (number, source), leaf, gradient)
                visitor.end()

    def _starts(self, result: Any, data: Any, padding: Padding, turn: int) -> Starts:
        drawn, device = self.whole.drawn, device_of(self.model)
        return backward_starts(
            result, to_device(data, device), kind=drawn.output, fisher=drawn.fisher,
            loss=self.whole.loss, mask=padding,
            generator=seeded(torch.Generator(device), drawn.seed, turn),
        )  # fmt: skip

    def _add(self, batch: _Batch, key: tuple[int, int], leaf: int, gradient: Tensor) -> None:
        """Add a gradient of a leaf of what a block returned."""
        leaves = len(batch.returned[key[1]].leaves)
        found = batch.gradients.setdefault(key, [None] * leaves)
        before = found[leaf]
        found[leaf] = self.park(gradient if before is None else before + gradient)


class _Again:
    """A forward pass through one block: those before it return what they did, and it ends there.

    Args:
        blocks: their paths.
        block: place of the one.
        returned: by the places of blocks.
        backward: whether gradients are wanted.
        padding: of the batch.

    Attributes:
        calls: how each block is called, by its place.
        sources: (block, leaf, tensor) of the values that gradients go back to.
        result: of the model, if it came to its end.
    """

    def __init__(
        self,
        blocks: Sequence[str],
        block: int,
        returned: Mapping[int, _Returned],
        backward: bool,
        padding: Padding,
    ) -> None:
        self.blocks, self.block, self.returned = blocks, block, returned
        self.backward, self.padding = backward, padding
        self.sources: list[tuple[int, int, Tensor]] = []
        self.result: Any = None
        self.outputs: list[Any] | None = None
        before = dict.fromkeys((at for at in range(block) if at in returned), self._repeat)
        itself = {block: self._end} if block < len(self.blocks) else {}
        self.calls: dict[int, Callable[..., Any]] = {**before, **itself}

    def require_end(self) -> None:
        """Require that the pass came to where it should."""
        if self.block < len(self.blocks) and self.outputs is None:
            raise Uncuttable(f"{self.blocks[self.block]} did not run again")

    def starts(self, batch: _Batch) -> Starts:
        """Where backward passes start: at what the block returned, with its gradients."""
        assert self.outputs is not None
        passes = []
        for number, exponent in enumerate(batch.starts):
            known = batch.gradients.get((number, self.block), [None] * len(self.outputs))
            pairs = [
                (output, gradient)
                for output, gradient in zip(self.outputs, known, strict=True)
                if gradient is not None
            ]
            tensors, gradients = zip(*pairs, strict=True) if pairs else ((), ())
            passes.append(Start(tensors, gradients, exponent))
        return Starts(passes, batch.predictions, "")

    def _repeat(self, place: int, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """What a block returned before."""
        with self.padding.paused():
            return self._repeated(place)

    def _repeated(self, place: int) -> Any:
        known, leaves = self.returned[place], []
        for at, (leaf, marks) in enumerate(zip(known.leaves, known.marks, strict=True)):
            if not isinstance(leaf, Tensor):
                leaves.append(leaf)
                continue
            value = leaf.detach()
            if self.backward and leaf.is_floating_point():
                value.requires_grad_()
                self.sources.append((place, at, value))
            value = value.clone()  # somebody may write to it
            self.padding.mark(value, marks)
            leaves.append(value)
        return tree_unflatten(leaves, known.form)

    def _end(self, place: int, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run the block, and end."""
        leaves, _ = tree_flatten(module._call_impl(*args, **kwargs))  # type: ignore[no-untyped-call]
        with self.padding.paused(), torch.no_grad():
            for new, old in zip(leaves, self.returned[place].leaves, strict=True):
                if isinstance(old, Tensor) and not _equal(new, old):
                    raise Uncuttable(f"{self.blocks[place]} returns something else when run again")
        self.outputs = leaves
        raise _End


def _equal(new: Tensor, old: Tensor) -> bool:
    """Whether two values are equal up to rounding."""
    if new.shape != old.shape or not old.is_floating_point():
        return torch.equal(new, old)
    if torch.equal(new, old):
        return True
    error, size = (new - old).nan_to_num(0).abs().max(), old.nan_to_num(0, 0, 0).abs().max()
    return bool(error <= REPRODUCED * torch.finfo(old.dtype).eps * size)


def in_blocks(sites: Sequence[Any], blocks: Sequence[str]) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """Sites by the block that they are in, from the last one; others are in what follows."""
    found: dict[int, list[Any]] = defaultdict(list)
    for site in sites:
        places = [at for at, path in enumerate(blocks) if below(site.name, path)]
        found[places[0] if places else len(blocks)].append(site)
    for place in range(len(blocks), -1, -1):
        yield place, tuple(found[place])
