"""Experts as operators: their moments against a dense reference, those without data, narrowing."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress
from fxcompress.errors import FxcompressWarning
from fxcompress.graph.eligible import obstacle
from fxcompress.metric import METRICS, calibrate
from fxcompress.operators.linear import LinearShape
from fxcompress.operators.stacked import Stack
from fxcompress.pipeline.sites import Site, gather_sites
from fxcompress.rewrite import prepared, record_operators
from fxcompress.rules import LoadedRules, match_rules, parse_rules
from tests.moe import Mixture


def rules(
    form: str = "low_rank", name: str = "*", keep: float = 0.5, more: str = ""
) -> LoadedRules:
    return parse_rules(
        f"""
version: 1
budget: {{keep: {keep}, of: matched, unit: parameters}}
metric: {{kind: kfac, held_back: 0.0}}
rules:
  - id: experts
    match: {{node: {{op: linear, name: "{name}"}}}}
    rewrite: {{form: {form}{more}}}
""",
        "experts.yaml",
    )


def rows(count: int = 60, seed: int = 0, width: int = Mixture.N) -> Tensor:
    numbers = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=numbers, dtype=torch.float64)


def loss(output: Tensor, batch: Tensor) -> Tensor:
    """Of class 1, one a row."""
    return -output.log_softmax(-1)[:, 1]


def sites_of(model: nn.Module, example: Tensor) -> tuple[nn.Module, dict[str, Site]]:
    work = prepared(model)
    recording = record_operators(work, [example])
    matched = match_rules(rules(), recording.operators, obstacle(work, recording))
    return work, {site.name: site for site in gather_sites(work, recording, matched)[0]}


def test_moments_of_an_expert_are_those_of_the_rows_that_reach_it() -> None:
    model, batches = Mixture(), [rows(40), rows(30, seed=1)]
    work, sites = sites_of(model, batches[0])
    assert {name for name in sites if name[0] in "ud"} == {
        f"{stack}.{expert}" for stack in ("up", "down") for expert in range(3)
    }
    found = calibrate(work, [*sites.values()], batches, METRICS["kfac"], loss=loss)
    for expert in range(3):
        inputs, gradients = [], []
        for batch in batches:
            model.probes = torch.zeros(len(batch), 3, Mixture.HIDDEN, dtype=torch.float64)
            model.probes.requires_grad_()
            # One backward pass for each row: of its own prediction, the routing weight included.
            for row, each in enumerate(loss(model(batch), batch)):
                (gradient,) = torch.autograd.grad(each, model.probes, retain_graph=True)
                if expert in model.routes(batch)[1][row]:
                    inputs.append(batch[row])
                    gradients.append(gradient[row, expert])
                else:
                    assert not gradient[row, expert].any()
        model.probes = None
        a, g = torch.stack(inputs), torch.stack(gradients)
        moments = found.moments[f"up.{expert}"]
        torch.testing.assert_close(moments.input, a.T @ a / len(a))
        torch.testing.assert_close(
            moments.output, g.T @ g / 70
        )  # per prediction, not per row of it
        assert found.reach[f"up.{expert}"].rows == len(a) < 70


@pytest.mark.filterwarnings("ignore::fxcompress.FxcompressWarning")
@pytest.mark.parametrize("form", ["low_rank", "pivoted"])
def test_ranks_of_experts_stand_under_one_budget(form: str) -> None:
    model = Mixture().eval()
    small = fxcompress.compile(model, rules(form, "{up,down}.*", 0.7), [rows()], progress=False)
    plan = fxcompress.plan_of(small)
    assert len(plan.sites) == 6
    dense = model.up.numel() + model.down.numel()
    taken = sum(p.numel() for name, p in small.named_parameters() if name[:2] in ("up", "do"))
    assert taken == plan.budget.cost <= 0.7 * dense
    # What runs is what the matrices say, one by one.
    reference = Mixture().eval()
    with torch.no_grad():
        for name in ("up", "down"):
            stack: Any = getattr(small, name)
            getattr(reference, name).copy_(torch.stack([each.dense() for each in stack]))
        torch.testing.assert_close(
            small(rows(seed=2)), reference(rows(seed=2)), rtol=1e-9, atol=1e-9
        )


class Unused(Mixture):
    """Nothing goes to expert 2, or what starts with a positive number only."""

    def __init__(self, never: bool) -> None:
        super().__init__()
        self.never = never

    def routes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, _chosen = super().routes(x)
        rare = torch.zeros(len(x), dtype=torch.bool) if self.never else x[:, 0] > 2
        both = torch.tensor([0, 1]).expand(len(x), 2)
        return weights, torch.where(rare[:, None], torch.tensor([2, 0]).expand(len(x), 2), both)


def test_an_expert_that_no_data_reach_stays_and_is_told() -> None:
    model = Unused(never=True).eval()
    planned = fxcompress.plan(model, rules(name="{up,down}.*", keep=0.7), [rows()], progress=False)
    assert {site.name for site in planned.sites} == {"up.0", "up.1", "down.0", "down.1"}
    left = {each.weight: each.reason for each in planned.unmatched}
    assert "the example does not use it" in left["up.2"]
    example = rows()
    example[:, 0] = 3
    model.never = False
    with pytest.warns(
        FxcompressWarning, match=r"up\.2, down\.2: left dense.*no calibration data reached it"
    ):
        small = fxcompress.compile(
            model, rules(name="{up,down}.*", keep=0.75), [rows().clamp(max=1)],
            examples=[example, rows().clamp(max=1)], progress=False,
        )  # fmt: skip
    told = {site.name: (site.form, site.reason) for site in fxcompress.plan_of(small).sites}
    assert told["up.2"] == (None, "no influence was measured: no calibration data reached it")
    assert told["down.2"] == told["up.2"]
    assert [form for form, _ in told.values()].count("low_rank") >= 2
    assert torch.equal(small.get_parameter("up.2.product.weight"), model.up[2])


class Wide(Unused):
    N, HIDDEN = 48, 40


def test_an_expert_that_hardly_any_data_reach_stays_and_is_told() -> None:
    data = rows(200, width=48).clamp(max=1)
    data[:2, 0] = 3  # two rows, of a width of 48 and of 40
    planned = fxcompress.plan(
        Wide(never=False).eval(), rules(name="{up,down}.*", keep=0.75), [data], progress=False
    )
    told = {site.name: site.reason for site in planned.sites if site.form is None}
    assert told["up.2"] == "no influence was measured: hardly any calibration data reached it"
    assert told["down.2"] == told["up.2"]
    assert any("up.2, down.2: left dense" in note for note in planned.warnings)


def test_batches_are_recorded_until_all_experts_ran() -> None:
    first, second = rows().clamp(max=1), rows()
    second[:, 0] = 3
    planned = fxcompress.plan(
        Unused(never=False).eval(), rules(name="{up,down}.*"), [first, second], progress=False
    )
    assert {site.name for site in planned.sites} == {
        f"{stack}.{expert}" for stack in ("up", "down") for expert in range(3)
    }


@pytest.mark.filterwarnings("ignore::fxcompress.FxcompressWarning")
def test_the_hidden_value_of_each_expert_gets_a_width_of_its_own() -> None:
    model = Mixture().eval()
    small: Any = fxcompress.compile(
        model, rules("narrow", "down.*", 0.7), [rows(200)], progress=False
    )
    widths = [matrix.shape[0] for matrix in small.down]
    assert sum(widths) < 15
    assert [matrix.shape[0] for matrix in small.up] == widths
    x = rows(seed=3)
    with torch.no_grad():
        weights, chosen = model.routes(x)
        out = x.clone()
        for row in range(len(x)):
            for place in range(2):
                expert = int(chosen[row, place])
                up, down = small.up[expert].dense(), small.down[expert].dense()
                out[row] += weights[row, place] * (F.silu(up @ x[row]) @ down)
        torch.testing.assert_close(small(x), model.head(out))
    # The rows that are left are rows of the dense matrix.
    for expert, width in enumerate(widths):
        own = small.up[expert].dense()
        same = (own[:, None] == model.up[expert][None]).all(-1)
        assert int(same.any(1).sum()) == width
    if len({*widths}) > 1:
        with pytest.raises(ValueError, match="several sizes"):
            small.up.dense()


class Batched(nn.Module):
    """Every expert gets every row."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Parameter(torch.randn(3, 6, 5))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x.expand(3, *x.shape), self.up).sum(0)


