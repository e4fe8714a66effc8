"""Leading components and their certificate, against full decompositions in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxcompress.metric.subspace import Leading, leading


def matrix(m: int, n: int, sigma: Tensor, seed: int = 0) -> Tensor:
    """A matrix with given singular values."""
    generator = torch.Generator().manual_seed(seed)

    def orthonormal(rows: int) -> Tensor:
        square = torch.randn(rows, len(sigma), generator=generator, dtype=torch.float64)
        return torch.linalg.qr(square).Q

    return (orthonormal(m) * sigma) @ orthonormal(n).T


def lost(s: Tensor, found: Leading, rank: int) -> float:
    """What an approximation loses, in float64."""
    kept = found.left[:, :rank].double() @ found.right[:rank].double()
    return 0.5 * float((s.double() - kept).square().sum())


def least(true: Tensor, rank: int) -> float:
    """What the best one loses (Eckart and Young)."""
    return 0.5 * float(true[rank:].square().sum())


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(1, 14),
    n=st.integers(1, 14),
    p=st.integers(1, 14),
    decay=st.sampled_from([0.0, 0.3, 1.0, 3.0]),
    iterations=st.integers(1, 3),
    seed=st.integers(0, 10**6),
)
def test_the_bounds_hold_whatever_the_start(
    m: int, n: int, p: int, decay: float, iterations: int, seed: int
) -> None:
    k = min(m, n)
    p = min(p, k)
    s = matrix(m, n, torch.exp(-decay * torch.arange(k, dtype=torch.float64)), seed)
    basis = torch.randn(n, p, dtype=torch.float64)
    found = leading(s, basis, iterations)
    true = torch.linalg.svdvals(s)
    tiny = 1e-9 * float(true[0])
    assert len(found.sigma) == p
    assert (found.sigma <= true[:p] + tiny).all()
    assert (found.bounds(k) >= true - tiny).all()
    for rank in range(p + 1):
        assert float(found.loss()[rank]) == pytest.approx(lost(s, found, rank), rel=1e-8, abs=1e-12)
        assert found.excess(rank) >= lost(s, found, rank) - least(true, rank) - 1e-14


def test_from_a_good_start_it_is_the_decomposition() -> None:
    sigma = torch.tensor([9.0, 5.0, 2.0, 1e-3, 1e-4], dtype=torch.float64)
    s = matrix(30, 20, sigma)
    start = torch.linalg.svd(s).Vh[:3].T + 1e-4 * torch.randn(20, 3, dtype=torch.float64)
    found = leading(s, start)
    torch.testing.assert_close(found.sigma, sigma[:3], rtol=1e-9, atol=0.0)
    assert 1e-3 <= found.residual < 1.2e-3


def test_a_direction_that_the_start_has_nothing_of_shows_in_the_bound() -> None:
    sigma = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    s = matrix(12, 9, sigma)
    rows = torch.linalg.svd(s).Vh
    found = leading(s, rows[1:3].T)  # the largest is missing
    assert found.bounds(3)[2] >= 3.0 - 1e-12


@pytest.mark.parametrize("p", [1, 3, 5])
def test_singular_matrices(p: int) -> None:
    zero = leading(torch.zeros(7, 5), torch.randn(5, p))
    assert float(zero.sigma.abs().sum()) == 0.0
    assert float(zero.bounds(1)) == 0.0
    assert zero.excess(p) == 0.0
    low = matrix(7, 5, torch.tensor([2.0, 2.0], dtype=torch.float64))  # repeated, rank 2
    found = leading(low, torch.randn(5, p, dtype=torch.float64))
    true = torch.linalg.svdvals(low)
    assert (found.bounds(5) >= true - 1e-9).all()


def test_a_matrix_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        leading(torch.tensor([[float("nan")]]), torch.ones(1, 1))


def test_float32_is_enough_for_the_certificate() -> None:
    s = matrix(200, 120, torch.logspace(0, -3, 120, dtype=torch.float64))
    found = leading(s.float(), torch.linalg.svd(s).Vh[:40].T.float())
    true = torch.linalg.svdvals(s)
    assert (found.bounds(120) >= true).all()
    assert found.bounds(46)[45] < 1.6 * float(true[40])


def test_float32_does_not_mix_components_across_the_threshold() -> None:
    """Singular values over three orders of magnitude: squared, the last ones are rounding."""
    m, n, rank = 200, 300, 90
    before = matrix(m, n, torch.arange(1, m + 1, dtype=torch.float64) ** -1.5)
    start = torch.linalg.svd(before, full_matrices=False).Vh[: rank + 11].T
    generator = torch.Generator().manual_seed(1)
    s = before + 1e-5 / n**0.5 * torch.randn(m, n, generator=generator, dtype=torch.float64)
    found = leading(s.float(), start.float())
    kept = found.left[:, :rank].double() @ found.right[:rank].double()
    best = float(torch.linalg.svdvals(s)[rank:].square().sum())
    assert float((s - kept).square().sum()) == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("decades", [0, 2, 4, 6, 9, 15])
def test_the_left_vectors_are_orthonormal_however_dependent_the_columns(
    dtype: torch.dtype, decades: int
) -> None:
    """In turn: Newton's step at once, after one Cholesky, after several, Householder's QR."""
    s = matrix(60, 40, torch.logspace(0, -decades, 20, dtype=torch.float64))
    generator = torch.Generator().manual_seed(decades)
    mixed = torch.randn(40, 20, generator=generator, dtype=torch.float64)
    for start in (mixed, torch.linalg.qr(mixed).Q, torch.linalg.svd(s).Vh[:20].T):
        left = leading(s.to(dtype), start.to(dtype)).left.double()
        off = torch.linalg.matrix_norm(left.T @ left - torch.eye(20, dtype=torch.float64), 2)
        assert float(off) < 400 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("tight", [False, True])
@pytest.mark.parametrize(("m", "n"), [(6, 5), (40, 60), (130, 90)])
@pytest.mark.parametrize("size", [0.3, 1.0, 5.0])
def test_the_worst_start_is_exactly_orthogonal_to_what_it_misses(
    dtype: torch.dtype, iterations: int, tight: bool, m: int, n: int, size: float
) -> None:
    """Two blocks of disjoint support, a start in one: no rounding leads to the other."""
    h, w = m // 2, n // 2
    s = torch.zeros(m, n, dtype=torch.float64)
    s[:h, :w] = matrix(h, w, torch.logspace(0, -2, min(h, w), dtype=torch.float64))
    s[h:, w:] = matrix(m - h, n - w, torch.tensor([size, 0.1 * size], dtype=torch.float64))
    s = s.to(dtype)
    true, p = torch.linalg.svdvals(s.double()), min(h, w)
    basis = torch.zeros(n, p, dtype=dtype)
    basis[:w] = torch.linalg.svd(s[:h, :w]).Vh.T[:, :p]
    found = leading(s, basis, iterations, tight=tight)
    assert float(found.left[h:].abs().max()) == 0.0  # it is missed
    assert (found.bounds(len(true)) >= true).all()
    for rank in range(1, p + 1):
        gap = lost(s, found, rank) - least(true, rank)
        assert found.excess(rank) >= gap
        if size > 1 or rank == p:  # one of the largest is missing, and the bound says how much
            assert gap > 0.01 * size**2
            assert found.excess(rank) < 0.6 * size**2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("iterations", [1, 2, 3])
@pytest.mark.parametrize("seen", [1e-15, 1e-10, 1e-7, 1e-5, 1e-3, 1e-1])
@pytest.mark.parametrize("size", [1.01, 3.0, 50.0])
def test_a_component_that_is_seen_by_chance_is_certified_when_it_has_settled(
    dtype: torch.dtype, iterations: int, seen: float, size: float
) -> None:
    """As rounding shows it to the start: every singular value is bounded, and the loss is not."""
    m, n, p = 50, 40, 12
    rest = torch.logspace(0, -2, n - 1, dtype=torch.float64)
    s = matrix(m, n, torch.cat([torch.tensor([size], dtype=torch.float64), rest]), 5)
    rows, true = torch.linalg.svd(s).Vh, torch.linalg.svdvals(s)
    basis = rows[1 : p + 1].T + seen * rows[:1].T
    found = leading(s.to(dtype), basis.to(dtype), iterations)
    assert (found.bounds(n) >= true * (1 - 1e-6)).all()
    for rank in (1, 6, p):
        gap = lost(s, found, rank) - least(true, rank)
        assert found.excess(rank) >= gap - 1e-12 * size**2  # S itself was rounded
    if found.excess(6) < 0.01 * least(true, 6):
        assert lost(s, found, 6) == pytest.approx(least(true, 6), rel=0.01)


def test_the_bound_on_the_loss_is_tight_for_a_start_that_is_good() -> None:
    """A weight of rank 40 that moved a little, in float32: less than a thousandth is in doubt."""
    sigma = torch.arange(1, 41, dtype=torch.float64) ** -0.8
    before = matrix(150, 110, sigma)
    noise = torch.randn(150, 110, generator=torch.Generator().manual_seed(0)).double()
    s = before + 1e-4 * noise
    found = leading(s.float(), torch.linalg.svd(before).Vh[:48].T.float())
    true = torch.linalg.svdvals(s)
    assert lost(s, found, 40) - least(true, 40) <= found.excess(40) < 1e-3 * least(true, 40)


@pytest.mark.parametrize("spike", [1.0, 1e2, 1e4])
@pytest.mark.parametrize("decades", [0, 1, 3, 6, 15])
@pytest.mark.parametrize("start", ["good", "near", "random"])
def test_rounding_is_allowed_for(spike: float, decades: int, start: str) -> None:
    """float32, where a large component drowns small ones and where they are below its rounding."""
    k, p = 96, 40
    generator = torch.Generator().manual_seed(decades)
    sigma = torch.logspace(0, -decades, k, dtype=torch.float64)
    sigma[0] = spike
    s = matrix(k, 140, sigma, 7).float()
    rows = torch.linalg.svd(s.double(), full_matrices=False).Vh[:p].T
    noise = torch.randn(140, p, generator=generator, dtype=torch.float64)
    basis = {"good": rows, "near": rows + 1e-3 * noise, "random": noise}[start]
    found, true = leading(s, basis.float()), torch.linalg.svdvals(s.double())
    assert (found.bounds(k) >= true * (1 - 1e-12)).all()
    for rank in (1, 10, p):
        gap = lost(s, found, rank) - least(true, rank)
        assert found.excess(rank) >= gap - 1e-14 * spike**2


def test_rounding_does_not_make_the_bound_useless_where_little_is_lost() -> None:
    """A metric stretches singular values over decades: the largest have gaps of their own."""
    m, n, rank = 192, 288, 80
    before = matrix(m, n, torch.arange(1, rank + 1, dtype=torch.float64) ** -1.6)
    noise = torch.randn(m, n, generator=torch.Generator().manual_seed(0)).double()
    s = before + 2e-6 * noise
    found = leading(s.float(), torch.linalg.svd(before).Vh[: rank + 8].T.float())
    best = least(torch.linalg.svdvals(s), rank)
    assert best < 1e-7 * float(s.square().sum())
    assert found.excess(rank) < 0.01 * best
