"""Padding in what rounds descend on: neither KL nor gradients nor corrections look at it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxcompress.isvt.correction import cross_moments
from fxcompress.isvt.objective import Objective
from fxcompress.metric.visitor import input_key
from tests.metric.test_moments import target
from tests.metric.test_padding import Tagger, one_by_one, padded, squares


class Flat(Tagger):
    """Predictions of all tokens in one dimension."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return super().forward(input_ids, attention_mask).flatten(0, 1)


def models() -> tuple[nn.Module, nn.Module]:
    """Two models near each other, with NaN at padding."""
    dense, other = Flat("flattened").double().eval(), Flat("flattened").double().eval()
    with torch.no_grad():
        other.up.weight += 0.1 * torch.randn_like(other.up.weight)
        for each in (dense, other):
            each.embed.weight[1] = float("nan")
    return dense, other


@pytest.mark.parametrize("loss", [None, squares])
def test_a_padded_batch_and_its_rows_have_one_objective(loss: Any) -> None:
    dense, other = models()
    objective = Objective(None if loss else dense, loss, "auto", None)
    batch = padded(side="left", pad=1)

    def gradients(batches: list[Any]) -> tuple[float, int, list[Tensor]]:
        pairs = [objective.sum(other, each) for each in batches]
        total, count = torch.stack([value for value, _ in pairs]).sum(), sum(n for _, n in pairs)
        weights = [other.up.weight, other.down.weight, other.head.weight]
        return float(total), count, [*torch.autograd.grad(total, weights)]  # type: ignore[arg-type]

    (total, count, found), (wanted, number, expected) = map(gradients, ([batch], one_by_one(batch)))
    assert count == number == int(batch["attention_mask"].sum())
    assert total == pytest.approx(wanted, rel=1e-5)
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-8)
    assert objective.mean(other, [batch]) == pytest.approx(wanted / number, rel=1e-5)


def test_corrections_are_fitted_to_real_positions() -> None:
    dense, other = models()
    where: Any = [target(dense, name) for name in ("up", "down", "head")]
    batch = padded(side="left", pad=1)
    found, expected = (
        cross_moments(dense, other, where, batches, 1e-3, None, lambda: None)
        for batches in ([batch], one_by_one(batch))
    )
    for site in where:
        key = input_key(site)
        torch.testing.assert_close(found.crossed[key], expected.crossed[key])
        torch.testing.assert_close(found.second[key], expected.second[key])
