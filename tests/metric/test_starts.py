"""Where backward passes start, against the dense Fisher at the output and by autograd."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxcompress.errors import CalibrationError
from fxcompress.graph.marks import sample_marks
from fxcompress.graph.padding import NONE, Padding
from fxcompress.metric.output import divergence, heads
from fxcompress.metric.starts import MOST_COLUMNS, Starts, backward_starts


class Masked(Padding):
    """Values (batch x positions x ...) of which a mask is known."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask

    def row_marks(self, rows: Tensor, where: str, dims: int = 1) -> Tensor:
        marks = sample_marks(self.mask)
        shape = rows.shape[: rows.dim() - dims]
        return marks.reshape(*marks.shape, *(1,) * (len(shape) - 2)).expand(shape)


def starts(output: Any, batch: Any = None, **words: Any) -> Starts:
    arguments: dict[str, Any] = {
        "kind": "auto", "fisher": "sampled", "loss": None, "mask": NONE,
        "generator": torch.Generator().manual_seed(words.pop("seed", 0)),
    }  # fmt: skip
    return backward_starts(output, batch, **{**arguments, **words})


def dense_fisher(f: Tensor, family: str) -> Tensor:
    """E[∇ ∇ᵀ] of one row (C), every label enumerated (the Gaussian by its definition)."""
    f = f.double()
    if family == "gaussian":
        return torch.eye(len(f)).double()
    total = torch.zeros(len(f), len(f)).double()
    if family == "categorical":
        p = f.softmax(0)
        for label in range(len(f)):
            g = p - F.one_hot(torch.tensor(label), len(f))
            total += p[label] * torch.outer(g, g)
        return total
    p = f.sigmoid()
    for bits in torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * len(f)).double():
        likelihood = torch.where(bits > 0, p, 1 - p).prod()
        g = p - bits
        total += likelihood * torch.outer(g, g)
    return total


@pytest.mark.parametrize("scale", [1.0, 50.0], ids=["ordinary", "certain"])
@pytest.mark.parametrize("family", ["categorical", "bernoulli", "gaussian"])
def test_exact_is_the_mean_over_labels(family: str, scale: float) -> None:
    torch.manual_seed(0)
    f = scale * torch.randn(1, 4)
    found = starts(f, kind=family, fisher="exact")
    assert len(found.passes) == 4
    columns = torch.stack([start.gradients[0][0].double() for start in found.passes])
    torch.testing.assert_close(columns.T @ columns, dense_fisher(f[0], family), rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["categorical", "bernoulli", "gaussian"])
def test_samples_have_the_exact_mean(family: str) -> None:
    torch.manual_seed(0)
    row, count = torch.randn(3), 100_000
    (start,) = starts(row.repeat(count, 1), kind=family).passes
    g = start.gradients[0].double()
    # Means of 100,000 products; those of the Gaussian have a variance of at most 2, others 1.
    bound = 5 * 2**0.5 / count**0.5
    assert float((g.T @ g / count - dense_fisher(row, family)).abs().max()) < bound
    assert float(g.mean(0).abs().max()) < bound


def test_signs_keep_predictions_of_one_sample_apart() -> None:
    """E[(Σ_t s_t g_t)(Σ_t s_t g_t)ᵀ] = Σ_t E[g_t g_tᵀ]: crosswise terms vanish in the mean."""
    torch.manual_seed(0)
    f = torch.randn(1, 3, 4)
    draws, total = 4000, torch.zeros(12, 12).double()
    for seed in range(draws):
        for start in starts(f, fisher="exact", seed=seed).passes:
            g = start.gradients[0].double().flatten()
            total += torch.outer(g, g) / draws
    expected = torch.block_diag(*(dense_fisher(row, "categorical") for row in f[0]))
    assert float((total - expected).abs().max()) < 5 * 0.5 / draws**0.5
    # Without signs the terms off the diagonal blocks would be of order 0.1.
    assert float(expected.abs().max()) > 0.1


