"""Spectra and predicted losses against the dense quadratic form, degenerate metrics included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fxcompress.forms import Spectrum
from fxcompress.metric import METRICS, KroneckerMetric, Moments, calibrate, decompose
from fxcompress.metric.spectrum import decompose_whitened
from fxcompress.metric.whiten import Whitener, whitener
from tests.metric.test_moments import target

DAMPING = (1e-3, 1e-1)
SHAPES = [(4, 7), (7, 4), (5, 5), (1, 6), (6, 1)]


def gram(size: int, rank: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rank, size, generator=generator, dtype=torch.float64)
    return x.T @ x / rank


FACTORS = {
    "well-posed": lambda d: gram(d, 4 * d, 1),
    "fewer samples than channels": lambda d: gram(d, max(1, d // 2), 2),
    "dead channels": lambda d: gram(d, 4 * d, 3) * (torch.arange(d) % 2).outer(torch.arange(d) % 2),
    "constant input": lambda d: torch.ones(d, d, dtype=torch.float64),
    "huge range": lambda d: torch.diag(10.0 ** -torch.arange(0, 2 * d, 2, dtype=torch.float64)),
    "zero": lambda d: torch.zeros(d, d, dtype=torch.float64),
}


def damped(factor: Tensor, damping: float) -> Tensor:
    return factor + damping * factor.diagonal().mean() * torch.eye(len(factor), dtype=torch.float64)


def quadratic(delta: Tensor, a: Tensor, g: Tensor) -> float:
    """½ vec(Δ)ᵀ (A ⊗ G) vec(Δ), with the Kronecker product written out."""
    v = delta.T.reshape(-1)
    return 0.5 * float(v @ torch.kron(a, g) @ v)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("output", FACTORS)
@pytest.mark.parametrize("input_", FACTORS)
def test_every_rank_against_the_dense_quadratic_form(
    shape: tuple[int, int], input_: str, output: str
) -> None:
    m, n = shape
    torch.manual_seed(0)
    w = torch.randn(m, n, dtype=torch.float64)
    a, g = FACTORS[input_](n), FACTORS[output](m)
    spectrum = decompose(w, a, g, damping=DAMPING)
    assert spectrum.sigma.isfinite().all()
    assert (spectrum.sigma.diff() <= 0).all()
    # Full rank reproduces the weight, whatever the metric.
    torch.testing.assert_close(spectrum.left @ spectrum.right, w, rtol=0, atol=1e-10)
    losses = spectrum.loss()
    a, g = damped(a, DAMPING[0]), damped(g, DAMPING[1])
    for rank in range(min(m, n) + 1):
        delta = w - spectrum.left[:, :rank] @ spectrum.right[:rank]
        dense = quadratic(delta, a, g)
        assert float(losses[rank]) == pytest.approx(dense, rel=1e-7, abs=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_truncation_is_optimal(shape: tuple[int, int]) -> None:
    """No other matrix of the rank comes closer: checked against alternating least squares from
    random starts, which descend to the optimum in the metric."""
    m, n = shape
    w, a, g = torch.randn(m, n).double(), damped(gram(n, 9, 1), 1e-3), damped(gram(m, 9, 2), 1e-1)
    spectrum = decompose(w, gram(n, 9, 1), gram(m, 9, 2), damping=DAMPING)
    for rank in range(1, min(m, n)):
        best = float(spectrum.loss()[rank])
        for start in range(3):
            torch.manual_seed(start)
            left = torch.randn(m, rank, dtype=torch.float64)
            for _ in range(200):
                right = torch.linalg.solve(left.T @ g @ left, left.T @ g @ w)
                left = torch.linalg.solve(right @ a @ right.T, right @ a @ w.T).T
            assert quadratic(w - left @ right, a, g) >= best * (1 - 1e-9)


@pytest.mark.parametrize("damping", [0.0, 1e-12])
def test_without_damping_a_singular_factor_still_works(damping: float) -> None:
    w = torch.randn(5, 6, dtype=torch.float64)
    a, g = gram(6, 2, 0), gram(5, 3, 0)
    spectrum = decompose(w, a, g, damping=(damping, damping))
    # Rank 2 inputs and rank 3 gradients: beyond rank 2 nothing is left to lose.
    assert float(spectrum.loss()[2]) < 1e-6 * float(spectrum.loss()[0])
    delta = w - spectrum.left[:, :2] @ spectrum.right[:2]
    assert quadratic(delta, a, g) < 1e-6 * quadratic(w, a, g)
    torch.testing.assert_close(spectrum.left @ spectrum.right, w, rtol=0, atol=1e-4)


def test_cholesky_and_symmetric_roots_give_the_same_truncation() -> None:
    w, a = torch.randn(6, 8).double(), gram(8, 20, 0)
    from fxcompress.metric.spectrum import decompose_whitened
    from fxcompress.metric.whiten import Whitener

    values, vectors = torch.linalg.eigh(damped(a, 1e-3))
    symmetric = (vectors * values.sqrt()) @ vectors.T
    by_root = decompose_whitened(
        w, Whitener(root=(symmetric, torch.linalg.inv(symmetric).T)), whitener(None, 0)
    )
    by_cholesky = decompose(w, a, None, damping=DAMPING)
    torch.testing.assert_close(by_root.sigma, by_cholesky.sigma)
    torch.testing.assert_close(
        by_root.left[:, :3] @ by_root.right[:3], by_cholesky.left[:, :3] @ by_cholesky.right[:3]
    )


def test_squaring_blurs_only_what_does_not_matter() -> None:
    """σ to 1e-8 of the largest, losses to 1e-14 of the whole, over twelve orders of magnitude."""
    torch.manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(12, 12).double()).Q for _ in range(2))
    sigma = 10.0 ** -torch.arange(12, dtype=torch.float64)
    w = (u * sigma) @ v.T
    spectrum = decompose(w, None, None, damping=DAMPING)
    torch.testing.assert_close(spectrum.sigma, sigma, rtol=0, atol=1e-8)
    for rank in range(13):
        lost = float((w - spectrum.left[:, :rank] @ spectrum.right[:rank]).square().sum()) / 2
        assert float(spectrum.loss()[rank]) == pytest.approx(lost, rel=1e-6, abs=1e-16)
        assert lost == pytest.approx(float(sigma[rank:].square().sum()) / 2, rel=1e-6, abs=1e-14)


def test_not_finite_is_an_error() -> None:
    w = torch.randn(3, 4).double()
    with pytest.raises(ValueError, match="weight is not finite"):
        decompose(w * torch.nan, None, None, damping=DAMPING)
    with pytest.raises(ValueError, match="factor is not finite"):
        decompose(w, torch.full((4, 4), torch.inf), None, damping=DAMPING)


KRONECKER = {n: each for n, each in METRICS.items() if isinstance(each, KroneckerMetric)}


@pytest.mark.parametrize(
    ("name", "inputs", "outputs"),
    [
        ("euclidean", None, None),
        ("activation", "input", None),
        ("diagonal", None, "weight"),
        ("kfac", "input", "output"),
        ("ekfac", "input", "output"),
    ],
)
def test_metric_factors(name: str, inputs: str | None, outputs: str | None) -> None:
    moments = Moments(gram(4, 9, 0), gram(3, 9, 0), torch.rand(3).double())
    for found, word in zip(KRONECKER[name].factors(moments), (inputs, outputs), strict=True):
        assert found is (getattr(moments, word) if word else None)


def exact_fisher(model: nn.Linear, x: Tensor) -> Tensor:
    """E_x E_{y~p} ∇∇ᵀ over vec(W) (column-major), every label enumerated."""
    m, n = model.weight.shape
    total = torch.zeros(m * n, m * n, dtype=torch.float64)
    for row in x:
        p = model(row).softmax(-1).detach()
        for label in range(m):
            (gradient,) = torch.autograd.grad(model(row).log_softmax(-1)[label], model.weight)
            v = gradient.T.reshape(-1)
            total += p[label] * torch.outer(v, v)
    return total / len(x)


def test_kfac_is_the_exact_fisher_where_its_assumption_holds() -> None:
    """Softmax regression on one input: A ⊗ G is the Fisher, and ½ vec(Δ)ᵀ F vec(Δ) is the KL."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3, bias=False).double()
    x = torch.randn(1, 4, dtype=torch.float64)
    wrapped = nn.Sequential(model)
    data = [x.repeat(20_000, 1)] * 10
    found = calibrate(wrapped, [target(wrapped, "0")], data, METRICS["kfac"])
    a, g = KRONECKER["kfac"].factors(found.moments["0"])
    assert isinstance(a, Tensor)
    assert isinstance(g, Tensor)
    fisher = exact_fisher(model, x)
    error = (torch.kron(a, g) - fisher).abs().max() / fisher.abs().max()
    assert float(error) < 5 / 200_000**0.5  # sampled labels: five standard errors
    delta = 1e-3 * torch.randn(3, 4, dtype=torch.float64)
    p = model(x).softmax(-1)
    q = (x @ (model.weight + delta).T).softmax(-1)
    kl = float((p * (p / q).log()).sum().detach())
    assert quadratic(delta, a, g) == pytest.approx(kl, rel=0.02)


