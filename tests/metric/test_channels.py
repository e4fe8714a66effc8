"""Fewer channels of a weight, against dense references in float64 and all subsets of a few."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxcompress.forms import Target
from fxcompress.forms.target import Truncations, View
from fxcompress.metric import channels
from fxcompress.metric.channels import ChannelTruncations, gained, greedy
from fxcompress.metric.elementwise import Elementwise
from fxcompress.metric.kronecker import Kronecker
from fxcompress.metric.quadratic import Grouped, QuadraticForm
from fxcompress.metric.whiten import BlockWhitener, Whitener, whitener
from tests.convolutions import spd

F64 = torch.float64


def normal(*size: int) -> Tensor:
    return torch.randn(*size, dtype=F64)


def half(g: Tensor, w: Tensor) -> Tensor:
    return torch.linalg.cholesky(g).T @ w.flatten(1)


def features(kept: Sequence[int] | Tensor, taps: int) -> Tensor:
    return (torch.as_tensor(kept, dtype=torch.int64)[:, None] * taps + torch.arange(taps)).flatten()


def subset_loss(w: Tensor, a: Tensor, g: Tensor, kept: Sequence[int]) -> float:
    """``½ tr(G W (A - A_:S A_SS⁻¹ A_S:) Wᵀ)``, as it is written."""
    at = features(kept, len(a) // w.shape[1])
    left = a - a[:, at] @ torch.linalg.solve(a[at][:, at], a[at])
    return 0.5 * float((g @ w.flatten(1) @ left * w.flatten(1)).sum())


def spread(found: ChannelTruncations, k: int) -> Tensor:
    """The weight with k channels, with zeros in place of the others."""
    kept, weight = found.factors(k)
    assert kept.dtype == torch.int64
    assert weight.dtype == F64
    assert bool((kept.diff() > 0).all())
    return torch.zeros(found.weight.shape, dtype=F64).index_copy(found.axis, kept, weight)


def check(form: QuadraticForm, weight: Tensor, *, rel: float = 1e-9) -> ChannelTruncations:
    """What is promised of every form: losses are those of the weights, nested, not increasing."""
    found = form.channels(weight)
    n = len(found.order)
    assert found.order.dtype == torch.int64
    assert found.order.sort().values.tolist() == list(range(n))
    assert found.sigma.dtype == F64
    ks = np.arange(1, n + 1)
    losses = found.losses(ks)
    assert losses.shape == (n,)
    assert losses.dtype == np.float64
    assert losses[-1] == 0
    assert (np.diff(losses) <= 0).all()
    whole = form.loss(-weight.to(F64))
    for k in ks.tolist():
        other = spread(found, k)
        lost = form.loss(other - weight.to(F64))
        assert losses[k - 1] == pytest.approx(lost, rel=rel, abs=1e-12 * whole)
        assert found.factors(k)[0].tolist() == sorted(found.order[:k].tolist())
    assert torch.equal(spread(found, n), weight.to(F64))
    assert 0.5 * float(found.sigma.square().sum()) == pytest.approx(whole, rel=rel)
    return found


SIZES = [(3, 6, 1), (6, 3, 1), (5, 5, 1), (4, 1, 1), (1, 6, 1), (4, 5, 3), (20, 4, 4), (2, 1, 4)]


@pytest.mark.parametrize(("m", "n", "taps"), SIZES)
def test_every_channel_is_the_best_after_those_before_it(m: int, n: int, taps: int) -> None:
    """All that greedy promises: the first is the best one, and so on; not that a set is."""
    a, g, w = spd(n * taps), spd(m), normal(m, n, taps)
    form = Kronecker(whitener(a, 0.0), whitener(g, 0.0))
    found = check(form, w if taps > 1 else w[..., 0])
    order, taken = found.order.tolist(), []
    for k in range(1, n + 1):
        others = [j for j in range(n) if j not in taken]
        best = min(others, key=lambda j: subset_loss(w, a, g, [*taken, j]))
        if k < n:
            assert order[k - 1] == best
        taken.append(order[k - 1])
        loss = float(found.losses(np.array([k]))[0])
        assert loss == pytest.approx(
            subset_loss(w, a, g, taken), abs=1e-12 * subset_loss(w, a, g, [])
        )
        sets = itertools.combinations(range(n), k)
        assert loss >= min(subset_loss(w, a, g, each) for each in sets) - 1e-12


@pytest.mark.parametrize("taps", [1, 3])
def test_no_other_weight_of_these_channels_is_better(taps: int) -> None:
    w = normal(4, 6, taps)
    form = Kronecker(whitener(spd(6 * taps), 1e-3), whitener(spd(4), 1e-1))
    found = form.channels(w)
    for k in (1, 3, 5):
        kept, best = found.factors(k)

        def loss(other: Tensor, kept: Tensor = kept) -> Tensor:
            change = torch.zeros_like(w).index_copy(1, kept, other) - w
            moved = form.inputs.into(form.outputs.into(change.flatten(1)).T)
            return 0.5 * moved.square().sum()

        leaf = best.clone().requires_grad_()
        loss(leaf).backward()
        assert leaf.grad is not None
        assert float(leaf.grad.abs().max()) < 1e-10 * float(loss(torch.zeros_like(best)))
        for _ in range(5):
            assert loss(best + 1e-3 * torch.randn_like(best)) > loss(best)


@pytest.mark.parametrize("panel", [1, 2, 5])
@pytest.mark.parametrize("taps", [1, 2])
def test_the_order_does_not_depend_on_how_many_changes_are_gathered(
    panel: int, taps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, y = spd(24 * taps), normal(7, 24 * taps)
    order = greedy(y, a, taps).tolist()
    monkeypatch.setattr(channels, "PANEL", panel)
    assert greedy(y, a, taps).tolist() == order


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("m", [3, 12])
def test_channels_that_others_determine_cost_nothing(m: int, rank: int) -> None:
    """Second moments of rank 4 (or 1) of 9 channels: the rest is read from as many, exactly."""
    x = normal(500, rank) @ normal(rank, 9)
    w = normal(m, 9)
    form = Kronecker(whitener(x.T @ x / 500, 0.0), whitener(spd(m), 0.0))
    found = check(form, w, rel=1e-4)  # of eigenvalues at their floor
    losses = found.losses(np.arange(1, 10))
    assert losses[rank - 1] < 1e-6 * form.loss(w)
    if rank > 1:
        assert losses[rank - 2] > 1e-6 * form.loss(w)
    kept, refitted = found.factors(rank)
    wanted = x @ w.T
    error = (x[:, kept] @ refitted.T - wanted).norm() / wanted.norm()
    assert error < 1e-7  # rounding of a float32 model


def test_a_channel_that_is_always_zero_goes_first() -> None:
    x = normal(200, 6)
    x[:, 2] = 0
    w = normal(3, 6)
    form = Kronecker(whitener(x.T @ x, 0.0), whitener(spd(3), 0.0))
    found = check(form, w, rel=1e-6)
    assert found.order[-1] == 2
    assert found.losses(np.array([5]))[0] < 1e-6 * form.loss(w)


@pytest.mark.parametrize("taps", [1, 3])
def test_a_weight_that_reads_few_channels_keeps_these(taps: int) -> None:
    """Even where another one gains more than each of them alone."""
    torch.manual_seed(0)
    m, n, k = 6, 10, 4
    x = normal(n * taps, 60)
    x[: 2 * taps] *= 0.3
    x[-taps:] = x[: (n - 1) * taps].reshape(n - 1, taps, -1).sum(0)  # the last knows of all
    form = Kronecker(whitener(x @ x.T / 60, 1e-6), whitener(spd(m), 0.1))
    for _ in range(5):
        read = torch.randperm(n - 1)[:k].sort().values
        weight = torch.zeros(m, n, *([taps] if taps > 1 else []), dtype=F64)
        weight[:, read] = 1.0 + 0.1 * torch.randn(weight[:, read].shape, dtype=F64)
        found = form.channels(weight)
        kept, refitted = found.factors(k)
        assert torch.equal(kept, read)
        torch.testing.assert_close(refitted, weight[:, read], rtol=1e-12, atol=1e-12)
        assert (found.losses(np.arange(k, n + 1)) == 0).all()


@pytest.mark.parametrize("scale", [1.0, 1e-150, 1e150])
def test_whatever_its_size(scale: float) -> None:
    """A weight of any size, and moments in units far from 1."""
    a, g, w = spd(6), spd(3), normal(3, 6)
    plain = Kronecker(whitener(a, 0.0), whitener(g, 0.0)).channels(w)
    small = Kronecker(whitener(a, 0.0, 2.0**-300), whitener(g, 0.0, 2.0**-200)).channels(w * scale)
    assert small.order.tolist() == plain.order.tolist()
    wanted = plain.sigma * scale * 2.0**-500
    torch.testing.assert_close(small.sigma, wanted, rtol=1e-9, atol=0)
    torch.testing.assert_close(small.factors(3)[1] / scale, plain.factors(3)[1], rtol=1e-9, atol=0)
    few = Kronecker(whitener(a * 2.0**90, 0.0), whitener(g * 2.0**91, 0.0)).channels(w)
    torch.testing.assert_close(few.sigma, plain.sigma * 2.0**90.5, rtol=1e-9, atol=0)


@pytest.mark.parametrize("kind", ["identity", "diagonal"])
def test_diagonal_factors_are_special_cases(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As dense matrices they give the same; as diagonals nothing of that size is formed."""
    w, g = normal(4, 5, 2), spd(4)
    diagonal = torch.rand(10, dtype=F64) + 0.1 if kind != "identity" else torch.ones(10, dtype=F64)
    dense = Kronecker(whitener(torch.diag(diagonal), 0.0), whitener(g, 0.0))
    wanted = check(dense, w)
    monkeypatch.setattr(Whitener, "dense", None)
    inputs = whitener(None if kind == "identity" else diagonal, 0.0)
    found = check(Kronecker(inputs, whitener(g, 0.0)), w)
    assert found.order.tolist() == wanted.order.tolist()
    torch.testing.assert_close(found.sigma, wanted.sigma, rtol=1e-12, atol=0)
    assert torch.equal(found.factors(3)[1], w[:, found.factors(3)[0]])


