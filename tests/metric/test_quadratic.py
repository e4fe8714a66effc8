"""Quadratic forms of a metric: what is promised of all of them."""

from __future__ import annotations

import pytest
import torch

from fxcompress.forms import Target
from fxcompress.forms.target import View
from fxcompress.metric.kronecker import Kronecker
from fxcompress.metric.quadratic import Grouped
from fxcompress.metric.whiten import whitener
from tests.convolutions import spd


@pytest.mark.parametrize("view", ["matrix", "input", "spatial", "tucker2"])
def test_a_form_remembers_nothing_of_the_weight_before(view: View) -> None:
    torch.manual_seed(0)
    first, second = torch.randn(2, 4, 3, 2, 2, dtype=torch.float64)

    def metric() -> Kronecker:
        torch.manual_seed(1)
        return Kronecker(whitener(spd(12), 1e-3), whitener(spd(4), 1e-1))

    rank = (2, 2) if view == "tucker2" else 2
    asked = metric()
    asked.truncations(first, view).factors(rank)
    found = asked.truncations(second, view).factors(rank)
    for factor, alone in zip(found, metric().truncations(second, view).factors(rank), strict=True):
        torch.testing.assert_close(factor, alone, rtol=0, atol=0)


@pytest.mark.parametrize("views", [("input", "tucker2"), ("tucker2", "input")])
@pytest.mark.parametrize("groups", [0, 2])
def test_two_views_of_one_weight_share_what_is_computed_once(
    views: tuple[View, View], groups: int
) -> None:
    torch.manual_seed(0)
    parts = [Kronecker(whitener(spd(12), 0.0), whitener(spd(4), 0.0)) for _ in range(2)]
    weight = torch.randn(2, 4, 3, 2, 2, dtype=torch.float64)
    if groups:
        target = Target(weight, Grouped(tuple(parts)))
    else:
        target = Target(weight[0], parts[0])
    target.truncations(views[0])
    without = target.without_metric()  # so that nothing can be computed anew
    assert torch.equal(without.truncations(views[1]).sigma, target.truncations(views[0]).sigma)
    with pytest.raises(RuntimeError, match="given up"):
        without.truncations("spatial")
