"""One thresholding, against brute force; warm starts, against full decompositions."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from fxcompress.isvt.threshold import TOLERANCE
from fxcompress.metric.moments import Moments
from tests.isvt.problems import Branches, Problem, mlp, move, rules


def root(matrix: Tensor, damping: float) -> Tensor:
    """The symmetric root of a damped factor."""
    damped = matrix + damping * matrix.diagonal().mean() * torch.eye(len(matrix)).double()
    values, vectors = torch.linalg.eigh(damped)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def truncations(w: Tensor, a: Tensor, g: Tensor) -> list[tuple[float, Tensor]]:
    """Loss and weight of every rank 0..k, by SVD between symmetric roots."""
    u, s, v = torch.linalg.svd(g @ w @ a)
    out = []
    for rank in range(len(s) + 1):
        kept = (u[:, :rank] * s[:rank]) @ v[:rank]
        weight = torch.linalg.solve(g, torch.linalg.solve(a, kept.T).T)
        out.append((0.5 * float(s[rank:].square().sum()), weight))
    return out


@pytest.mark.parametrize("keep", [0.25, 0.4, 0.6])
@pytest.mark.parametrize("degenerate", [False, True])
def test_it_is_the_prox_of_the_rank_in_the_metric(keep: float, degenerate: bool) -> None:
    """``argmin ½‖V - W‖²`` in the metric over all V within the budget, by brute force."""
    model = Branches((12, 10), (8, 14)).double()
    x = torch.randn(64, 24).double()
    if degenerate:  # an input that never varies, and two that are equal
        x[:, 2] = 0.0
        x[:, 12] = x[:, 13]
    case = Problem.of(model, rules(keep), [x])
    weights = [part.weight.detach().clone() for part in model.parts]  # type: ignore[union-attr]
    with torch.no_grad():
        rows = torch.split(x, [10, 14], 1)
    moments = _moments(case, [x])
    own = []
    for index, (w, inputs) in enumerate(zip(weights, rows, strict=True)):
        a = root(inputs.T @ inputs / len(inputs), 1e-3)
        own.append(truncations(w, a, root(moments[index], 1e-1)))
    found = case.threshold()
    new = {site.name: weight for site, weight in found.weights()}
    for name, weight in new.items():
        index = int(name[-1])
        rank = found.ranks()[name]
        torch.testing.assert_close(weight, own[index][rank][1], rtol=1e-6, atol=1e-8)
    # and no combination of ranks within the budget loses less, but for the duality gap
    sizes = [(sum(w.shape), w.numel(), min(w.shape)) for w in weights]
    costs = [[*(r * each for r in range(1, most + 1)), dense] for each, dense, most in sizes]
    losses = [[*(loss for loss, _ in o[1:]), 0.0] for o in own]
    limit = keep * sum(w.numel() for w in weights)
    best = min(
        losses[0][i] + losses[1][j]
        for i, j in itertools.product(range(len(losses[0])), range(len(losses[1])))
        if costs[0][i] + costs[1][j] <= limit
    )
    assert found.predicted == pytest.approx(best, rel=1e-6)
    assert found.cost <= limit


def _moments(case: Problem, batches: list[Tensor]) -> list[Tensor]:
    from fxcompress.metric import METRICS, calibrate

    found = calibrate(case.found.model, case.found.sites, batches, METRICS["kfac"]).moments
    outputs: list[Moments] = [found[site.name] for site in case.found.sites]
    return [moment.output for moment in outputs if moment.output is not None]


@pytest.mark.parametrize("forms", [("low_rank",), ("pivoted",), ("low_rank", "pivoted")])
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("amount", [0.0, 1e-3, 0.05, 0.5])
def test_a_warm_start_finds_the_ranks_of_the_full_one(
    forms: tuple[str, ...], joint: bool, amount: float
) -> None:
    model: nn.Module = mlp(48)
    if joint:
        model = nn.Sequential(Fan(16, 40), nn.Tanh(), nn.Linear(120, 7))
    data = [torch.randn(64, 16)]
    loaded = rules(0.4, forms)
    if joint:
        loaded = rules(0.4, ("low_rank", "joint"), joint=True, rule=None)
    case = Problem.of(model, loaded, data)
    first = case.threshold()
    assert first.full
    with torch.no_grad():
        for site, weight in [*first.weights()]:
            case.found.model.get_parameter(site.weight).copy_(site.shape.stored(weight))
    move(model, amount)
    warm, full = case.threshold(first.starts), case.threshold()
    assert warm.ranks() == full.ranks()
    assert warm.cost == full.cost
    assert warm.predicted == pytest.approx(full.predicted, rel=TOLERANCE, abs=1e-9)
    for (site, one), (_, other) in zip(warm.weights(), full.weights(), strict=True):
        change = case.metrics[site.name].loss((one - other).double())
        assert change <= 0.05 * full.predicted + 1e-9
    if 0 < amount < 0.01:
        assert len(warm.full) < len(full.full)


class Fan(nn.Module):
    """Three linear layers on one input."""

    def __init__(self, n: int, m: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(n, m) for _ in "qkv")

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q(x), self.k(x), self.v(x)], -1)


@pytest.mark.parametrize("size", [0.5, 3.0, 30.0])
@pytest.mark.parametrize("seen", [0.0, 1e-12, 1e-7, 1e-4])
def test_a_start_that_misses_a_component_is_found_out(size: float, seen: float) -> None:
    """The certificate, end to end: a large component appears where the start sees nothing of it.

    What rounding, or ``seen``, shows it of the component may be found by chance, half of it.
    """
    model = mlp(48)
    case = Problem.of(model, rules(0.4), [torch.randn(64, 16)])
    first = case.threshold()
    with torch.no_grad():
        hidden, metric = case.weight("2"), case.metrics["2"]
        start = first.starts["2"].double()
        whitened = metric.inputs.into(metric.outputs.into(hidden.double()).T).T

        def outside(columns: Tensor) -> Tensor:
            return torch.linalg.svd(columns).U[:, -1:]

        beside = outside(start)
        left = metric.outputs.out_of(outside(whitened @ start))
        right = metric.inputs.out_of(beside)
        hidden += size * float(torch.linalg.svdvals(whitened)[0]) * left @ right.T
        starts = {**first.starts, "2": (start + seen * start.norm() * beside).float()}
    require_as_good(case, starts)


@pytest.mark.parametrize("width", [16, 40, 96])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [0.05, 1.0, 20.0])
@pytest.mark.parametrize("keep", [0.2, 0.45])
def test_a_start_exactly_orthogonal_to_a_block_is_found_out(
    width: int, dtype: torch.dtype, size: float, keep: float
) -> None:
    """Blocks of disjoint support, one of them new: no iteration and no rounding leads to it."""
    half = width // 2
    model = Branches((width, width), (12, 20)).to(dtype)
    loaded = rules(keep, metric="euclidean")
    case = Problem.of(model, loaded, [torch.randn(8, width + 20, dtype=dtype)])
    weight = case.weight("parts.0")
    with torch.no_grad():
        weight[half:] = 0.0
        weight[:, half:] = 0.0
        first = case.threshold()
        weight[half:, half:] = size * torch.randn(half, half)
    start = torch.zeros(width, half, dtype=dtype)
    start[:half] = torch.linalg.svd(weight.detach()[:half, :half]).Vh.T
    require_as_good(case, {**first.starts, "parts.0": start})


def require_as_good(case: Problem, starts: Mapping[str, Tensor]) -> None:
    """From any starts: the same ranks, and all weights lose what they have to."""
    warm, full = case.threshold(starts), case.threshold()
    assert warm.ranks() == full.ranks()
    assert warm.predicted == pytest.approx(full.predicted, rel=TOLERANCE)
    new = {site.name: weight for site, weight in warm.weights()}
    lost = sum(
        case.metrics[name].loss((weight - case.weight(name)).double())
        for name, weight in new.items()
    )
    assert lost == pytest.approx(full.predicted, rel=TOLERANCE)


def test_uniform_ranks_and_several_budgets_are_decomposed_in_full() -> None:
    model = mlp(48)
    case = Problem.of(model, rules(0.4, allocation="uniform"), [torch.randn(64, 16)])
    first = case.threshold()
    again = case.threshold(first.starts)
    assert len(again.full) == 3
    assert again.ranks() == first.ranks()
