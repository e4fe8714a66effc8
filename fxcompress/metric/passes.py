"""A pass over the calibration data that shows every site's inputs and output gradients.

:class:`Passes` are what sums are gathered in: :class:`Whole` runs the model forwards and backwards
with all sites at once; :class:`fxcompress.metric.blocks.Blocks` goes from block to block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from fxcompress.collective import ALONE, Processes
from fxcompress.errors import CalibrationError
from fxcompress.graph.inputs import Forward, device_of, run_model, to_device
from fxcompress.graph.padding import follow_padding, settle
from fxcompress.metric.hooks import Session
from fxcompress.metric.output import Loss, OutputKind
from fxcompress.metric.seeds import seeded
from fxcompress.metric.starts import FisherKind, backward_starts
from fxcompress.metric.visitor import SiteFacts, Visitor


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
class Reach:
    """What of the data got to a site, and back to it.

    Attributes:
        rows: positions that it was applied to, without padding.
        answered: those of them whose output was sent a gradient, be it zero; 0 without a backward
            pass.  No gradient at all says nothing about influence: ``no_grad`` and ``detach``
            stop it.
    """

    rows: int
    answered: int


@dataclass(frozen=True)
class Passed:
    """How a pass went.

    Attributes:
        batches: number of batches seen.
        predictions: number of predictions in them, 0 without a backward pass.
        kind: output family, ``"loss"`` for a user's loss, ``"none"`` without a backward pass.
        reach: per site name.
        ran: names of watched modules that ran.
        experts: names of sites that are experts of a stack, of a pass that has to reach every site.
    """

    batches: int
    predictions: int
    kind: str
    reach: Mapping[str, Reach]
    ran: tuple[str, ...]
    experts: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Section:
    """Sites whose statistics are gathered together.

    Attributes:
        sites: some of those of a model.
        block: place of the block that they are in; 0 if the model is not cut.
    """

    sites: tuple[SiteFacts, ...]
    block: int = 0


class Passes(Protocol):
    """How a model is run over its calibration data, once for every section of its sites.

    Attributes:
        sections: in the order in which they have to be run first; later in any.
        batches: how many there are in this process, if that is known.
        processes: whose data are gone through together.
    """

    @property
    def processes(self) -> Processes: ...
    @property
    def sections(self) -> Sequence[Section]: ...
    @property
    def batches(self) -> int | None: ...

    def run(
        self, section: Section, visitor: Visitor, tick: Callable[[], None] = lambda: None
    ) -> Passed:
        """Show a visitor what happens at the sites of a section, in all batches.

        Args:
            section: one of :attr:`sections`, or a part of one.
            visitor: is shown the values.
            tick: called after every batch.

        Raises:
            CalibrationError: as of :func:`run_pass`.
        """

    def state(self) -> dict[str, Any]:
        """What later sections need of those that have run: plain values and tensors."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on as if the sections before had run.

        Args:
            state: after them.
        """


@dataclass(frozen=True, eq=False)
class Whole:
    """Forwards and backwards through the whole model, with the sites of one section.

    Attributes:
        model, drawn, loss, forward, everywhere, places, turns, watched, processes: as of
            :func:`run_pass`.
        data: the batches; gone through once for every section.
        sections: of its sites.
        batches: how many there are, if that is known.
    """

    model: nn.Module
    data: Iterable[Any]
    sections: Sequence[Section]
    batches: int | None = None
    drawn: Draws = DRAWS
    loss: Loss | None = None
    forward: Forward | None = None
    everywhere: bool = True
    places: Sequence[int] | None = None
    turns: Sequence[int] | None = None
    watched: Sequence[str] = ()
    processes: Processes = ALONE

    def run(
        self, section: Section, visitor: Visitor, tick: Callable[[], None] = lambda: None
    ) -> Passed:
        """Show a visitor what happens at the sites of a section (:class:`Passes`)."""
        return run_pass(
            self.model, section.sites, self.data, visitor,
            drawn=self.drawn, loss=self.loss, forward=self.forward, everywhere=self.everywhere,
            places=self.places, turns=self.turns, watched=self.watched, processes=self.processes,
            tick=tick,
        )  # fmt: skip

    def state(self) -> dict[str, Any]:
        """Nothing (:class:`Passes`)."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Nothing to do (:class:`Passes`)."""


