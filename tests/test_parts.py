"""What reports say of a body is what it consists of."""

from __future__ import annotations

import pytest
from torch import nn

from fxcompress.forms import Body, LinearShape, find_form, fit
from fxcompress.plans.layers import layers
from fxcompress.plans.plan import Part
from tests.report.plans import parts


@pytest.mark.parametrize("form", ["low_rank", "pivoted"])
@pytest.mark.parametrize("rank", [1, 5, 20])
def test_plans_made_by_hand_have_the_parts_of_the_forms(form: str, rank: int) -> None:
    shape = LinearShape(in_features=24, out_features=40, bias=True)
    assert layers(fit(find_form(form), [shape]).empty(rank)) == [parts(form, 24, 40, rank)]


def test_parts_of_a_joint_form() -> None:
    shapes = [LinearShape(24, 40, True), LinearShape(24, 8, False)]
    first, second = layers(fit(find_form("joint"), shapes).empty(5))
    assert first == (
        Part(path="shared.down", op="linear", in_features=24, out_features=5),
        Part(path="up", op="linear", in_features=5, out_features=40),
    )
    assert second == (Part(path="up", op="linear", in_features=5, out_features=8),)


def test_layers_of_other_kinds() -> None:
    from torch import fx

    body = fx.symbolic_trace(nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Flatten()))
    (found,) = layers(Body(None, (body,)))
    assert [(part.path, part.op) for part in found] == [
        ("0", "linear"),
        ("1", "ReLU"),
        ("2", "Flatten"),
    ]
