"""Small problems for ISVT: models of a few layers, with what the thresholding needs of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxcompress.isvt.threshold import Thresholded, metrics_of, threshold
from fxcompress.metric import METRICS, calibrate
from fxcompress.pipeline.decide import price
from fxcompress.pipeline.estimate import draws
from fxcompress.pipeline.held_back import default_damping
from fxcompress.pipeline.request import Request
from fxcompress.pipeline.survey import Survey, survey
from fxcompress.report import stages
from fxcompress.rules import LoadedRules, parse_rules


def rules(
    keep: float,
    forms: Sequence[str] = ("low_rank",),
    *,
    metric: str = "kfac",
    rule: Mapping[str, Any] | None = None,
    joint: bool = False,
    **solver: Any,
) -> LoadedRules:
    """Rules about all linear layers."""
    node = {"op": "linear"}
    document = {
        "budget": {"keep": keep},
        "metric": {"kind": metric, "output": "categorical"},
        "solver": solver,
        "rules": [
            {
                "id": "all",
                "match": {"group": node} if joint else {"node": node},
                "rewrite": {"any_of": [*forms], **(rule or {})},
            }
        ],
    }
    return parse_rules(json.dumps(document), "isvt.yaml")


@dataclass
class Problem:
    """A model that was surveyed and calibrated."""

    model: nn.Module
    found: Survey
    metrics: Any
    pricings: Any

    @classmethod
    def of(cls, model: nn.Module, loaded: LoadedRules, batches: Sequence[Any]) -> Problem:
        with stages(enabled=False) as show:
            found, every = survey(model, loaded, Request(show, batches))
            metric = METRICS[loaded.rules.metric.kind]
            moments = calibrate(
                found.model, found.sites, every.batches, metric, drawn=draws(loaded)
            ).moments
            given = found.rules.rules.metric.damping
            damping = default_damping((given.input, given.output))
            return cls(model, found, metrics_of(found, moments, damping), price(found))

    def threshold(self, starts: Mapping[str, Tensor] | None = None) -> Thresholded:
        return threshold(self.found, self.metrics, self.found.rules, self.pricings, starts or {})

    def weight(self, name: str) -> nn.Parameter:
        return self.model.get_parameter(f"{name}.weight")


class Branches(nn.Module):
    """Linear layers side by side, on slices of one input; their outputs side by side."""

    def __init__(self, *sizes: tuple[int, int]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(n, m, bias=False) for m, n in sizes)
        self.widths = [n for _, n in sizes]

    def forward(self, x: Tensor) -> Tensor:
        pieces = torch.split(x, self.widths, 1)
        return torch.cat([part(piece) for part, piece in zip(self.parts, pieces, strict=True)], 1)


def mlp(width: int = 24, classes: int = 7) -> nn.Module:
    return nn.Sequential(
        nn.Linear(16, width),
        nn.Tanh(),
        nn.Linear(width, width),
        nn.Tanh(),
        nn.Linear(width, classes),
    )


def move(model: nn.Module, amount: float) -> None:
    """A small change of every weight, as an optimizer's step would make."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += amount * parameter.std() * torch.randn_like(parameter)