def run_pass(
    model: nn.Module,
    sites: Sequence[SiteFacts],
    batches: Iterable[Any],
    visitor: Visitor,
    *,
    drawn: Draws = DRAWS,
    loss: Loss | None = None,
    forward: Forward | None = None,
    everywhere: bool = True,
    places: Sequence[int] | None = None,
    turns: Sequence[int] | None = None,
    watched: Sequence[str] = (),
    processes: Processes = ALONE,
    tick: Callable[[], None] = lambda: None,
) -> Passed:
    """Run a model over batches and show a visitor what happens at its sites.

    Args:
        model: a working copy; runs in eval mode.  Its modes are restored afterwards, and the
            parameters that it shares with the model it was made of are only read.
        sites: each ``name`` is the path of a module.
        batches: see :mod:`fxcompress.graph.inputs`; gone through once.
        visitor: is shown the values.
        drawn: what the outputs mean, and where labels come from.
        loss: the user's own negative log-likelihood instead of all that.
        forward: how to call the model on a batch.
        everywhere: whether the data have to reach every site.
        places: what errors call the batches, if these are a part of others.
        turns: the turn of each batch in the passes of all processes, for which labels are drawn;
            None for 0, 1, ...
        watched: paths of other modules, of which is told whether they ran.
        processes: all those that run the model, each over batches of its own.
        tick: called after every batch.

    Raises:
        CalibrationError: no batches; a batch that the model rejects; values that are not
            finite (naming the site and the batch); a site that no data reached.
    """
    session = Session(model, sites, visitor, watched)
    generator = torch.Generator(device_of(model))
    count = predictions = 0
    kind = "none"
    with session.attached():
        for batch in batches:
            place = count if places is None else places[count]
            turn = count if turns is None else turns[count]
            with torch.set_grad_enabled(visitor.backward), named(place):
                with follow_padding(model, batch) as (batch, padding):
                    session.begin(place, padding, turn)
                    result = run_batch(model, batch, forward, place)
                    session.require_shared()
                    if visitor.backward:
                        starts = backward_starts(
                            result, to_device(batch, device_of(model)), kind=drawn.output,
                            fisher=drawn.fisher, loss=loss, mask=padding,
                            generator=seeded(generator, drawn.seed, turn),
                        )  # fmt: skip
                settle(padding)
                if visitor.backward:
                    visitor.predicted(starts.predictions)
                    for at, start in enumerate(starts.passes):
                        visitor.start(start.exponent)
                        session.descend(start, again=at + 1 < len(starts.passes))
                        visitor.end()
                    predictions += starts.predictions
                    kind = starts.kind
            count += 1
            tick()
    return passed(session, count, predictions, kind, everywhere, processes)


def require_data(batches: int, predictions: int | None) -> None:
    """Require that there was something to learn from.

    Args:
        batches: how many there were.
        predictions: how many were in them; None if nobody asked.

    Raises:
        CalibrationError: there was nothing.
    """
    if not batches:
        raise CalibrationError(
            "the metric needs calibration data, and the iterable given was empty "
            "or exhausted; pass a list of batches or a fresh DataLoader"
        )
    if predictions == 0:
        raise CalibrationError(
            "the calibration batches hold no prediction at all: they are empty, or their "
            "attention_mask is zero everywhere"
        )


def passed(
    session: Session,
    batches: int,
    predictions: int,
    kind: str,
    everywhere: bool,
    processes: Processes = ALONE,
) -> Passed:
    """What hooks saw in a pass, in all processes.

    Args:
        session: has the hooks.
        batches, predictions, kind: as of :class:`Passed`, of this process.
        everywhere: whether the data have to reach every site.
        processes: all of them.

    Raises:
        CalibrationError: they did not, or there were none.
    """
    names = [site.name for site in session.sites]
    rows, answered = processes.add_up(session.rows), processes.add_up(session.answered)
    found = processes.gathered((batches, predictions, kind, session.ran))
    batches, predictions = sum(each[0] for each in found), sum(each[1] for each in found)
    require_data(batches, predictions if session.visitor.backward else None)
    experts = session.experts()
    if everywhere:
        require_reached([n for n in names if not rows.get(n) and n not in experts])
    return Passed(
        batches,
        predictions,
        next((each[2] for each in found if each[2] != "none"), "none"),
        {name: Reach(rows.get(name, 0), answered.get(name, 0)) for name in names},
        tuple(sorted({name for each in found for name in each[3]})),
        experts if everywhere else frozenset(),
    )


def require_reached(unreached: Sequence[str]) -> None:
    """Require that data got to every site but experts.

    Args:
        unreached: names of those that none got to.

    Raises:
        CalibrationError: there are some.
    """
    if unreached:
        raise CalibrationError(
            f"no calibration data reached {', '.join(unreached[:5])}"
            f"{' and others' if len(unreached) > 5 else ''}: the layer runs on the example "
            "input but on none of the calibration batches"
        )


def run_batch(model: nn.Module, batch: Any, forward: Forward | None, index: int) -> Any:
    """Run a model on a batch.

    Args:
        model, batch, forward: as of :func:`fxcompress.graph.inputs.run_model`.
        index: what errors call the batch.

    Raises:
        CalibrationError: the model rejects it.
    """
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
def named(index: int) -> Iterator[None]:
    """Lets every error say on which batch it happened."""
    try:
        yield
    except CalibrationError as error:
        if f"calibration batch {index}" in str(error):
            raise
        raise type(error)(f"on calibration batch {index}: {error}") from error
