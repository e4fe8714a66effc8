"""Quadratic forms of a metric: what is promised of all of them."""

from __future__ import annotations

import pytest
import torch

from fxcompress.forms.target import View
from fxcompress.metric.kronecker import Kronecker
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
