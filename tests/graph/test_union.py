"""Several recordings as one graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcompress
from fxcompress.errors import CalibrationError
from fxcompress.graph.recorder import Recording, record
from tests.small import rules

N = 16


class Branches(nn.Module):
    """Which layer runs is a matter of the input's sign."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right, self.extra, self.head = (nn.Linear(N, N) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        if x[0, 0] < 0:
            return self.head(torch.relu(self.left(x)))
        return self.head(torch.tanh(self.right(x) + self.extra(x)))


def batch(sign: float, rows: int = 6, seed: int = 0) -> Tensor:
    x = torch.randn(rows, N, generator=torch.Generator().manual_seed(seed))
    x[0, 0] = sign
    return x


def both(*signs: float) -> Recording:
    return record(Branches().eval(), [batch(sign) for sign in signs])


def calls(recording: Recording) -> dict[str, int]:
    return {name.split(".")[0]: len(w.calls) for name, w in recording.weights.items()}


@pytest.mark.parametrize("signs", [(-1.0, 1.0), (1.0, -1.0), (-1.0, 1.0, -1.0, 1.0)])
def test_everything_that_any_run_uses_is_there_once(signs: tuple[float, ...]) -> None:
    recording = both(*signs)
    # A weight and its bias, each called once: head is one operator, whatever it reads.
    names = [o.name for o in recording.operators]
    assert len(names) == len(set(names))
    assert sorted(o.path for o in recording.operators if o.op == "linear") == [
        "extra", "head", "left", "right",
    ]  # fmt: skip
    assert {o.op for o in recording.operators} >= {"relu", "tanh", "add"}
    by_name = {o.name: o for o in recording.operators}
    for operator in recording.operators:
        assert all(name in by_name for name in (*operator.inputs, *operator.users))
        assert all(operator.name in by_name[name].users for name in operator.inputs)
    order = {name: place for place, name in enumerate(names)}
    first = [o for o in recording.operators if "@" not in o.name]
    assert all(order[i] < order[o.name] for o in first for i in o.inputs)


def test_the_head_is_read_from_both_sides() -> None:
    recording = both(-1.0, 1.0)
    (head,) = (o for o in recording.operators if o.path == "head")
    readers = [o.op for o in recording.operators if head.name in o.users]
    assert sorted(readers) == ["relu", "tanh"]


def test_runs_that_are_alike_change_nothing_but_sizes() -> None:
    one, two = both(-1.0), both(-1.0, -1.0)
    assert one.operators == two.operators
    assert two.macs == 2 * one.macs
    assert two.weights["left.weight"].rows == 2 * one.weights["left.weight"].rows
    assert calls(one) == calls(two)


def test_inputs_are_shared_only_if_they_are_in_every_run_that_uses_them() -> None:
    weights = both(-1.0, 1.0).weights
    assert weights["right.weight"].source == weights["extra.weight"].source
    assert weights["right.weight"].source != weights["left.weight"].source


@pytest.mark.parametrize("order", [(-1.0, 1.0), (1.0, -1.0)])
def test_all_branches_are_compressed(order: tuple[float, float]) -> None:
    data = [batch((-1.0) ** i, 64, i) for i in range(4)]
    examples = [batch(sign, 64, 9) for sign in order]
    small = fxcompress.compile(Branches().eval(), rules(0.6), data, examples=examples)
    plan = fxcompress.plan_of(small)
    assert {site.name for site in plan.sites} == {"left", "right", "extra", "head"}
    assert not plan.unmatched
    assert plan.model_after.macs < plan.model_before.macs
    for each in data:
        small(each)


def test_what_no_example_shows_is_told() -> None:
    plan = fxcompress.plan(Branches().eval(), rules(0.6), [batch(-1.0, 64)])
    told: dict[str, Any] = {each.name: each.reason for each in plan.unmatched}
    assert "pass examples=[...] of both" in told["right"]


def test_moments_are_not_shared_where_one_layer_is_left_out() -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(N, N), nn.Linear(N, N)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x) if x[0, 0] < 0 else self.a(x)

    model, data = Sometimes().eval(), [batch(-1.0, 64), batch(1.0, 64)]
    with pytest.raises(CalibrationError, match=r"b shared its input .* examples=.* of both kinds"):
        fxcompress.plan(model, rules(0.6), data)
    plan = fxcompress.plan(model, rules(0.6), data, examples=data)
    assert {site.name for site in plan.sites} == {"a", "b"}
