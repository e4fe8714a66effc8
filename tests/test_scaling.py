"""Work that grows with the number of sites, and no faster: counted, not timed."""

from __future__ import annotations

import cProfile
import pstats
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxcompress
from fxcompress.rules import parse_rules

RULES = parse_rules(
    "budget: {keep: 0.5, of: matched}\nmetric: {kind: euclidean}\n"
    "rules: [{id: all, match: {node: {op: 'linear'}}, rewrite: {form: low_rank}}]",
    "all.yaml",
)
COUNTED = (str(Path(fxcompress.__file__).parent), str(Path(nn.__file__).parent), fx.__path__[0])


class Wide(nn.Module):
    """Many linear layers side by side, all with the same weight, so that all get one rank."""

    def __init__(self, count: int) -> None:
        super().__init__()
        weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(count)])
        for layer in self.layers:
            assert isinstance(layer, nn.Linear)
            layer.weight.data.copy_(weight)

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for layer in self.layers:
            out = out + layer(x)
        return out


def functional(count: int) -> nn.Module:
    """The same as an fx graph of function calls on parameters, which are lifted to modules."""
    exported: nn.Module = torch.export.export(Wide(count).eval(), (torch.ones(1, 8),)).module()
    return exported


def twice(count: int) -> nn.Module:
    """A model that was compressed before."""
    rules = parse_rules(
        "budget: {keep: 0.9, of: matched}\nmetric: {kind: euclidean}\n"
        "rules: [{id: all, match: {node: {op: linear, name: 'layers.*[02468]'}}, "
        "rewrite: {form: low_rank}}]",
        "even.yaml",
    )
    return fxcompress.compile(Wide(count), rules, [torch.ones(1, 8)], progress=False)


def attention(count: int) -> nn.Module:
    """Attention modules, which are expanded, and fused encoder layers."""
    layers = [nn.TransformerEncoderLayer(8, 1, 8, batch_first=True) for _ in range(count // 6)]
    return nn.Sequential(*layers).eval()


def calls(make: Callable[[int], nn.Module], count: int) -> dict[Any, int]:
    """How often each function of the package, of torch.nn and of torch.fx is called."""
    model = make(count)
    width = torch.ones(1, 8) if make is not attention else torch.ones(1, 2, 8)
    profile = cProfile.Profile()
    profile.enable()
    small = fxcompress.compile(model, RULES, [width], progress=False)
    str(fxcompress.plan_of(small))
    profile.disable()
    stats: dict[Any, Any] = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    # The solver swaps ranks until no swap is left to make; how many depends on the numbers.
    return {
        where: each[1]
        for where, each in stats.items()
        if where[0].startswith(COUNTED) and "/fxcompress/budget/" not in where[0]
    }


@pytest.mark.parametrize(
    "make", [Wide, lambda count: fx.symbolic_trace(Wide(count)), functional, twice, attention]
)
def test_no_function_is_called_more_often_per_site_in_a_model_of_more_sites(
    make: Callable[[int], nn.Module],
) -> None:
    """Counts ``a + b n + c n²`` at n, 2n and 4n: what is left of c has to be next to nothing."""
    n = 24
    calls(make, n)  # imports and caches
    first, second, third = (calls(make, count) for count in (n, 2 * n, 4 * n))
    for where, count in third.items():
        middle = second.get(where, 0)
        excess = (count - middle) - 2 * (middle - first.get(where, 0))
        # Of c n² there would be 6 c n² left, a third and more; ranks differ a little by chance.
        assert excess < max(0.15 * count, 10 * n), (where, first.get(where, 0), middle, count)