def test_a_batched_product_runs_all_experts() -> None:
    model = Batched().eval()
    small = fxcompress.compile(model, rules(name="up.*", keep=0.8), [rows()], progress=False)
    assert isinstance(small.up, Stack)
    values = torch.stack([each.dense() for each in small.up])
    torch.testing.assert_close(
        small(rows(seed=1)), torch.einsum("rn,enm->rm", rows(seed=1), values)
    )


def test_a_stack_answers_as_its_tensor_does() -> None:
    parameter = nn.Parameter(torch.randn(4, 3, 5, dtype=torch.float64))
    stack = Stack(parameter, LinearShape(5, 3, False, torch.float64))
    x = torch.randn(2, 5, dtype=torch.float64)
    assert len(stack) == 4
    assert stack.shape == (4, 3, 5)
    assert stack.ndim == 3
    assert stack.dtype == torch.float64
    for index in (1, -1, torch.tensor(2)):
        assert torch.equal(F.linear(x, stack[index]), F.linear(x, parameter[index]))
        assert torch.equal(x @ stack[index].T, F.linear(x, parameter[index]))
    for index in (slice(1, 3), torch.tensor([2, 0, 2]), None, (0, 1)):
        assert torch.equal(stack[index], parameter[index])
    assert torch.equal(stack.mT, parameter.mT)
    assert torch.equal(stack.T, parameter.permute(2, 1, 0))
    assert torch.equal(stack * 2, parameter * 2)
    assert torch.equal(stack.transpose(1, 2), parameter.transpose(1, 2))
    for again in (copy.deepcopy(stack), pickle.loads(pickle.dumps(stack))):
        assert torch.equal(again.dense(), parameter)
    with pytest.raises(IndexError):
        stack[4]


class Whole(Mixture):
    """The stack is read as a whole, too."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.up.sum()


def test_a_stack_that_is_read_otherwise_stays() -> None:
    planned = fxcompress.plan(Whole().eval(), rules(keep=0.9), [rows()], progress=False)
    assert not [site.name for site in planned.sites if site.name.startswith("up")]
    (left,) = [each for each in planned.unmatched if each.weight == "up"]
    assert left.reason