def test_the_euclidean_metric_orders_by_the_norms_of_columns() -> None:
    w = torch.tensor([[1.0, 3.0, 2.0], [0.0, 0.0, 0.0]])
    found = check(Kronecker(Whitener(), Whitener()), w)
    assert found.order.tolist() == [1, 2, 0]
    assert found.losses(np.array([2, 3, 1])).tolist() == pytest.approx([0.5, 0.0, 2.5])


@pytest.mark.parametrize("null", ["inputs", "outputs", "weight"])
def test_without_influence_nothing_is_lost(null: str) -> None:
    none = whitener(torch.zeros(4, 4), 0.0)
    w = normal(4, 4) if null != "weight" else torch.zeros(4, 4)
    inputs = none if null == "inputs" else whitener(spd(4), 0.0)
    outputs = none if null == "outputs" else whitener(spd(4), 0.0)
    found = check(Kronecker(inputs, outputs), w)
    assert not found.losses(np.arange(1, 5)).any()


def test_several_readers_of_one_value_are_one_stacked() -> None:
    gs, a, w = [spd(2), spd(3)], spd(6), normal(5, 6)
    blocks = BlockWhitener(tuple(whitener(g, 0.0) for g in gs), (2, 3))
    found = check(Kronecker(whitener(a, 0.0), blocks), w)
    whole = Kronecker(whitener(a, 0.0), whitener(torch.block_diag(*gs), 0.0)).channels(w)
    assert found.order.tolist() == whole.order.tolist()


