"""Weighted low-rank approximation by iteration, against brute force and against itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fxcompress.forms import Target, find_form
from fxcompress.metric import elementwise
from fxcompress.metric.elementwise import ELEMENTWISE, Elementwise, approximate
from fxcompress.metric.moments import Moments
from fxcompress.metric.whiten import Whiteners
from fxcompress.operators.modules import shape_of
from tests.convolutions import CASES, build


def problem(m: int, c: int, q: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    w = torch.randn(m, c, q, dtype=torch.float64)
    # Weights over three orders of magnitude, with no structure by rows and columns.
    return w, torch.exp(3.5 * torch.randn(m, c, q, dtype=torch.float64))


def product(factors: Any) -> Tensor:
    if len(factors) == 2:
        return torch.einsum("mrq,rc->mcq", *factors)
    return torch.einsum("ms,srq,rc->mcq", *factors)


def loss_of(w: Tensor, f: Tensor, approximation: Tensor) -> float:
    return 0.5 * float((f * (w - approximation).square()).sum())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_the_loss_never_rises_and_beats_the_closed_forms(
    rank: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    w, f = problem(7, 9, seed=seed)
    monkeypatch.setattr(elementwise, "SETTLED", 0.0)
    losses = []
    for steps in range(40):
        monkeypatch.setattr(elementwise, "STEPS", steps)
        factors, loss = approximate(w, f, rank)
        assert loss == pytest.approx(loss_of(w, f, product(factors)), rel=1e-9)
        losses.append(loss)
    assert (np.diff(losses) <= 1e-12 * losses[0]).all()
    assert losses[-1] < losses[0]  # better than the truncation in row and column weights
    u, s, v = torch.linalg.svd(w[..., 0], full_matrices=False)
    plain = ((u[:, :rank] * s[:rank]) @ v[:rank])[..., None]
    assert losses[-1] < loss_of(w, f, plain)


@pytest.mark.parametrize("seed", range(3))
def test_rank_one_against_brute_force(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """2 x 2 of rank 1: the best over all directions of the right factor, on a fine grid."""
    w, f = problem(2, 2, seed=seed)
    monkeypatch.setattr(elementwise, "STEPS", 3000)
    monkeypatch.setattr(elementwise, "SETTLED", 0.0)
    _, loss = approximate(w, f, 1)
    best = np.inf
    for angle in torch.linspace(0, torch.pi, 20001, dtype=torch.float64):
        b = torch.stack([angle.cos(), angle.sin()])
        a = (f[..., 0] * w[..., 0] * b).sum(1) / (f[..., 0] * b.square()).sum(1)
        best = min(best, loss_of(w, f, torch.outer(a, b)[..., None]))
    # It is a descent, so that it can end in a local optimum; on these three it does not.
    assert 0.99 * best < loss < best * (1 + 1e-6)  # the grid is coarse


@pytest.mark.parametrize("kind", ["rows", "columns", "both"])
def test_separable_weights_have_a_closed_form(kind: str) -> None:
    torch.manual_seed(0)
    w = torch.randn(6, 5, 1, dtype=torch.float64)
    p = torch.rand(6, 1, 1).double() + 0.1 if kind != "columns" else torch.ones(6, 1, 1).double()
    q = torch.rand(1, 5, 1).double() + 0.1 if kind != "rows" else torch.ones(1, 5, 1).double()
    whitened = (w * p.sqrt() * q.sqrt())[..., 0]
    sigma = torch.linalg.svdvals(whitened)
    for rank in (1, 3, 5):
        _, loss = approximate(w, (p * q).expand_as(w).clone(), rank)
        assert loss == pytest.approx(0.5 * float(sigma[rank:].square().sum()), abs=1e-10)


@pytest.mark.parametrize("pair", [(1, 1), (3, 2), (6, 5)])
def test_two_ranks(pair: tuple[int, int]) -> None:
    w, f = problem(5, 6, 4)
    factors, loss = approximate(w, f, pair)
    assert [tuple(x.shape) for x in factors] == [(5, pair[1]), (pair[1], pair[0], 4), (pair[0], 6)]
    assert loss == pytest.approx(loss_of(w, f, product(factors)), rel=1e-9, abs=1e-10)
    if pair == (6, 5):
        assert loss == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("name", ["channel", "channel_input", "spatial", "tucker2", "pivoted"])
def test_every_form_has_the_loss_that_it_says(name: str) -> None:
    torch.manual_seed(0)
    layer = build(CASES["2d, strided, dilated, groups"])
    shape = shape_of(layer)
    weight = shape.canonical(layer.weight.detach())
    f = torch.rand(2, 4, 3 * 6, dtype=torch.float64) ** 4
    metric = ELEMENTWISE.quadratic(shape, Moments(entries=f), Whiteners((0.0, 0.0)))
    target = Target(weight, metric)
    form = find_form(name, "conv2d")
    full = form.full_rank(shape)
    ranks = np.array([full]) if isinstance(full, tuple) else np.arange(1, full + 1)
    for rank, loss in zip(ranks.tolist(), form.losses(target, ranks), strict=True):
        assert np.isfinite(loss)
        key = tuple(rank) if isinstance(rank, list) else rank
        found = form.product(shape, form.factors(target, key)) - weight
        dense = 0.5 * float((f.reshape(weight.shape) * found.square()).sum())
        # Weights of no influence are raised to a millionth of the mean.
        assert loss == pytest.approx(dense, rel=1e-4, abs=1e-10)
    assert form.losses(target, ranks)[-1] == pytest.approx(0, abs=1e-12)


def test_not_every_rank_is_offered_and_the_others_are_infinite() -> None:
    w, f = problem(40, 50)
    target = Target(w[..., 0], Elementwise(f[..., 0]))
    losses = find_form("low_rank").losses(target, np.arange(1, 41))
    assert np.isfinite(losses).sum() == elementwise.OFFERED
    assert np.isfinite(losses[[0, -1]]).all()


def test_weights_without_influence() -> None:
    """A dead row, a dead column, and a layer without any influence."""
    w, f = problem(4, 5)
    f[1], f[:, 2] = 0, 0
    target = Target(w[..., 0], Elementwise(f[..., 0]))
    left, right = find_form("low_rank").factors(target, 2)
    assert bool((left @ right).isfinite().all())
    nothing = Elementwise(torch.zeros(4, 5).double())
    assert nothing.null
    assert find_form("low_rank").losses(Target(w[..., 0], nothing), np.array([1]))[0] < 1e-140
    with pytest.raises(ValueError, match="not finite"):
        Elementwise(torch.full((4, 5), torch.nan))


def test_linear_layers_by_the_whole_compiler() -> None:
    import fxcompress

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 5))
    batches = [torch.randn(32, 12) for _ in range(4)]
    rules = fxcompress.rules.load_rules("every-linear").rules.model_copy(
        update={"metric": fxcompress.rules.Metric(kind="elementwise")}
    )
    small = fxcompress.compile(model, rules, batches, keep=0.7)
    plan = fxcompress.plan_of(small)
    assert plan.loss_unit == "nats per prediction"
    assert plan.budget.cost <= plan.budget.limit
    assert plan.budget.predicted > 0
