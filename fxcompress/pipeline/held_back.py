"""Calibration data that the metric never sees: damping is chosen and plans are judged on them.

A metric estimated from few rows fits these rows, not the distribution behind them: directions that
they happen to leave empty look free.  The loss that it predicts of its own plan then says nothing
(SmolLM2 at keep 0.8, 256 tokens: predicted 0.0001, measured 1.3).  So a share of the batches is
set aside: the decomposition never sees them, their moments say what a plan loses, and the model is
measured on them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from fxcompress.forms import Target
from fxcompress.metric import Metric, Moments
from fxcompress.metric.whiten import Whitener, Whiteners
from fxcompress.pipeline.sites import Group

DAMPING = (1e-3, 1e-1)
"""Of the input and the output factor, where there is nothing to choose them on."""

INPUT_DAMPINGS = (1e-3, 1e-2, 1e-1, 1.0)
OUTPUT_DAMPINGS = (1e-2, 1e-1, 1.0, 10.0)

PROBES = (4, 12)
"""Sites that dampings are tried on, evenly spaced: so many at least and at most, and else a
sixteenth of them, so that it takes less than half the time of decomposing all."""

MOST = 4
"""Batches that a model is measured on whose metric needs no data at all."""


@dataclass(frozen=True, eq=False)
class HeldBack:
    """What was set aside of the calibration data.

    Attributes:
        batches: that the metric was not estimated on, of this process.
        moments: of them, in float32, by name of the sites that they reach; none for a metric
            without data.
        total: how many batches there are in all processes.
    """

    batches: tuple[Any, ...] = ()
    moments: Mapping[str, Moments] = field(default_factory=dict)
    total: int = 0


class Division:
    """Goes once through batches, and sets some aside.

    Of a known number the seed draws which; of an unknown one the second batch, and one drawn of
    every further ``1 / share``.  Never the first, which the graph is recorded on, so of a single
    batch nothing is set aside.

    ``held`` has those that were set aside so far; ``held_places`` and ``places`` say where they
    and the others stood.  Of batches that several processes have, each sets aside its part of what
    is drawn from all.

    Args:
        batches: gone through once.
        total: how many they are, in all processes; None if that is not known.
        share: to set aside, below 1; one of two or more at least, none for 0.
        seed: of what is drawn.
        own: places of the batches among all; None for all there are.

    >>> division = Division(range(8), 8, 0.25, seed=0)
    >>> len([*division]), len(division.held)
    (6, 2)
    """

    def __init__(
        self,
        batches: Iterable[Any],
        total: int | None,
        share: float,
        seed: int,
        own: Sequence[int] | None = None,
    ) -> None:
        self._batches, self._total, self._own = batches, total, own
        self._share, self._seed = share, seed
        self.held: list[Any] = []
        self.places: list[int] = []
        self.held_places: list[int] = []

    @property
    def count(self) -> int | None:
        """How many are not set aside, if that is known."""
        if self._total is None:
            return None
        own = range(self._total) if self._own is None else self._own
        return len({*own}.difference(self._places()))

    def __iter__(self) -> Iterator[Any]:
        places = self._places()
        following = next(places, None)
        for at, batch in self._placed():
            while following is not None and following < at:
                following = next(places, None)
            if at == following:
                self.held.append(batch)
                self.held_places.append(at)
            else:
                self.places.append(at)
                yield batch

    def untouched(self) -> list[Any]:
        """Batches to measure on for a metric that looks at none: the first ones."""
        own = MOST if self._own is None else sum(at < MOST for at in self._own)
        return [*itertools.islice(self._batches, own)] if self._share else []

    def _placed(self) -> Iterator[tuple[int, Any]]:
        """Batches with their places."""
        places = itertools.count() if self._own is None else self._own
        return zip(places, self._batches, strict=False)

    def _known(self, total: int) -> int:
        return max(1, int(total * self._share)) if self._share and total > 1 else 0

    def _places(self) -> Iterator[int]:
        """Where those stand that are set aside, from the first."""
        generator = torch.Generator().manual_seed(self._seed)
        if self._total is not None:
            order = torch.randperm(max(self._total - 1, 0), generator=generator) + 1
            yield from sorted(order[: self._known(self._total)].tolist())
        elif self._share:
            yield 1
            size = max(2, round(1 / self._share))
            for start in itertools.count(size, size):
                yield start + int(torch.randint(size, (), generator=generator))


class Narrowed:
    """Takes moments to float32: they are kept until the plan is made, and never inverted in it.

    Statistics of a metric's own stay as they are: without units they may be beyond float32.  What
    several sites share they share afterwards, too.
    """

    def __init__(self) -> None:
        self._known: Any = WeakTensorKeyDictionary()

    def __call__(self, moments: Moments) -> Moments:
        """The moments in float32."""
        return replace(moments.changed(self._narrow), own=moments.own)

    def _narrow(self, one: Tensor) -> Tensor:
        if one not in self._known:
            self._known[one] = one.to(torch.float32)
        found: Tensor = self._known[one]
        return found


def default_damping(given: tuple[float | None, float | None]) -> tuple[float, float]:
    """What the rules say, and :data:`DAMPING` where they say nothing."""
    inputs, outputs = given
    return DAMPING[0] if inputs is None else inputs, DAMPING[1] if outputs is None else outputs


def choose_damping(
    model: nn.Module,
    groups: Sequence[Group],
    metric: Metric,
    moments: Mapping[str, Moments],
    held: Mapping[str, Moments],
    given: tuple[float | None, float | None],
) -> tuple[float, float]:
    """Damping of the input and of the output factor that loses least on the data held back.

    Some sites are cut in half with every damping, and the loss is taken from the moments held back,
    undamped.  First the input's is chosen, then the output's.

    Args:
        model: has the weights.
        groups: of one site each.
        metric: of the rules.
        moments: that sites are decomposed with, by name.
        held: of the batches held back.
        given: what the rules say; None is to be chosen.
    """
    fallback = default_damping(given)
    usable = [group for group in groups if group.forms and group.name in held]
    if not any(metric.damped) or not usable:
        return fallback
    count = min(max(len(usable) // 16, PROBES[0]), PROBES[1])
    places = sorted({len(usable) * at // count for at in range(count)})
    probes = [usable[place] for place in places]

    def best(dampings: Sequence[tuple[float, float]]) -> tuple[float, float]:
        lost: list[list[float]] = [[] for _ in dampings]
        for probe in probes:
            # What does not change between dampings is not computed again.
            known: dict[tuple[int, float], list[Whitener]] = {}
            for each, losses in zip(dampings, lost, strict=True):
                whiteners = Whiteners(each, known)
                losses.append(_lost(model, probe, metric, moments, held, whiteners))
        totals = [*map(math.fsum, lost)]
        return dampings[totals.index(min(totals))]

    inputs, outputs = fallback
    if given[0] is None and metric.damped[0]:
        inputs, _ = best([(each, outputs) for each in INPUT_DAMPINGS])
    if given[1] is None and metric.damped[1]:
        _, outputs = best([(inputs, each) for each in OUTPUT_DAMPINGS])
    return inputs, outputs


def _lost(
    model: nn.Module,
    group: Group,
    metric: Metric,
    moments: Mapping[str, Moments],
    held: Mapping[str, Moments],
    whiteners: Whiteners,
) -> float:
    """Loss of a site on the data held back, at half of the ranks that it may have."""
    (site,) = group.sites
    weight = site.weight_in(model)
    target = Target(weight, metric.quadratic(site.shape, moments[site.name], whiteners))
    form = next(iter(group.forms))
    ranks = group.ranks(form)
    if not len(ranks):
        return 0.0
    rank = ranks[len(ranks) // 2]
    at = int(rank) if rank.ndim == 0 else tuple(rank.tolist())
    (approximated,) = group.approximated(form, target, at)
    assert approximated is not None
    change = approximated - weight.to(torch.float64)
    return metric.undamped_loss(site.shape, held[site.name], change)