@pytest.mark.parametrize("dims", [1, 2])
def test_a_kernel_is_a_block_of_columns_and_one_group_a_dimension(dims: int) -> None:
    kernel = (2, 3)[-dims:]
    w = normal(4, 5, *kernel)
    part = Kronecker(whitener(spd(w[0].numel()), 1e-3), whitener(spd(4), 1e-2))
    wanted = check(part, w.flatten(2))
    found = check(Grouped((part,)), w[None])
    assert found.order.tolist() == wanted.order.tolist()
    weight = found.factors(3)[1]
    assert weight.shape == (1, 4, 3, *kernel)
    assert torch.equal(weight[0].flatten(2), wanted.factors(3)[1])


def test_several_groups_say_why_not() -> None:
    w = normal(2, 4, 3, 2)
    form = Grouped(tuple(Kronecker(whitener(spd(6), 0.0), whitener(spd(4), 0.0)) for _ in range(2)))
    found = form.channels(w)
    assert found.losses(np.array([1, 5, 6])).tolist() == [np.inf, np.inf, 0.0]
    assert found.refused == "each group of the convolution reads channels of its own"
    with pytest.raises(ValueError, match="channels of its own"):
        found.factors(5)
    assert torch.equal(found.factors(6)[1], w)


@pytest.mark.parametrize("rank", [0, 4])
def test_a_number_of_channels_that_there_is_not(rank: int) -> None:
    found = Kronecker(whitener(spd(3), 0.0), Whitener()).channels(normal(2, 3))
    with pytest.raises(ValueError, match=f"{rank} of 3 channels cannot be kept"):
        found.factors(rank)


