"""The distance of layers' outputs in the Fisher metric, against sums over rows in float64."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import Tensor, nn

import fxcompress
from fxcompress import RuleError
from fxcompress.isvt.descent import gradient
from fxcompress.isvt.features import Features
from fxcompress.isvt.objective import Objective, fitting
from fxcompress.rules import parse_rules
from tests.isvt.problems import Problem, rules


class Tagger(nn.Module):
    """One prediction a position, with a layer that is called twice and one that expands."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(12, 12)
        self.wide = nn.Linear(12, 30)
        self.narrow = nn.Linear(30, 9)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        out: Tensor = self.narrow(self.wide(self.twice(self.twice(x).tanh()).tanh()).relu())
        return out


def problem(seed: int = 0) -> tuple[Problem, nn.Module, dict[str, Tensor]]:
    """A tagger, another one near it, and a batch with padding."""
    torch.manual_seed(seed)
    dense = Tagger()
    batch = {
        "x": torch.randn(6, 5, 12),
        "attention_mask": torch.tensor([[1] * k + [0] * (5 - k) for k in (5, 3, 4, 5, 1, 2)]),
    }
    found = Problem.of(dense, rules(0.5), [batch])
    other = copy.deepcopy(found.found.model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return found, other, batch


def rows(model: nn.Module, name: str, batch: dict[str, Tensor]) -> Tensor:
    """Outputs of a layer on positions that count, all calls one after the other."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(lambda m, a, out: seen.append(out))
    with torch.no_grad():
        model(**batch)
    handle.remove()
    return torch.cat([each[batch["attention_mask"].bool()] for each in seen]).double()


def test_the_distance_is_the_sum_over_rows_in_the_metric() -> None:
    found, other, batch = problem()
    dense, sites = found.found.model, found.found.sites
    features = Features.of(3.0, sites, found.metrics)
    assert [site.name for site in features.sites] == ["twice", "narrow"]  # not the one that expands
    expected = 0.0
    for site in features.sites:
        change = rows(other, site.name, batch) - rows(dense, site.name, batch)
        root = found.metrics[site.name].outputs.lower.double()
        g = root @ root.T
        each = [0.5 * float(e @ g @ e) for e in change]
        expected += 3.0 * sum(each) / len(each) / len(features.sites)
    plain = Objective(dense, None, "categorical", None)
    with_features = Objective(dense, None, "categorical", None, features)
    with torch.no_grad():
        value, count = with_features.sum(other, batch)
        without, _ = plain.sum(other, batch)
    assert count == int(batch["attention_mask"].sum())
    assert float(value - without) / count == pytest.approx(expected, rel=1e-4)
    same = with_features.mean(dense, [batch])
    assert same == pytest.approx(0.0, abs=1e-4)


def test_it_is_the_kl_to_second_order_where_only_the_output_deviates() -> None:
    """At the last layer G is the Hessian of the KL: for one row of inputs, exactly."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(7, 5))
    x = torch.randn(1, 7).expand(64, 7).contiguous()
    document = rules(0.5).rules.model_dump(by_alias=True, exclude_unset=True)
    document["metric"] |= {"fisher": "exact", "damping": {"input": 1e-3, "output": 0.0}}
    found = Problem.of(dense, parse_rules(json.dumps(document), "exact.yaml"), [x])
    features = Features.of(1.0, found.found.sites, found.metrics)
    objective = Objective(found.found.model, None, "categorical", None)
    both = Objective(found.found.model, None, "categorical", None, features)
    shift = 0.05 * torch.randn(5)
    kl = distance = 0.0
    for sign in (1.0, -1.0):  # third orders cancel
        other = copy.deepcopy(found.found.model)
        with torch.no_grad():
            other[0].bias += sign * shift
            kl += objective.mean(other, [x])
            distance += both.mean(other, [x]) - objective.mean(other, [x])
    assert distance == pytest.approx(kl, rel=0.01)


def test_the_gradient_reaches_layers_before_and_hooks_are_gone() -> None:
    found, other, batch = problem()
    features = Features.of(1.0, found.found.sites, found.metrics)
    objective = Objective(found.found.model, None, "categorical", None, features)
    parameters = [*other.parameters()]
    for parameter in parameters:
        parameter.requires_grad_(True)
    first = gradient(objective, other, parameters, [batch], None)
    grads = [p.grad.clone() for p in parameters if p.grad is not None]
    assert len(grads) == len(parameters)
    step = 1e-3
    with torch.no_grad():
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter -= step * grad
    squares = float(sum(grad.square().sum() for grad in grads))
    fell = first - objective.mean(other, [batch])
    assert fell == pytest.approx(step * squares, rel=0.05)
    for model in (found.found.model, other):
        assert not any(module._forward_hooks for module in model.modules())


def test_what_they_keep_counts_against_the_memory() -> None:
    found, other, batch = problem()
    features = Features.of(1.0, found.found.sites, found.metrics)
    plain = Objective(found.found.model, None, "categorical", None)
    both = Objective(found.found.model, None, "categorical", None, features)
    for parameter in other.parameters():
        parameter.requires_grad_(True)
    few, many = (fitting(each, other, batch, 1e5) for each in (both, plain))
    assert few is not None
    assert many is not None
    assert few < many


def test_features_are_refused_with_a_loss_of_one_s_own() -> None:
    with pytest.raises(RuleError, match="features are compared with the dense model's"):
        rules(0.5, steps=5, objective="task", features=3.0)
    rules(0.5, steps=5, objective="task", features=0.0)


def test_rounds_use_them() -> None:
    """Two weights of the term, two different models; both within the budget."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 12), nn.Tanh(), nn.Linear(12, 8)
    )
    data = [*torch.randn(256, 12).split(32)]
    made = [
        fxcompress.compile(model, rules(0.5, steps=10, features=weight), data)
        for weight in (0.0, 10.0)
    ]
    plans = [fxcompress.plan_of(each) for each in made]
    assert all(plan.rounds[-1].accepted for plan in plans)
    assert all(plan.budget.cost <= plan.budget.limit for plan in plans)
    assert plans[0].rounds[-1].after != plans[1].rounds[-1].after
