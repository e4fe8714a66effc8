"""Why a weight stays as it is: each reason is the one that holds, with the size of the weight."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import fxcompress
from fxcompress.report.quantities import loss
from tests.small import rules

N = 16


class Model(nn.Module):
    """A layer to rewrite, and one more part."""

    def __init__(self, part: Any, run: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.part, self.out = part, nn.Linear(N, 8)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.run(self.part, x))


def attention() -> nn.Module:
    """Its bias for keys keeps it whole."""
    return nn.MultiheadAttention(N, 2, batch_first=True, add_bias_kv=True)


def pruned() -> nn.Module:
    layer = nn.Linear(N, N)
    prune.random_unstructured(layer, "weight", 0.5)
    return layer


CASES: dict[str, tuple[Any, Callable[[Any, Tensor], Tensor], dict[str, tuple[int, str]]]] = {
    "in two ways": (
        lambda: nn.Linear(N, N),
        lambda part, x: F.linear(F.linear(x, part.weight), part.weight.T),
        {
            "part.weight": (
                N * N,
                "it is applied in different ways (linear 16→16, linear 16→16, transposed",
            )
        },
    ),
    "slices of one parameter": (
        lambda: nn.ParameterList([torch.randn(4 * N, N)]),
        lambda part, x: sum(F.linear(x, part[0][i * N : (i + 1) * N]) for i in range(4)),
        {"part.0": (4 * N * N, "a part of its weight part.0 is applied by a function call")},
    ),
    "computed with": (
        lambda: nn.Linear(N, N),
        lambda part, x: F.linear(x, part.weight.softmax(0)),
        {"part.weight": (N * N, "softmax in the model's forward computes with it")},
    ),
    "a table that is only added": (
        lambda: nn.Embedding(6, N),
        lambda part, x: x + part.weight,
        {"part.weight": (6 * N, "add in the model's forward computes with it")},
    ),
    "not used": (
        lambda: nn.Linear(N, N),
        lambda part, x: x,
        {"part.weight": (N * N, "the example does not use it; if other inputs do")},
    ),
    "inside of an attention": (
        attention,
        lambda part, x: part(x[None], x[None], x[None], need_weights=False)[0][0],
        {
            "part.out_proj.weight": (N * N, "multi_head_attention_forward in the forward of part"),
            "part.bias_k": (N, "multi_head_attention_forward in the forward of part"),
        },
    ),
    "inside of a recurrent layer": (
        lambda: nn.GRU(N, N),
        lambda part, x: part(x)[0],
        {"part.weight_ih_l0": (3 * N * N, "gru applies it inside, out of the reach of rules")},
    ),
    "made by a hook": (
        pruned,
        lambda part, x: part(x),
        {"part.weight_orig": (N * N, "its weight is made by a hook")},
    ),
    "scripted": (
        lambda: torch.jit.script(nn.Sequential(nn.Linear(N, N), nn.ReLU())),
        lambda part, x: part(x),
        {"part.0.weight": (N * N, "part of a TorchScript program")},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_reason_holds(name: str) -> None:
    make, run, wanted = CASES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = Model(make(), run).eval()
        plan = fxcompress.plan(model, rules(0.7), [torch.randn(6, N) for _ in range(2)])
    told = {each.weight: each for each in plan.unmatched}
    for weight, (parameters, reason) in wanted.items():
        assert reason in told[weight].reason
        assert told[weight].parameters == parameters


def test_of_several_rules_the_one_that_came_furthest_tells() -> None:
    """A rule about others would have lost it for another reason."""
    others = {
        "id": "depthwise",
        "match": {"node": {"op": "conv1d", "as": "c"}},
        "where": ["c.groups == c.in_channels"],
        "rewrite": {"form": "channel"},
    }
    first = {
        "id": "all",
        "match": {"node": {"op": "conv1d"}},
        "rewrite": {"form": "channel"},
    }

    torch.manual_seed(0)
    own = nn.Conv1d(4, 4, 3)
    own.register_buffer("scale", torch.ones(1))
    model = nn.Sequential(own, nn.Flatten(), nn.Linear(28, 16), nn.Linear(16, 8)).eval()
    for more in ([first, others], [others, first]):
        given = rules(0.7, more=more)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plan = fxcompress.plan(model, given, [torch.randn(6, 4, 9) for _ in range(2)])
        (told,) = plan.unmatched
        assert told.reason == "it holds more than a weight and a bias: scale"


@pytest.mark.parametrize(
    ("rewrite", "form", "rank", "saved", "narrow"),
    [
        ({"form": "low_rank"}, "low_rank", 7, 32, "low_rank saves at no rank"),
        ({"form": "pivoted"}, "pivoted", 15, 1, "pivoted saves at no rank"),
        (
            {"any_of": ["pivoted", "low_rank"]},
            *("pivoted", 15, 1, "pivoted and low_rank save at no rank"),
        ),
    ],
)
def test_what_stays_dense_says_what_came_closest(
    rewrite: Any, form: str, rank: int, saved: int, narrow: str
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(N, N), nn.ReLU(), nn.Linear(N, 1)).eval()
    given = rules(1.0, metric="euclidean", rewrite=rewrite)
    plan = fxcompress.plan(model, given, [torch.randn(6, N)])
    wide, last = plan.sites
    assert last.reason == f"left dense by the budget: {narrow}"
    assert last.closest is None
    _, sigma, _ = torch.linalg.svd(model[0].weight.detach().double())
    lost = 0.5 * float(sigma[rank:].square().sum())
    assert wide.closest is not None
    assert (wide.closest.form, wide.closest.rank) == (form, rank)
    assert (wide.closest.saved, wide.closest.worth) == (saved, 0.0)
    assert wide.closest.loss == pytest.approx(lost)
    parameters = "parameter" + "s" * (saved > 1)
    assert wide.reason == (
        f"left dense by the budget: {form} of rank {rank} would save {saved} {parameters}, "
        f"which the budget does not need, and lose {loss(lost)}"
    )


def test_what_stays_dense_is_not_worth_it_at_the_price() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(N, N), nn.ReLU(), nn.Linear(N, N), nn.ReLU(), nn.Linear(N, 4))
    with torch.no_grad():
        model[0].weight.mul_(10)
    plan = fxcompress.plan(
        model.eval(), rules(0.8, rewrite={"form": "low_rank"}), [torch.randn(64, N)] * 2
    )
    price = plan.budget.multiplier
    assert price is not None
    assert price > 0
    near = [site.closest for site in plan.sites if site.closest is not None]
    assert near
    for one in near:
        assert one.worth == pytest.approx(price * one.saved)
        assert one.loss > one.worth - (plan.budget.gap or 0.0)  # else it would not be dense
