"""Leading components and their certificate, against full decompositions in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxcompress.isvt.subspace import leading


def matrix(m: int, n: int, sigma: Tensor, seed: int = 0) -> Tensor:
    """A matrix with given singular values."""
    generator = torch.Generator().manual_seed(seed)

    def orthonormal(rows: int) -> Tensor:
        square = torch.randn(rows, len(sigma), generator=generator, dtype=torch.float64)
        return torch.linalg.qr(square).Q

    return (orthonormal(m) * sigma) @ orthonormal(n).T


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
    for index in range(k):
        assert found.bound(index) >= float(true[index]) - tiny
    for rank in range(p + 1):
        kept = found.left[:, :rank] @ found.right[:rank]
        lost = 0.5 * float((s - kept).square().sum())
        assert float(found.loss()[rank]) == pytest.approx(lost, rel=1e-8, abs=1e-12)


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
    assert found.bound(2) >= 3.0 - 1e-12


@pytest.mark.parametrize("p", [1, 3, 5])
def test_singular_matrices(p: int) -> None:
    zero = leading(torch.zeros(7, 5), torch.randn(5, p))
    assert float(zero.sigma.abs().sum()) == 0.0
    assert zero.bound(0) == 0.0
    low = matrix(7, 5, torch.tensor([2.0, 2.0], dtype=torch.float64))  # repeated, rank 2
    found = leading(low, torch.randn(5, p, dtype=torch.float64))
    true = torch.linalg.svdvals(low)
    assert all(found.bound(at) >= float(true[at]) - 1e-9 for at in range(5))


def test_a_matrix_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        leading(torch.tensor([[float("nan")]]), torch.ones(1, 1))


def test_float32_is_enough_for_the_certificate() -> None:
    s = matrix(200, 120, torch.logspace(0, -3, 120, dtype=torch.float64))
    found = leading(s.float(), torch.linalg.svd(s).Vh[:40].T.float())
    true = torch.linalg.svdvals(s)
    assert all(found.bound(at) >= float(true[at]) * (1 - 1e-5) for at in range(120))
    assert found.bound(45) < 1.6 * float(true[40])


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
