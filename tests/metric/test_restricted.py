"""A metric for some rows and input channels only: against the whole one, with zeros elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxcompress.metric.elementwise import Elementwise
from fxcompress.metric.kronecker import Kronecker
from fxcompress.metric.quadratic import QuadraticForm
from fxcompress.metric.whiten import Whitener, whitener

M, N = 7, 9


def moments(size: int, rank: int, seed: int) -> Tensor:
    rows = torch.randn(rank, size, generator=torch.Generator().manual_seed(seed)).double()
    return rows.T @ rows / rank


def forms() -> dict[str, QuadraticForm]:
    a, g = moments(N, 20, 0), moments(M, 20, 1)
    return {
        "damped": Kronecker(whitener(a, 1e-3), whitener(g, 1e-1)),
        "scaled": Kronecker(whitener(a, 1e-3, 2.0**-3), whitener(g, 1e-1, 2.0**4)),
        "undamped": Kronecker(whitener(a, 0.0), whitener(g, 0.0)),
        "singular": Kronecker(whitener(moments(N, 4, 2), 0.0), whitener(moments(M, 3, 3), 0.0)),
        "few rows": Kronecker(
            whitener(torch.randn(2, N).double(), 1e-2), whitener(torch.randn(1, M).double(), 1e-2)
        ),
        "diagonal": Kronecker(whitener(a.diagonal(), 1e-3), whitener(g.diagonal(), 1e-1)),
        "identity": Kronecker(Whitener(), Whitener()),
        "without matrices": Kronecker(whitener(a, 1e-3), whitener(g, 1e-1)).for_matrices(),
        "elementwise": Elementwise(torch.rand(M, N).double(), 2.0**2),
    }


@pytest.mark.parametrize("name", forms())
def test_changes_elsewhere_are_zero(name: str) -> None:
    form = forms()[name]
    rows, inputs = torch.tensor([0, 2, 3, 6]), torch.tensor([1, 2, 5])
    for some, of in ((rows, None), (None, inputs), (rows, inputs)):
        small = form.restricted(some, of)
        assert small is not None
        at = torch.meshgrid(
            torch.arange(M) if some is None else some,
            torch.arange(N) if of is None else of,
            indexing="ij",
        )
        change = torch.zeros(M, N).double()
        part = torch.randn(at[0].shape, generator=torch.Generator().manual_seed(4)).double()
        change[at] = part
        assert small.loss(part) == pytest.approx(form.loss(change), rel=1e-9)


@pytest.mark.parametrize("name", ["damped", "scaled", "few rows", "diagonal", "identity"])
@pytest.mark.parametrize("kept", [8, 5, 2])
def test_what_is_lost_after_narrowing_adds_up(name: str, kept: int) -> None:
    """The refitted weight is an A-orthogonal projection: losses before and after are a sum."""
    form = forms()[name]
    weight = torch.randn(M, N, generator=torch.Generator().manual_seed(5)).double()
    channels = form.channels(weight)
    places, refitted = channels.factors(kept)
    small = form.restricted(inputs=places)
    assert small is not None
    found = small.truncations(refitted, "matrix")
    for rank in range(1, min(M, kept)):
        left, right = (factor.double() for factor in found.factors(rank))
        wide = torch.zeros_like(weight)
        wide[:, places] = left @ right
        ranks = torch.tensor([kept]).numpy(), torch.tensor([rank]).numpy()
        parts = float(channels.losses(ranks[0])[0]), float(found.losses(ranks[1])[0])
        assert form.loss(wide - weight) == pytest.approx(sum(parts), rel=1e-9)


def test_a_form_of_ones_own_has_none_unless_it_says_so() -> None:
    class Own(QuadraticForm):
        null = False

        def loss(self, change: Tensor) -> float:
            return float(change.square().sum())

        truncations = solve = None  # type: ignore[assignment]

    assert Own().restricted(torch.arange(2)) is None