def test_several_outputs_are_independent() -> None:
    torch.manual_seed(0)
    output = {"logits": torch.randn(5, 3), "boxes": torch.randn(5, 4), "extra": torch.randn(5)}
    kind = {"logits": "categorical", "boxes": "gaussian"}
    found = starts(output, kind=kind)
    assert found.predictions == 5
    assert found.kind == "logits categorical, boxes gaussian"
    (start,) = found.passes
    assert [tuple(g.shape) for g in start.gradients] == [(5, 3), (5, 4)]
    exact = starts(output, kind=kind, fisher="exact")
    assert len(exact.passes) == 7
    tuples = starts((output["logits"], output["boxes"]), kind={"1": "gaussian"})
    assert tuples.passes[0].tensors[0] is output["boxes"]
    with pytest.raises(CalibrationError, match=r"names 'box'.* it has: logits, boxes, extra"):
        starts(output, kind={"box": "gaussian"})


def test_question_answering_is_recognized() -> None:
    output = SimpleNamespace(start_logits=torch.randn(2, 7), end_logits=torch.randn(2, 7))
    assert [head.name for head in heads(output)] == ["start_logits", "end_logits"]
    assert starts(output).predictions == 2


@pytest.mark.parametrize("fisher", ["sampled", "exact"])
@pytest.mark.parametrize("shape", [(2, 5, 3), (2, 5, 4, 3)])
def test_padding_makes_no_prediction(shape: tuple[int, ...], fisher: str) -> None:
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
    kind = "categorical" if len(shape) == 3 else "gaussian"
    found = starts(torch.randn(shape), mask=Masked(mask), fisher=fisher, kind=kind)
    assert found.predictions == 7 * (shape[2] if len(shape) == 4 else 1)
    for start in found.passes:
        assert not start.gradients[0][~mask].any()
        assert start.gradients[0][mask].any()


def test_images_have_their_classes_first() -> None:
    f = torch.randn(2, 5, 6, 6)
    (start,) = starts(f).passes
    assert starts(f).predictions == 72
    torch.testing.assert_close(start.gradients[0].sum(1), torch.zeros(2, 6, 6), atol=1e-6, rtol=0)


# ---- labels of the data ---------------------------------------------------------------


def by_autograd(f: Tensor, loss: Any) -> Tensor:
    f = f.detach().requires_grad_()
    loss(f).backward()
    assert f.grad is not None
    return f.grad


def test_empirical_labels() -> None:
    torch.manual_seed(0)
    f, y = torch.randn(6, 4), torch.tensor([0, 1, -100, 3, 2, 1])
    found = starts(f, {"labels": y}, fisher="empirical")
    assert found.predictions == 5
    expected = by_autograd(f, lambda f: F.cross_entropy(f, y, reduction="sum"))
    torch.testing.assert_close(found.passes[0].gradients[0], expected)
    bits = torch.randint(2, (6, 4)).float()
    found = starts(f, {"labels": bits}, fisher="empirical", kind="bernoulli")
    expected = by_autograd(
        f, lambda f: F.binary_cross_entropy_with_logits(f, bits, reduction="sum")
    )
    torch.testing.assert_close(found.passes[0].gradients[0], expected)
    values = torch.randn(6, 4)
    found = starts(f, {"labels": values}, fisher="empirical", kind="gaussian")
    torch.testing.assert_close(found.passes[0].gradients[0], f - values)