@pytest.mark.parametrize("taps", [1, 3])
def test_entries_lose_their_own(taps: int) -> None:
    f, w = normal(4, 5 * taps).square(), normal(4, 5, taps)
    f[:, :taps] = 0
    found = check(Elementwise(f, 0.25), w if taps > 1 else w[..., 0])
    alone = 0.5 * (f * w.flatten(1).square() / 16).reshape(4, 5, taps).sum((0, 2))
    assert found.order.tolist() == alone.argsort(descending=True).tolist()
    for k in range(1, 6):  # no other set is better
        sets = itertools.combinations(range(5), 5 - k)
        least = min(float(alone[list(each)].sum()) for each in sets)
        assert found.losses(np.array([k]))[0] == pytest.approx(least, abs=1e-14)


@dataclass(frozen=True, eq=False)
class Own(QuadraticForm):
    """A form that knows losses, and nothing else."""

    matrix: Tensor

    @property
    def null(self) -> bool:
        return False

    def loss(self, change: Tensor) -> float:
        flat = change.flatten().to(F64)
        return 0.5 * float(flat @ self.matrix @ flat)

    def truncations(self, weight: Tensor, view: View) -> Truncations:
        raise AssertionError("the view of channels is not asked of this")

    def solve(self, gradient: Tensor) -> Tensor:
        raise NotImplementedError


@pytest.mark.parametrize("kernel", [(), (2,)])
def test_any_form_has_channels(kernel: tuple[int, ...]) -> None:
    w = normal(3, 5, *kernel)
    form = Own(spd(w.numel()))
    found = check(form, w)
    target = Target(w, form)
    assert target.truncations("channels").sigma.tolist() == found.sigma.tolist()
    assert target.truncations("channels") is target.truncations("channels")
    each = torch.arange(5)[:, None]
    alone = [form.loss(torch.zeros_like(w).index_copy(1, at, w[:, at])) for at in each]
    assert found.order.tolist() == sorted(range(5), key=lambda at: -alone[at])


def test_zeros_where_reading_a_channel_does_harm() -> None:
    """Two channels that cancel: one of them alone is worse than none."""
    form = Own(torch.tensor([[9.0, 9.0, 0.0], [9.0, 9.1, 0.0], [0.0, 0.0, 1.0]], dtype=F64))
    w = torch.tensor([[1.0, -1.0, 2.0]], dtype=F64)
    found = form.channels(w)
    assert found.order.tolist() == [1, 0, 2]
    losses = found.losses(np.arange(1, 4))
    assert losses[0] == pytest.approx(form.loss(w))  # nothing is read
    assert losses[1] == pytest.approx(2.0)
    kept, weight = found.factors(1)
    assert (kept.tolist(), weight.tolist()) == ([1], [[0.0]])
    assert found.losses(np.array([3]))[0] == 0


@pytest.mark.parametrize("form", ["kronecker", "diagonal", "elementwise", "own"])
def test_a_weight_that_is_not_finite_is_refused(form: str) -> None:
    forms: dict[str, QuadraticForm] = {
        "kronecker": Kronecker(whitener(spd(3), 0.0), Whitener()),
        "diagonal": Kronecker(Whitener(), Whitener()),
        "elementwise": Elementwise(torch.ones(2, 3, dtype=F64)),
        "own": Own(spd(6)),
    }
    with pytest.raises(ValueError, match="the weight is not finite"):
        forms[form].channels(torch.full((2, 3), torch.nan))


