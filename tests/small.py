"""Rules in one call, models of a few layers, and a witness that a model was left alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcompress.plans.units import COUNTED
from fxcompress.rules import LoadedRules, parse_rules

COUNTED_WORDS = tuple(unit.word for unit in COUNTED)
"""The units that every model has an amount of."""

ANY_FORM = {"any_of": ["pivoted", "low_rank"]}


def rules(
    keep: float = 0.5,
    *,
    of: str = "matched",
    unit: str = "parameters",
    metric: Any = "kfac",
    allocation: str = "global",
    rewrite: Any = ANY_FORM,
    name: str | list[str] = "*",
    more: list[dict[str, Any]] | None = None,
    **rule: Any,
) -> LoadedRules:
    """One rule about linear layers, and whatever is in ``more``; JSON is YAML, too.

    Nothing is held back unless ``metric`` says so: what tests compute is of all data, too.
    """
    first = {
        "id": "linears",
        "match": {"node": {"op": "linear", "as": "fc", "name": name}},
        "rewrite": rewrite,
        **rule,
    }
    document = {
        "budget": {"keep": keep, "of": of, "unit": unit},
        "metric": {"held_back": 0.0} | ({"kind": metric} if isinstance(metric, str) else metric),
        "solver": {"allocation": allocation},
        "rules": [first, *(more or [])],
    }
    return parse_rules(json.dumps(document, indent=1), "small.yaml")


class Net(nn.Module):
    """A classifier of rows: three layers, a residual connection, a norm, one bias missing."""

    def __init__(self, width: int = 24, classes: int = 10) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x + self.down(F.gelu(self.up(x)))))


def net(**sizes: int) -> Net:
    torch.manual_seed(0)
    model = Net(**sizes)
    # Running statistics that a second look would change.
    with torch.no_grad():
        model(torch.randn(64, model.up.in_features))
    return model.eval()


def data(batches: int = 4, size: int = 64, width: int = 24, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, width, generator=generator) for _ in range(batches)]


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """All that one could notice about a model, its tensors by value and by identity."""
    seen: dict[str, Any] = {"call": nn.Module.__call__, "grad": torch.is_grad_enabled()}
    for path, module in model.named_modules(remove_duplicate=False):
        seen[f"{path}:module"] = (id(module), type(module), module.training)
        for key, value in vars(module).items():
            if isinstance(value, dict):
                seen[f"{path}:{key}"] = {name: id(item) for name, item in value.items()}
            else:
                seen[f"{path}:{key}"] = id(value) if isinstance(value, list) else repr(value)
    for path, parameter in model.named_parameters(remove_duplicate=False):
        seen[f"{path}:learns"] = (parameter.requires_grad, parameter.grad is None)
    for path, tensor in model.state_dict().items():
        seen[f"{path}:memory"] = (tensor.data_ptr(), tensor.dtype, tensor.device)
        seen[f"{path}:bits"] = _bits(tensor)
    return seen


def _bits(tensor: Tensor) -> bytes:
    if tensor.is_meta or not tensor.numel():
        return b""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().tobytes()


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Whatever happens inside, the model is the same afterwards, to the bit."""
    before = fingerprint(model)
    try:
        yield
    finally:
        after = fingerprint(model)
        assert before.keys() == after.keys()
        assert not [key for key in before if before[key] != after[key]]
