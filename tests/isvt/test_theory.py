"""What the theorem promises, on problems that meet its conditions (arXiv 2507.09428, section 4).

For an objective with an L-Lipschitz gradient in the metric and a step size below 1/L: the objective
plus the penalty never rises, the steps go to zero, so that limit points are fixed points, and the
ranks stop changing after finitely many steps.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fxcompress.isvt.threshold import Thresholded
from fxcompress.metric import METRICS, Moments
from fxcompress.metric.elementwise import Elementwise, approximate
from fxcompress.metric.kronecker import Kronecker
from fxcompress.metric.whiten import Whitener, Whiteners
from fxcompress.operators.linear import LinearShape
from tests.isvt.problems import Branches, Problem, mlp, rules


def spd(size: int) -> Tensor:
    root = torch.randn(size, size, dtype=torch.float64)
    return root @ root.T / size


@pytest.mark.parametrize("damping", [(1e-3, 1e-1), (0.0, 0.0)])
def test_the_whitened_gradient_solves_the_kronecker_system(damping: tuple[float, float]) -> None:
    a, g = spd(5), spd(4)
    moments = Moments(input=a, output=g)
    shape = LinearShape(5, 4, False, torch.float64)
    metric = METRICS["kfac"].quadratic(shape, moments, Whiteners(damping))
    gradient = torch.randn(4, 5, dtype=torch.float64)
    eye4, eye5 = torch.eye(4).double(), torch.eye(5).double()
    a = a + damping[0] * a.diagonal().mean() * eye5
    g = g + damping[1] * g.diagonal().mean() * eye4
    dense = torch.linalg.solve(torch.kron(g, a), gradient.flatten()).reshape(4, 5)
    torch.testing.assert_close(metric.solve(gradient), dense, rtol=1e-6, atol=1e-9)
    # it minimizes ⟨∇, Δ⟩ + ½ ‖Δ‖²_M
    step = -metric.solve(gradient)
    best = float((gradient * step).sum()) + metric.loss(step)
    for _ in range(20):
        other = step + 0.1 * torch.randn_like(step)
        assert float((gradient * other).sum()) + metric.loss(other) > best


def test_singular_metrics() -> None:
    null = Kronecker(Whitener(null=True), Whitener())
    assert not null.solve(torch.ones(2, 3)).any()
    entries = torch.tensor([[1.0, 0.0], [4.0, 2.0]], dtype=torch.float64)
    found = Elementwise(entries).solve(torch.ones(2, 2))
    assert found.isfinite().all()
    assert found[1, 0] == 0.25


def objective(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """Mean KL from given predictions."""
    p = target.log_softmax(1)
    return (p.exp() * (p - model(x).log_softmax(1))).sum(1).mean()


def smooth() -> tuple[Problem, Tensor, Tensor]:
    """A smooth network (tanh), and predictions that it is to reproduce at a lower rank."""
    torch.manual_seed(0)
    model = mlp(12).double()
    x = torch.randn(96, 16).double()
    with torch.no_grad():
        target = 2.0 * model(x)
    return Problem.of(model, rules(0.5, metric="kfac"), [x]), x, target


def step(case: Problem, value: Callable[[], Tensor], alpha: float) -> tuple[float, Thresholded]:
    """One proximal gradient step, and how far it went in the metric."""
    for parameter in case.model.parameters():
        parameter.grad = None
    value().backward()
    old = {}
    with torch.no_grad():
        for site in case.found.sites:
            weight = case.found.model.get_parameter(site.weight)
            old[site.name] = weight.clone()
            assert weight.grad is not None
            weight -= alpha * case.metrics[site.name].solve(weight.grad)
        found = case.threshold()
        moved = 0.0
        for site, weight in [*found.weights()]:
            case.found.model.get_parameter(site.weight).copy_(weight)
        for site in case.found.sites:
            change = case.found.model.get_parameter(site.weight) - old[site.name]
            moved += case.metrics[site.name].loss(change)
    return moved, found


def curvature(case: Problem, value: Callable[[], Tensor]) -> float:
    """Largest eigenvalue of the Hessian in the coordinates of the metric, by power iteration."""
    weights = [case.found.model.get_parameter(site.weight) for site in case.found.sites]
    metrics = [case.metrics[site.name] for site in case.found.sites]
    vectors = [torch.randn_like(weight) for weight in weights]
    size = 0.0
    for _ in range(30):
        gradients = torch.autograd.grad(value(), weights, create_graph=True)
        inner = sum((g * v).sum() for g, v in zip(gradients, vectors, strict=True))
        products = torch.autograd.grad(inner, weights)
        vectors = [m.solve(p) for m, p in zip(metrics, products, strict=True)]
        size = sum(2 * m.loss(v) for m, v in zip(metrics, vectors, strict=True)) ** 0.5
        vectors = [v / size for v in vectors]
    return size


def test_descent_is_monotone_below_one_over_l_and_limits_are_fixed_points() -> None:
    case, x, target = smooth()

    def value() -> Tensor:
        return objective(case.model, x, target)

    alpha = 0.3 / curvature(case, value)  # L at the start; room for where it is larger
    step(case, value, alpha)  # into the budget
    objectives, moves = [float(value().detach())], []
    for _ in range(300):
        moved, _ = step(case, value, alpha)
        moves.append(moved)
        objectives.append(float(value().detach()))
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(objectives))
    assert objectives[-1] < 0.5 * objectives[0]
    # The residual of the fixed-point equation, summable: min over k falls faster than 1/k.
    assert min(moves[-10:]) < 0.03 * moves[0]


def test_steps_far_above_one_over_l_do_not_descend() -> None:
    """So the test above can fail."""
    case, x, target = smooth()

    def value() -> Tensor:
        return objective(case.model, x, target)

    alpha = 30.0 / curvature(case, value)
    step(case, value, alpha)
    objectives = [float(value().detach())]
    for _ in range(10):
        step(case, value, alpha)
        objectives.append(float(value().detach()))
    assert any(b > a for a, b in itertools.pairwise(objectives))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_matrix_completion_finds_the_ranks_and_the_matrices(seed: int) -> None:
    """Two matrices of ranks 1 and 4, half of the entries seen, one budget for both."""
    torch.manual_seed(seed)
    model = Branches((24, 24), (24, 24)).double()
    truth = [torch.randn(24, r).double() @ torch.randn(r, 24).double() for r in (1, 4)]
    seen = [torch.rand(24, 24) < share for share in (0.5, 0.8)]
    with torch.no_grad():
        for part, t, mask in zip(model.parts, truth, seen, strict=True):
            part.weight.copy_(t * mask)  # zero where nothing is known
    keep = (5 * 48 + 1) / (2 * 24 * 24)
    case = Problem.of(model, rules(keep, metric="euclidean"), [torch.randn(8, 48).double()])

    def value() -> Tensor:
        weights = [part.weight for part in model.parts]
        parts = zip(weights, truth, seen, strict=True)
        return torch.stack([0.5 * ((w - t)[mask]).square().sum() for w, t, mask in parts]).sum()

    ranks = []
    for _ in range(600):
        _, found = step(case, value, 0.99)  # L = 1: a projection in the Euclidean metric
        ranks.append(tuple(found.ranks().values()))
    assert ranks[-1] == (1, 4)
    changes = [at for at in range(1, len(ranks)) if ranks[at] != ranks[at - 1]]
    assert max(changes, default=0) < 300  # identified after finitely many steps
    for part, t in zip(model.parts, truth, strict=True):
        assert float((part.weight - t).norm() / t.norm()) < 1e-3


def test_the_elementwise_metric_is_majorize_minimize() -> None:
    """Its iterations are ISVT on ``½ Σ F (V - W)²``: never worse than the prox they start from."""
    w = torch.randn(8, 6, dtype=torch.float64)
    f = torch.rand(8, 6, dtype=torch.float64) ** 3
    losses = []
    for rank in range(1, 7):
        (left, right), loss = approximate(w[:, :, None], f[:, :, None], rank)
        product = left.flatten(1) @ right
        direct = 0.5 * float((f * (product - w).square()).sum())
        assert loss == pytest.approx(direct, rel=1e-6, abs=1e-9)
        losses.append(loss)
        q = f.mean(0)  # F <= p q, the tightest p
        p = (f / q).max(1).values
        u, s, v = torch.linalg.svd(p.sqrt()[:, None] * w * q.sqrt())
        start = (u[:, :rank] * s[:rank]) @ v[:rank] / p.sqrt()[:, None] / q.sqrt()
        first = 0.5 * float((f * (start - w).square()).sum())
        assert direct <= first + 1e-12
        # one plain step: a prox of the gradient in the metric p q, with α = 1
        ahead = start - Elementwise(p[:, None] * q).solve(f * (start - w))
        u, s, v = torch.linalg.svd(p.sqrt()[:, None] * ahead * q.sqrt())
        after = (u[:, :rank] * s[:rank]) @ v[:rank] / p.sqrt()[:, None] / q.sqrt()
        assert 0.5 * float((f * (after - w).square()).sum()) <= first + 1e-12
    assert losses == sorted(losses, reverse=True)
