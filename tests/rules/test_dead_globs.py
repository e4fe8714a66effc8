"""What a rule names and nothing is called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcompress
from fxcompress.rules import read_rules
from tests.small import rules


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.head = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def told(given: Any) -> list[str]:
    found = fxcompress.plan(Stack().eval(), given, [torch.randn(32, 16) for _ in range(2)])
    return [text for text in found.warnings if "no-match" in text]


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (
            {"unless": [{"name": "haed"}]},
            "\"haed\", so this protects nothing; did you mean 'head'?",
        ),
        ({"unless": [{"name": ["head", "laters.0"]}]}, '"laters.0", so this protects nothing'),
        ({"unless": [{"scope": "lays"}]}, '"lays", so this protects nothing; did you mean'),
        ({"unless": [{"in_features": 99}]}, "fits no operator (in_features 99)"),
        ({"unless": [{"name": "head", "in_features": 99}]}, "fits no operator (in_features 99)"),
        ({"name": ["layers.*", "haed"]}, "\"haed\", so this matches nothing; did you mean 'head'?"),
    ],
)
def test_it_is_told_where_it_stands(rule: dict[str, Any], text: str) -> None:
    (warning,) = told(rules(0.6, **rule))
    assert text in warning
    assert warning.startswith("small.yaml:")
    assert "rule 'linears'" in warning


@pytest.mark.parametrize(
    "rule",
    [
        {"unless": [{"name": "head"}]},
        {"unless": [{"name": ["head", "layers.0"]}, {"in_features": 16, "out_features": 8}]},
        {"unless": [{"scope": "layers"}]},
        {"name": ["layers.*", "he{ad,el}"]},
        {"name": ["layers.*", "haed"], "expect": {"matches": {"min": 0}}},
    ],
)
def test_nothing_is_told_of_what_hits(rule: dict[str, Any]) -> None:
    assert not told(rules(0.6, **rule))


def test_presets_name_what_only_some_models_have() -> None:
    assert not told(read_rules("every-linear"))
    assert not told(read_rules("encoder")) or "matches nothing" in told(read_rules("encoder"))[0]