def test_labels_of_causal_language_models_are_shifted() -> None:
    torch.manual_seed(0)
    ids, f = torch.randint(9, (2, 5)), torch.randn(2, 5, 9)
    labels = ids.clone()
    labels[0, :2] = -100
    found = starts(f, {"input_ids": ids, "labels": labels}, fisher="empirical")
    expected = by_autograd(
        f,
        lambda f: F.cross_entropy(
            f[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
        ),
    )
    torch.testing.assert_close(found.passes[0].gradients[0], expected)
    assert found.predictions == int((labels[:, 1:] != -100).sum())
    # Labels of their own, one a token, are not shifted.
    tags = (ids + 1) % 9
    found = starts(f, {"input_ids": ids, "labels": tags}, fisher="empirical")
    expected = by_autograd(
        f, lambda f: F.cross_entropy(f.flatten(0, 1), tags.flatten(), reduction="sum")
    )
    torch.testing.assert_close(found.passes[0].gradients[0], expected)


def test_a_loss_of_ones_own_leaves_padding_out() -> None:
    f = torch.randn(2, 3, requires_grad=True)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    found = starts(f, None, loss=lambda output, batch: output.square(), mask=Masked(mask))
    assert found.predictions == 3
    assert torch.equal(found.passes[0].gradients[0], mask.float())


@pytest.mark.parametrize(
    ("output", "words", "message"),
    [
        (torch.randn(2, 200), {"fisher": "exact"}, "200 classes .* choose fisher: sampled"),
        (torch.randn(2, 3), {"fisher": "empirical"}, "batch\\['labels'\\], and there are none"),
        (torch.full((2, 3), torch.nan), {}, "NaN or infinite"),
        (torch.randn(5), {}, "no dimension of samples"),
        (torch.randn(5, 1), {}, "one class only"),
        (torch.tensor(1.0), {}, "a single number"),
        (torch.zeros(2, 3, dtype=torch.long), {}, "no predictions found"),
    ],
)
def test_what_makes_no_sense_is_an_error(output: Any, words: dict[str, Any], message: str) -> None:
    assert MOST_COLUMNS < 200
    with pytest.raises(CalibrationError, match=message):
        starts(output, **words)


def test_labels_that_do_not_fit() -> None:
    with pytest.raises(CalibrationError, match=r"shape \(2, 4\), which does not fit"):
        starts(torch.randn(2, 3), {"labels": torch.zeros(2, 4).long()}, fisher="empirical")


def test_a_type_of_sixteen_bits() -> None:
    for fisher in ("sampled", "exact"):
        for start in starts(torch.randn(4, 3).bfloat16(), fisher=fisher).passes:
            assert start.gradients[0].dtype == torch.bfloat16
            assert bool(start.gradients[0].isfinite().all())


# ---- divergence -----------------------------------------------------------------------


def dense_divergence(p: Tensor, q: Tensor, family: str) -> float:
    """From the definition, label by label, in float64."""
    p, q = p.double(), q.double()
    if family == "gaussian":
        one, other = (
            torch.distributions.MultivariateNormal(mean, torch.eye(len(mean)).double())
            for mean in (p, q)
        )
        return float(torch.distributions.kl_divergence(one, other))
    if family == "categorical":
        a, b = p.softmax(0), q.softmax(0)
        return float((a * (a / b).log()).sum())
    a, b = p.sigmoid(), q.sigmoid()
    return float((a * (a / b).log() + (1 - a) * ((1 - a) / (1 - b)).log()).sum())


@pytest.mark.parametrize("family", ["categorical", "bernoulli", "gaussian"])
def test_divergence(family: str) -> None:
    torch.manual_seed(0)
    p, q = torch.randn(3, 4), torch.randn(3, 4)
    total, predictions = divergence(p, q, family)
    assert predictions == 3
    expected = sum(dense_divergence(a, b, family) for a, b in zip(p, q, strict=True))
    assert total == pytest.approx(expected, rel=1e-9)
    assert divergence(p, p, family) == (0.0, 3)


def test_divergence_is_twice_differentiable_to_the_fisher() -> None:
    """KL(f ‖ f + δ) ≈ ½ δᵀ F δ: the two halves of the metric are about the same thing."""
    torch.manual_seed(0)
    for family in ("categorical", "bernoulli", "gaussian"):
        f, change = torch.randn(1, 4).double(), 1e-4 * torch.randn(1, 4).double()
        kl, _ = divergence(f, f + change, family)
        quadratic = 0.5 * float(change[0] @ dense_fisher(f[0], family) @ change[0])
        assert kl == pytest.approx(quadratic, rel=1e-3)


def test_divergence_of_certain_predictions_is_finite() -> None:
    p, q = torch.tensor([[1000.0, 0.0]]), torch.tensor([[0.0, 1000.0]])
    assert divergence(p, q, "categorical")[0] == pytest.approx(1000.0)
    assert divergence(p, q, "bernoulli")[0] == pytest.approx(500.0)
    assert divergence(p, p, "bernoulli")[0] == 0


def test_divergence_leaves_padding_out_and_adds_outputs_up() -> None:
    torch.manual_seed(0)
    p, q = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]]).bool()
    total, predictions = divergence(p, q, mask=Masked(mask))
    assert predictions == 3
    assert total == pytest.approx(divergence(p[mask], q[mask])[0])
    both, count = divergence((p, p), (q, q), {"0": "categorical", "1": "gaussian"})
    assert count == 8
    apart = divergence(p, q, "categorical")[0] + divergence(p, q, "gaussian")[0]
    assert both == pytest.approx(apart)
    with pytest.raises(CalibrationError, match="shapes"):
        divergence(p, q[:, :2])
