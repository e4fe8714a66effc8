"""Moments of convolutions and embeddings against the dense Fisher, in float64.

The reference is one gradient per prediction by autograd, with the labels that are drawn.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcompress.forms import ConvShape, Shape
from fxcompress.metric import METRICS, Draws, calibrate
from fxcompress.metric.directions import measure_directions
from fxcompress.metric.kronecker import KroneckerMetric
from fxcompress.metric.passes import Section, Whole
from fxcompress.metric.seeds import seeded
from fxcompress.metric.whiten import Whiteners
from fxcompress.operators.modules import canonical_weight, shape_of
from tests.convolutions import CASES, build, data

EVERYTHING = KroneckerMetric(
    "all", frozenset({"input", "output", "entries"}), "", lambda m: (m.input, m.output)
)
SEED = 3


@dataclass(frozen=True)
class Site:
    name: str
    shape: Shape
    source: str = "x"
    calls: int = 1


class Net(nn.Module):
    """A convolution, an in-place activation, and a classifier of its pooled values."""

    def __init__(self, layer: Any, classes: int = 3) -> None:
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(layer.out_channels, classes).double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x).tanh_().flatten(2)
        # Positions count differently, so that their gradients do.
        scale = torch.linspace(0.5, 1.5, h.shape[2], dtype=h.dtype)
        return self.head((h * scale).mean(2))


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Embedding(9, 5).double()
        self.head = nn.Linear(5, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).cumsum(1).tanh().mean(1))


def gradients(model: nn.Module, batch: Tensor, place: int = 0) -> Iterator[Tensor]:
    """Of the weight, for every sample with its drawn label (canonical, as a matrix a group)."""
    with torch.no_grad():
        p = model(batch).float().softmax(-1)
    labels = torch.multinomial(p, 1, generator=seeded(torch.Generator(), SEED, place))[:, 0]
    for sample, label in zip(batch, labels, strict=True):
        model.zero_grad()
        F.cross_entropy(model(sample[None]), label[None]).backward()
        layer = model.get_submodule("layer")
        shape = shape_of(layer)
        gradient = shape.canonical(layer.weight.grad)
        yield gradient.flatten(2) if isinstance(shape, ConvShape) else gradient[None]
    model.zero_grad()


def network(case: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    if case == "embedding":
        return Words(), torch.randint(9, (4, 6))
    layer = build(CASES[case])
    return Net(layer), data(layer, items=4)


@pytest.mark.parametrize("case", [*CASES, "embedding"])
def test_the_diagonal_of_the_fisher(case: str) -> None:
    model, batch = network(case)
    site = Site("layer", shape_of(model.layer))
    each = torch.stack([*gradients(model, batch)])
    found = calibrate(model, [site], [batch], EVERYTHING, drawn=Draws(seed=SEED)).moments["layer"]
    expected = each.square().mean(0)
    expected = expected if isinstance(site.shape, ConvShape) else expected[0]
    # The probabilities are rounded to float32 where gradients start.
    bound = 2e-6 * float(expected.max())
    torch.testing.assert_close(found.entries, expected, rtol=0, atol=bound)
    rows = calibrate(model, [site], [batch], METRICS["diagonal"], drawn=Draws(seed=SEED)).moments[
        "layer"
    ]
    torch.testing.assert_close(rows.weight, expected.mean(-1), rtol=0, atol=bound)


@pytest.mark.parametrize("case", [*CASES, "embedding"])
def test_kfac_is_exact_for_one_sample_and_one_position(case: str) -> None:
    """``E[∇ ∇ᵀ] = (a aᵀ) ⊗ E[g gᵀ]`` where there is but one a: a kernel over the whole input."""
    torch.manual_seed(0)
    words = dict(CASES.get(case, {}))
    if case == "embedding":
        model, batch = Words(), torch.randint(9, (1, 1))
    else:
        layer = build(words)
        shape = shape_of(layer)
        assert isinstance(shape, ConvShape)
        side = [d * (k - 1) + 1 for d, k in zip(shape.dilation, shape.kernel_size, strict=True)]
        if shape.transposed or shape.padding not in ((0,) * shape.dims, "valid"):
            pytest.skip("it has several positions, whatever its input")
        model, batch = Net(layer), torch.randn(1, 6, *side, dtype=torch.float64)
    site = Site("layer", shape_of(model.layer))
    draws = 40
    batches = [batch.repeat(draws, *(1,) * (batch.dim() - 1))]
    each = torch.stack([*gradients(model, batches[0])])
    found = calibrate(model, [site], batches, EVERYTHING, drawn=Draws(seed=SEED)).moments["layer"]
    assert found.input is not None
    assert found.output is not None
    groups = each.shape[1]
    for group in range(groups):
        flat = each[:, group].flatten(1)  # rows of W one after the other
        fisher = flat.T @ flat / draws
        grouped = isinstance(site.shape, ConvShape)
        a = found.input[group] if grouped else torch.diag(found.input)
        g = found.output[group] if grouped else found.output
        expected = torch.kron(g, a)
        torch.testing.assert_close(expected, fisher, rtol=0, atol=2e-6 * float(fisher.max()))


@pytest.mark.parametrize("case", CASES)
def test_factors_are_means_over_patches(case: str) -> None:
    model, batch = network(case)
    layer = model.layer
    site = Site("layer", shape_of(layer))
    assert isinstance(site.shape, ConvShape)
    found = calibrate(model, [site], [batch, batch[:1]], METRICS["kfac"], drawn=Draws(seed=SEED))
    moments = found.moments["layer"]
    # a_t for every output position: the gradient of y_t with respect to the weight.
    patches = []
    for sample in (*batch, batch[0]):
        out = layer(sample[None])
        bare = out if layer.bias is None else out - layer.bias.reshape(-1, *(1,) * site.shape.dims)
        per_group = bare.reshape(site.shape.groups, site.shape.group_out, -1)[:, 0]
        rows = []
        for at in range(per_group.shape[1]):
            (gradient,) = torch.autograd.grad(
                per_group[:, at].sum(), layer.weight, retain_graph=True
            )
            rows.append(site.shape.canonical(gradient)[:, 0].flatten(1))
        patches.append(torch.stack(rows, 1))
    a = torch.cat(patches, 1)
    torch.testing.assert_close(moments.input, a.transpose(1, 2) @ a / a.shape[1])


@pytest.mark.parametrize(
    ("case", "view"),
    [
        ("2d", "matrix"), ("2d", "input"), ("2d", "spatial"),
        ("2d, strided, dilated, groups", "spatial"), ("transposed 2d, groups", "input"),
        ("3d", "spatial"), ("1d", "matrix"), ("embedding", "matrix"),
    ],
)  # fmt: skip
def test_directions_are_measured_along_the_dense_components(case: str, view: Any) -> None:
    """``E[⟨∇W, c_i⟩²]`` against autograd, with c_i the difference of two truncations."""
    model, batch = network(case)
    site = Site("layer", shape_of(model.layer))
    kfac = METRICS["kfac"]
    moments = calibrate(model, [site], [batch], kfac, drawn=Draws(seed=SEED)).moments["layer"]
    weight = canonical_weight(model.layer).detach()
    found = kfac.quadratic(site.shape, moments, Whiteners((1e-3, 1e-1))).truncations(weight, view)
    these = found.components()
    assert these is not None
    passes = Whole(model, [batch[:3], batch[3:]], (Section((site,)),), drawn=Draws(seed=SEED))
    measured = measure_directions(passes, {"layer": {view: these}})["layer", view]
    dense = torch.einsum("gmkq,gkqn->gkmn", these.left, these.right)
    total = dense.sum(1)
    whole = weight.flatten(2) if isinstance(site.shape, ConvShape) else weight[None]
    torch.testing.assert_close(total.double(), whole, rtol=0, atol=1e-6)  # they add up to W
    split = [*gradients(model, batch[:3]), *gradients(model, batch[3:], 1)]
    products = torch.einsum("sgmn,gkmn->sgk", torch.stack(split), dense.double())
    expected = products.square().mean(0)
    torch.testing.assert_close(measured, expected, rtol=0, atol=1e-5 * float(expected.max()))


def test_sites_of_one_input_and_other_kernels_do_not_share_a_factor() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide = nn.Conv2d(3, 4, 3, padding=1)
            self.narrow = nn.Conv2d(3, 4, 1)
            self.same = nn.Conv2d(3, 5, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.cat([self.wide(x), self.narrow(x), self.same(x)], 1)
            return h.mean((2, 3))

    model, batch = Two().double(), torch.randn(2, 3, 5, 5, dtype=torch.float64)
    sites = [Site(name, shape_of(model.get_submodule(name))) for name in ("wide", "narrow", "same")]
    found = calibrate(model, sites, [batch], METRICS["kfac"]).moments
    assert found["wide"].input is found["same"].input
    assert found["narrow"].input is not None
    assert found["narrow"].input.shape == (1, 3, 3)
