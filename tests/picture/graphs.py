"""Plans to draw: real ones of small models, and made-up ones with odd names."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress
from fxcompress.plans.plan import NodeSummary, Plan, SitePlan
from fxcompress.rules import parse_rules
from tests.report.plans import plan, site


class Block(nn.Module):
    """A gated block with a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.gate = nn.Linear(16, 40)
        self.up = nn.Linear(16, 40)
        self.down = nn.Linear(40, 16)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Convolutions(nn.Module):
    """Two convolutions with batch norms around a skip, and one layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(16)
        self.twice = nn.Linear(16, 16)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        x = x + self.norm2(self.conv2(x))
        x = self.twice(F.relu(self.twice(x.mean((2, 3)))))
        return self.head(x)


JOINT = """
budget: {keep: 0.5}
rules:
  - id: inputs
    match: {group: {op: linear, name: "*.{gate,up}"}, scope: "*"}
    rewrite: {form: joint}
  - id: rest
    match: {node: {op: linear}}
    rewrite: {form: low_rank}
"""
NARROW = """
budget: {keep: 0.5}
rules:
  - id: hidden
    match: {node: {op: linear, name: "*.down"}}
    rewrite: {form: narrow}
"""
CONVOLUTIONS = """
budget: {keep: 0.5}
rules:
  - id: convolutions
    match: {node: {op: conv2d}}
    rewrite: {form: channel, fold_batch_norm: true}
  - id: twice
    match: {node: {op: linear, name: twice}}
    rewrite: {form: low_rank, max_rank: 4, keep: 0.6}
"""


def blocks(count: int = 3) -> nn.Module:
    """Some blocks in a row."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 16), *(Block() for _ in range(count)), nn.Linear(16, 4)
    ).eval()


@cache
def compressed(name: str) -> Plan:
    """The plan of a model that was rewritten: ``joint``, ``narrow`` or ``convolutions``."""
    torch.manual_seed(0)
    if name == "convolutions":
        model: nn.Module = Convolutions().eval()
        data = [torch.randn(4, 3, 8, 8) for _ in range(3)]
        rules = CONVOLUTIONS
    else:
        model = blocks()
        data = [torch.randn(16, 8) for _ in range(3)]
        rules = {"joint": JOINT, "narrow": NARROW}[name]
    small = fxcompress.compile(model, parse_rules(rules, "r.yaml"), data)
    return fxcompress.plan_of(small)


@cache
def only_planned() -> Plan:
    """A plan that is not carried out."""
    torch.manual_seed(0)
    data = [torch.randn(16, 8) for _ in range(3)]
    return fxcompress.plan(blocks(), parse_rules(JOINT, "r.yaml"), data)


PLANS = ("joint", "narrow", "convolutions")


def chain(names: list[str], sites: list[SitePlan]) -> Plan:
    """Linear layers in a row, each of which reads the one before; pivoted where the site is."""

    def node(name: str, op: str, path: str, *inputs: str) -> NodeSummary:
        return NodeSummary(name=name, op=op, path=path, inputs=inputs, shape=(2, 64))

    before, after = [node("x", "input", "")], [node("x", "input", "")]
    rewritten = {one.name for one in sites if one.form is not None}
    last = "x"
    for at, name in enumerate(names):
        before.append(node(f"n{at}", "linear", name, last))
        if name in rewritten:
            after.append(node(f"n{at}c", "linear", f"{name}.body.combine", last))
            after.append(node(f"n{at}", "linear", f"{name}.body.pivot", f"n{at}c"))
        else:
            after.append(before[-1])
        last = f"n{at}"
    end = node("y", "output", "", last)
    graphs = {"before": (*before, end), "after": (*after, end)}
    return plan(sites).model_copy(update=graphs)


def uniform(layers: int, ranks: list[int | None]) -> Plan:
    """``blocks.0.fc`` and so on, with these ranks; None leaves one dense."""
    names = [f"blocks.{at}.{child}" for at in range(layers) for child in ("fc", "out")]
    sites = [
        site(f"blocks.{at}.fc", 64, 64, rank, predicted=0.0 if rank is None else 0.001 * rank)
        for at, rank in enumerate(ranks)
    ]
    return chain(names, sites)
