"""Bundles in their metric, against dense linear algebra in float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fxcompress.forms import Form, LinearShape, Target, find_form, fit
from fxcompress.metric import METRICS, Moments
from fxcompress.pipeline.decomposition import Decomposition, decompose_groups, metric_from
from fxcompress.pipeline.sites import Group, Site
from fxcompress.rules import Bundle, Limits, Match
from tests.full_rank import random_spd

N, WIDTHS = 7, (6, 3, 4)
DAMPING = (1e-3, 1e-1)


def match(weight: str, forms: tuple[str, ...]) -> Match:
    return Match(
        rule_id="r", weight=weight, operators=(weight,), op="linear", forms=forms,
        limits=Limits(), group=None, location="r.yaml:1", path=weight,
    )  # fmt: skip


def site(name: str, m: int, forms: tuple[str, ...]) -> Site:
    return Site(
        name=name, weight=f"{name}.weight", op="linear",
        shape=LinearShape(N, m, False, torch.float64, rows=10), calls=1, source="x",
        match=match(f"{name}.weight", forms),
    )  # fmt: skip


def single(site: Site, forms: dict[str, Form]) -> Group:
    fitted = {name: fit(form, [site.shape]) for name, form in forms.items()}
    return Group(site.name, (site,), fitted, site.match)


class Case:
    """Three layers on one input with the moments of a metric."""

    def __init__(self, forms: dict[str, Form] | None = None) -> None:
        torch.manual_seed(0)
        self.model = nn.ModuleDict(
            {k: nn.Linear(N, m, bias=False) for k, m in zip("qkv", WIDTHS, strict=True)}
        ).double()
        forms = forms or {"low_rank": find_form("low_rank")}
        self.sites = tuple(site(k, m, tuple(forms)) for k, m in zip("qkv", WIDTHS, strict=True))
        self.a = random_spd(N)
        self.g = {k: random_spd(m) for k, m in zip("qkv", WIDTHS, strict=True)}
        words = ("b", "r", "r.yaml:1", (), ("q", "k", "v"), ("joint",))
        limits = Bundle(*words, Limits())
        joint = {"joint": fit(find_form("joint"), [site.shape for site in self.sites])}
        self.bundle = Group("b", self.sites, joint, limits)
        self.groups = (*(single(site, forms) for site in self.sites), self.bundle)

    def decompose(self) -> Decomposition:
        moments = {k: Moments(input=self.a, output=self.g[k]) for k in "qkv"}
        metric_of = metric_from(moments, METRICS["kfac"], DAMPING)
        return decompose_groups(self.model, self.groups, metric_of)

    def damped(self, matrix: Tensor, damping: float) -> Tensor:
        return matrix + damping * matrix.diagonal().mean() * torch.eye(len(matrix)).double()

    def roots(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Symmetric roots of A and of every G."""
        a = _root(self.damped(self.a, DAMPING[0]))
        return a, {k: _root(self.damped(g, DAMPING[1])) for k, g in self.g.items()}


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def test_the_joint_spectrum_is_that_of_the_stacked_whitened_weights() -> None:
    case = Case()
    found = case.decompose().groups["b"]
    a, g = case.roots()
    stacked = torch.cat([g[k] @ case.model[k].weight @ a for k in "qkv"])
    torch.testing.assert_close(found.target.spectrum.sigma, torch.linalg.svdvals(stacked))
    tail = 0.5 * torch.linalg.svdvals(stacked).square().flip(0).cumsum(0).flip(0)
    ranks = case.bundle.ranks("joint")
    assert ranks.tolist() == list(range(1, 8))
    np.testing.assert_allclose(found.losses["joint"][:-1], tail[1:].detach(), rtol=1e-9)
    assert found.losses["joint"][-1] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("rank", [1, 4, 6])
def test_the_loss_of_every_member(rank: int) -> None:
    """Each one's part is what its own rows lose; the parts add up to the whole."""
    case = Case()
    found = case.decompose().groups["b"]
    a, g = case.roots()
    approximations = (
        found.target.spectrum.left[:, :rank] @ found.target.spectrum.right[:rank]
    ).split(WIDTHS)
    wanted = [
        0.5 * float((g[k] @ (case.model[k].weight - w) @ a).square().sum())
        for k, w in zip("qkv", approximations, strict=True)
    ]
    loss = float(found.losses["joint"][rank - 1])
    assert sum(wanted) == pytest.approx(loss, rel=1e-6)
    assert found.predicted(loss, rank) == pytest.approx(wanted, rel=1e-6)