@pytest.mark.parametrize("kind", ["lower", "without its matrix", "root", "scale", "few", "none"])
def test_a_whitener_gives_back_its_factor(kind: str) -> None:
    x, eye = normal(50, 5), torch.eye(5, dtype=F64)
    full, few = x.T @ x, x[:3].T @ x[:3]
    cases = {
        "root": (full, 0.0, full),
        "scale": (full.diagonal(), 0.0, full.diagonal().diag()),
        "few": (x[:3], 1e-2, few + 1e-2 * few.diagonal().mean() * eye),
        "none": (None, 0.0, eye),
    }
    factor, damping, wanted = cases.get(
        kind, (full, 1e-2, full + 1e-2 * full.diagonal().mean() * eye)
    )
    made = whitener(factor, damping, 4.0)
    if kind == "without its matrix":
        made = made.without_matrix()
    root = made.into(eye) / made.unit
    close = {"rtol": 0, "atol": 1e-12 * float(wanted.max())}
    torch.testing.assert_close(made.dense(5), wanted, **close)
    torch.testing.assert_close(made.dense(5), root.T @ root, **close)
    assert made.diagonal == (kind in {"scale", "none"})


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(1, 6), n=st.integers(1, 7), taps=st.integers(1, 3), rows=st.integers(1, 24),
    damping=st.sampled_from([0.0, 1e-6, 1e-2]), seed=st.integers(0, 10**6),
)  # fmt: skip
def test_channels_of_anything(
    m: int, n: int, taps: int, rows: int, damping: float, seed: int
) -> None:
    """Few rows or many, features of sizes apart, channels that are zero or equal to others."""
    torch.manual_seed(seed)
    x = normal(rows, n, taps) * 10 ** normal(n, 1).clamp(-2, 2)
    if n > 2:
        x[:, 1], x[:, 2] = x[:, 0], 0
    x = x.flatten(1)
    inputs = whitener(x if rows < x.shape[1] else x.T @ x, damping)
    form = Kronecker(inputs, whitener(spd(m), 0.0))
    check(form, normal(m, n, taps), rel=1e-3)


def test_gains_add_up_whatever_the_order() -> None:
    a, g, w = spd(8), spd(3), normal(3, 4, 2)
    order = torch.tensor([2, 0, 3, 1])
    gains = 0.5 * gained(half(g, w), a, order).square()
    for k in range(5):
        wanted = subset_loss(w, a, g, order[:k].tolist())
        assert float(gains[k:].sum()) == pytest.approx(wanted, abs=1e-12 * float(gains.sum()))


@pytest.mark.parametrize("taps", [1, 2])
@pytest.mark.parametrize("m", [3, 200])
def test_more_channels_than_a_panel_has_of_which_few_matter(m: int, taps: int) -> None:
    """Of 150 channels 20 features determine all: what is left to choose from is rounding."""
    x = normal(400, 20) @ normal(20, 150 * taps)
    w = normal(m, 150, taps)
    form = Kronecker(whitener(x.T @ x / 400, 0.0), Whitener())
    found = form.channels(w)
    losses = found.losses(np.arange(1, 151))
    assert (np.diff(losses) <= 0).all()
    needed = 20 // taps
    assert losses[needed - 1] < 1e-6 * form.loss(w) < losses[needed - 2]
    change = spread(found, needed) - w
    assert losses[needed - 1] == pytest.approx(form.loss(change), rel=1e-4)
    assert (x @ change.flatten(1).T).norm() < 1e-6 * (x @ w.flatten(1).T).norm()


def test_moments_without_any_damping_give_an_order() -> None:
    """Singular, or zero: what cannot be told apart comes last, in the order in which it stands."""
    x, y = normal(50, 3) @ normal(3, 70), normal(4, 70)
    for taps in (1, 2):
        order = greedy(y, x.T @ x, taps)
        assert sorted(order.tolist()) == list(range(70 // taps))
        assert greedy(y, torch.zeros(70, 70, dtype=F64), taps).tolist() == list(range(70 // taps))
