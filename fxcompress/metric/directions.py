"""The second pass of ``ekfac``: what every component of a weight is worth, measured.

Leaving out the component ``c_i`` (an m x n matrix) of a weight costs, to second order and by
itself, ``½ E[⟨∇W, c_i⟩²]`` per prediction.  With ``∇W = Σ_t g_t a_tᵀ`` over the positions of a
sample and ``c_i = Σ_q l_iq r_iqᵀ`` that is ``½ E[(Σ_t Σ_q (g_tᵀ l_iq)(r_iqᵀ a_t))²]``: products of
k numbers a position, and no gradient of a weight is ever formed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fxcompress.forms.target import Components
from fxcompress.metric.passes import Passes
from fxcompress.metric.scaled import times_power
from fxcompress.metric.visitor import SiteFacts, same_samples
from fxcompress.operators.shape import Shape


def measure_directions(
    passes: Passes,
    wanted: Mapping[str, Mapping[str, Components]],
    tick: Callable[[], None] = lambda: None,
) -> dict[tuple[str, str], Tensor]:
    """``E[⟨∇W, c_i⟩²]`` per prediction of every component.

    Args:
        passes: run the model.
        wanted: site name -> any key -> components.
        tick: called after every batch of every section.

    Returns:
        (site name, key) -> (g x k), float64.

    Raises:
        CalibrationError: as of ``passes``.
    """
    found: dict[tuple[str, str], Tensor] = {}
    for section in passes.sections:
        sites = tuple(site for site in section.sites if wanted.get(site.name))
        if not sites:
            continue
        visitor = _Products(wanted)
        seen = passes.run(replace(section, sites=sites), visitor, tick)
        device = next(iter(wanted[sites[0].name].values())).left.device
        squares = passes.processes.sum_by_key(visitor.squares, device)
        found |= {key: total / seen.predictions for key, total in squares.items()}
    return found


class _Products:
    """A visitor (:class:`fxcompress.metric.visitor.Visitor`)."""

    backward = True

    def __init__(self, wanted: Mapping[str, Mapping[str, Components]]) -> None:
        self.wanted = wanted
        self.squares: dict[tuple[str, str], Tensor] = {}
        self.pending: dict[tuple[str, str], Tensor] = {}
        self.exponent = 0

    def begin(self, batch: int) -> None:
        pass

    def start(self, exponent: int) -> None:
        self.exponent = exponent

    def input(self, site: SiteFacts, data: Tensor, mask: Tensor | None) -> bool:
        return not data.is_floating_point() or bool(data.isfinite().all())

    def keep(self, site: SiteFacts, data: Tensor) -> Tensor | None:
        return data

    def predicted(self, count: int) -> None:
        pass

    def gradient(
        self, site: SiteFacts, data: Tensor | None, gradient: Tensor, mask: Tensor | None
    ) -> bool:
        assert data is not None
        for key, these in self.wanted[site.name].items():
            found = inner_products(data, gradient, site.shape, these)
            place = (site.name, key)
            # A weight that is used again: sum before squaring.
            waiting = self.pending.get(place)
            if waiting is not None:
                same_samples(site, len(waiting), len(found))
            self.pending[place] = found if waiting is None else waiting + found
        return bool(gradient.isfinite().all())

    def end(self) -> None:
        for place, products in self.pending.items():
            wide = times_power(products.to(torch.float64), self.exponent)
            squares = wide.square().sum(0)
            total = self.squares.get(place)
            self.squares[place] = squares if total is None else total + squares
        self.pending.clear()


def inner_products(data: Tensor, gradient: Tensor, shape: Shape, these: Components) -> Tensor:
    """``⟨∇W, c_i⟩`` for every sample (samples x g x k); a matrix is one position a sample."""
    wide = torch.promote_types(gradient.dtype, these.left.dtype)
    left, right, g = these.left.to(wide), these.right.to(wide), gradient.to(wide)
    data = data.to(wide) if data.is_floating_point() else data
    return shape.inner_products(data, g, left, right)