def test_diagonal_is_the_diagonal_of_the_exact_fisher() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3, bias=False).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    wrapped = nn.Sequential(model)
    found = calibrate(wrapped, [target(wrapped, "0")], [x] * 20_000, METRICS["diagonal"])
    rows = exact_fisher(model, x).diagonal().view(4, 3).mean(0)
    _, w = KRONECKER["diagonal"].factors(found.moments["0"])
    assert isinstance(w, Tensor)
    assert float(((w - rows) / rows).abs().max()) < 0.03
    spectrum: Spectrum = decompose(model.weight, None, w, damping=(0, 0))
    weighted = model.weight * w.sqrt()[:, None]
    torch.testing.assert_close(spectrum.sigma, torch.linalg.svdvals(weighted))


@pytest.mark.parametrize("size", [1, 191, 192, 193, 500])
@pytest.mark.parametrize("kind", ["triangular", "root", "diagonal"])
def test_products_of_a_whitener_are_those_of_its_root(size: int, kind: str) -> None:
    """In panels, the last of them narrower; in the type of what is multiplied."""
    generator = torch.Generator().manual_seed(size)
    rows = torch.randn(2 * size, size, generator=generator, dtype=torch.float64)
    factor = rows.T @ rows / len(rows)
    if kind == "diagonal":
        factor = factor.diagonal().clone()
    found = whitener(factor, 0.0 if kind == "root" else 1e-2)
    x = torch.randn(size, 3, generator=generator, dtype=torch.float64)
    dense = found.matrix if kind != "diagonal" else torch.diag(factor + 1e-2 * factor.mean())
    assert dense is not None
    there = found.into(x)
    torch.testing.assert_close(there.T @ there, x.T @ dense @ x)  # L Lᵀ is the factor
    torch.testing.assert_close(found.out_of(there), x)
    torch.testing.assert_close(found.solve(x), torch.linalg.solve(dense, x))
    for product in (found.into, found.out_of, found.solve):
        assert product(x.float()).dtype == torch.float32
        torch.testing.assert_close(product(x.float()).double(), product(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("damping", [0.0, 1e-12, 1e-2])
@pytest.mark.parametrize("rank", [1, 5])
def test_a_root_of_few_rows_is_as_good_as_the_factor(damping: float, rank: int) -> None:
    """Five rows of 12 features, of rank 5 or 1, against the dense factor; no (d x d) is formed."""
    torch.manual_seed(0)
    rows = torch.randn(5, rank, dtype=torch.float64) @ torch.randn(rank, 12, dtype=torch.float64)
    few, dense = whitener(rows, damping), whitener(rows.T @ rows, damping)
    assert few.few is not None
    assert not few.plain
    x, eye = torch.randn(12, 3, dtype=torch.float64), torch.eye(12, dtype=torch.float64)
    root = few.into(eye)
    scale = float(rows.square().sum())
    assert dense.matrix is not None
    torch.testing.assert_close(root.T @ root, dense.matrix, rtol=0, atol=1e-13 * scale)
    torch.testing.assert_close(few.into(few.out_of(x)), x, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(root.T @ (root @ few.solve(x)), x, rtol=0, atol=1e-4)
    w = torch.randn(7, 12, dtype=torch.float64)
    found, wanted = (decompose_whitened(w, each, Whitener()) for each in (few, dense))
    # Where directions are not damped at all their eigenvalues are rounding, in the dense one too.
    torch.testing.assert_close(found.sigma, wanted.sigma, rtol=1e-6, atol=1e-4 * scale**0.5)
    torch.testing.assert_close(found.left @ found.right, w, rtol=1e-5, atol=1e-5)
    assert whitener(torch.zeros(2, 12), damping).null
    with pytest.raises(ValueError, match="not finite"):
        whitener(torch.full((2, 12), torch.inf), damping)


def test_narrow_types_lose_nothing_to_a_cheaper_decomposition() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 80, generator=generator).to(torch.bfloat16)
    a, g = (random_factor(n, generator) for n in (80, 48))
    found = decompose(weight, a, g, damping=(1e-3, 1e-1), dtype=torch.float64)
    exact = decompose(weight.double(), a, g, damping=(1e-3, 1e-1))
    torch.testing.assert_close(found.sigma, exact.sigma, rtol=1e-5, atol=0)
    whole = found.left @ found.right
    torch.testing.assert_close(whole, weight.double(), rtol=0, atol=1e-9 * float(whole.abs().max()))
    for rank in (1, 8, 40):
        first, second = ((x.left[:, :rank] @ x.right[:rank]) for x in (found, exact))
        torch.testing.assert_close(first, second, rtol=0, atol=1e-4 * float(second.abs().max()))


def random_factor(n: int, generator: torch.Generator) -> Tensor:
    x = torch.randn(n, 2 * n, generator=generator, dtype=torch.float64)
    return x @ x.T / n
