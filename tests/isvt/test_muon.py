"""Orthogonalized steps, against singular value decompositions and torch's own optimizer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fxcompress.isvt.muon import COEFFICIENTS, ITERATIONS, Muon, orthogonalized


def matrix(m: int, n: int, decades: float, rank: int, seed: int = 0) -> Tensor:
    """Singular values that fall evenly, on a logarithmic scale."""
    generator = torch.Generator().manual_seed(seed)
    u, v = (
        torch.linalg.qr(torch.randn(k, rank, generator=generator, dtype=torch.float64)).Q
        for k in (m, n)
    )
    return (u * torch.logspace(0, -decades, rank, dtype=torch.float64)) @ v.T


def by_svd(x: Tensor) -> Tensor:
    """The same polynomials, singular value by singular value."""
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    s = s / s.norm()
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        s = a * s + b * s**3 + c * s**5
    return (u * s) @ v


@pytest.mark.parametrize(("m", "n"), [(12, 30), (30, 12), (9, 9), (1, 5), (5, 1)])
@pytest.mark.parametrize("decades", [0.0, 2.0, 5.0])
def test_it_is_the_iteration_on_the_singular_values(m: int, n: int, decades: float) -> None:
    for rank in {1, min(m, n) // 2, min(m, n)} - {0}:
        x = 1e-7 * matrix(m, n, decades, rank)  # gradients are small
        torch.testing.assert_close(orthogonalized(x), by_svd(x), rtol=0.0, atol=1e-9)
        single = orthogonalized(x.float())
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), by_svd(x), rtol=0.0, atol=5e-3)


def test_singular_values_come_out_alike() -> None:
    x = matrix(40, 60, 1.5, 40)
    found = torch.linalg.svdvals(orthogonalized(x.float()))
    assert 0.68 < float(found.min()) <= float(found.max()) < 1.21


def test_a_zero_gradient_is_no_step() -> None:
    assert torch.equal(orthogonalized(torch.zeros(3, 4)), torch.zeros(3, 4))


def test_steps_are_those_of_torch() -> None:
    """Up to its bfloat16."""
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.zeros(24, 40)) for _ in range(2))
    own = Muon([ours], lr=0.1)
    other = torch.optim.Muon(
        [theirs], lr=0.1, weight_decay=0.0, momentum=0.9, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(3):
        ours.grad = torch.randn(24, 40)
        theirs.grad = ours.grad.clone()
        own.step()
        other.step()
    with torch.no_grad():
        assert float((ours - theirs).norm()) < 0.02 * float(theirs.norm())


def test_weights_in_bfloat16() -> None:
    weight = nn.Parameter(torch.zeros(4, 6, dtype=torch.bfloat16))
    weight.grad = torch.randn(4, 6).bfloat16()
    optimizer = Muon([weight], lr=1.0)
    optimizer.step()
    assert weight.dtype == torch.bfloat16
    assert float(weight.float().square().mean().sqrt()) == pytest.approx(0.2, rel=0.2)