def test_no_rank_is_better_than_the_truncation() -> None:
    """Eckart and Young: any other matrix of that rank loses more."""
    case = Case()
    found = case.decompose().groups["b"]
    a, g = case.roots()
    blocks = torch.block_diag(*(g[k] for k in "qkv"))
    stacked = torch.cat([case.model[k].weight for k in "qkv"]).detach()
    best = float(found.losses["joint"][2])
    left, right = found.target.spectrum.factors(3)
    truncated = left @ right
    for _ in range(50):
        noise = [0.05 * torch.randn(*part.shape).double() for part in (stacked[:, :3], stacked[:3])]
        other = (found.target.spectrum.left[:, :3] + noise[0]) @ (
            found.target.spectrum.right[:3] + noise[1]
        )
        assert 0.5 * float((blocks @ (stacked - other) @ a).square().sum()) > best
    assert 0.5 * float((blocks @ (stacked - truncated) @ a).square().sum()) == pytest.approx(best)


def test_one_operator_in_a_bundle_of_equals_is_that_operator() -> None:
    """Stacking the same weight twice doubles the loss at every rank."""
    case = Case()
    twins = tuple(replace(case.sites[0], name=k, weight=f"{k}.weight") for k in ("q", "k"))
    model = nn.ModuleDict(dict.fromkeys(("q", "k"), case.model["q"]))
    joint = {"joint": fit(find_form("joint"), [site.shape for site in twins])}
    bundle = replace(case.bundle, sites=twins, forms=joint)
    groups = [*(single(each, {"low_rank": find_form("low_rank")}) for each in twins), bundle]
    moments = {k: Moments(input=case.a, output=case.g["q"]) for k in ("q", "k")}
    found = decompose_groups(model, groups, metric_from(moments, METRICS["kfac"], DAMPING))
    alone = found.groups["q"].losses["low_rank"]
    np.testing.assert_allclose(found.groups["b"].losses["joint"][:6], 2 * alone, atol=1e-12)
    assert found.groups["b"].predicted(1.0, 2) == pytest.approx((0.5, 0.5))


def test_a_member_without_influence_is_not_bundled() -> None:
    """Its coordinates mean nothing, so it cannot be weighed against the others."""
    case = Case()
    case.g["k"] = torch.zeros_like(case.g["k"])
    found = case.decompose()
    assert found.idle == ("k",)
    assert set(found.groups) == {"q", "k", "v"}


@pytest.mark.parametrize("rank", [1, 2])
def test_a_rank_deficient_stack(rank: int) -> None:
    """All that is lost above the true rank is rounding."""
    case = Case()
    with torch.no_grad():
        shared = torch.randn(rank, N).double()
        for k, m in zip("qkv", WIDTHS, strict=True):
            case.model[k].weight.copy_(torch.randn(m, rank).double() @ shared)
    found = case.decompose().groups["b"]
    scale = float(found.target.spectrum.sigma[0]) ** 2
    assert float(found.losses["joint"][rank - 1]) < 1e-12 * scale
    assert sum(found.predicted(0.0, rank)) == 0
    assert bool(found.target.spectrum.left.isfinite().all())


class Scaled(Form):
    """Loses what it says, and asks for the metric when it is built, too."""

    name = "scaled"

    def parameters(self, shape: LinearShape, ranks: np.ndarray) -> np.ndarray:
        return ranks

    def losses(self, target: Target, ranks: np.ndarray) -> np.ndarray:
        return np.array([target.loss(target.weight / (1 + r)) for r in ranks])

    def factors(self, target: Target, rank: int) -> tuple[Tensor, Tensor]:
        assert target.loss(target.weight) == 0
        return target.weight, torch.eye(N).double()

    def empty(self, shape: LinearShape, rank: int) -> torch.fx.GraphModule:
        raise NotImplementedError

    def fill(self, *arguments: object) -> None:
        raise NotImplementedError


def test_forms_may_ask_for_the_loss_of_any_weight() -> None:
    case = Case({"scaled": Scaled()})
    found = case.decompose().groups["q"]
    a, g = case.roots()
    w = case.model["q"].weight.detach()
    wanted = [0.5 * float((g["q"] @ (w - w / (1 + r)) @ a).square().sum()) for r in range(1, 7)]
    np.testing.assert_allclose(found.losses["scaled"], wanted, rtol=1e-9)
    Scaled().factors(found.target, 1)


def test_the_metric_is_given_up_where_no_form_needs_it() -> None:
    case = Case()
    found = case.decompose().groups["q"]
    assert found.target.quadratic is None
    with pytest.raises(RuntimeError, match="given up"):
        found.target.loss(case.model["q"].weight)
