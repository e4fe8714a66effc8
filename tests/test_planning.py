"""What a plan says of weights that no rule reaches, and of rewrites that save too little."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import fxcompress
from fxcompress.rules import parse_rules


class Odd(nn.Module):
    """Weights that no operator of the recorded graph applies, each for another reason."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.plain = nn.Linear(8, 8)
        self.unused = nn.Linear(8, 8)
        self.normed = weight_norm(nn.Conv1d(8, 8, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.plain(self.lstm(x)[0])
        return self.normed(h.transpose(1, 2)).transpose(1, 2)


def test_every_matrix_is_accounted_for() -> None:
    torch.manual_seed(0)
    model = Odd()
    plan = fxcompress.plan(model, "every-linear", [torch.randn(2, 5, 8)])
    told = {entry.weight: entry.reason for entry in plan.unmatched}
    assert told["lstm.weight_ih_l0"] == "lstm applies it inside, out of the reach of rules"
    assert "examples=" in told["unused.weight"]
    assert "parametrized" in told["normed.parametrizations.weight.original1"]
    matrices = {name for name, p in model.named_parameters() if p.dim() > 1}
    assert matrices == set(told) | {site.weight for site in plan.sites}


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_min_saving(share: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 24), nn.Tanh(), nn.Linear(24, 9)
    )
    text = f"""
budget: {{keep: 0.8}}
defaults: {{min_saving: {share}}}
rules:
  - {{id: all, match: {{node: {{op: linear}}}}, rewrite: {{any_of: [pivoted, low_rank]}}}}
"""
    plan = fxcompress.plan(model, parse_rules(text, "r.yaml"), [torch.randn(64, 32)])
    assert plan.rewritten
    for site in plan.rewritten:
        assert site.after.parameters <= (1 - share) * site.before.parameters
    kept = [site.after.parameters / site.before.parameters for site in plan.rewritten]
    if share == 0:
        assert max(kept) > 0.7  # what a share of 0.3 forbids


def test_min_saving_of_a_rule_wins_over_the_default() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 24))
    text = """
budget: {keep: 0.8}
defaults: {min_saving: 0.5}
rules:
  - {id: all, match: {node: {op: linear}}, rewrite: {form: pivoted, min_saving: 0}}
"""
    plan = fxcompress.plan(model, parse_rules(text, "r.yaml"), [torch.randn(64, 32)])
    assert max(s.after.parameters / s.before.parameters for s in plan.sites) > 0.5
    assert plan.budget.cost > 0.79 * plan.budget.dense
