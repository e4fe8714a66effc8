"""The algorithms of other compressors, written out to be run beside fxcompress at equal cost.

All are one-shot, on convolutions (2d, one group) and linear layers of a module tree; costs are
multiply-accumulates (MACs) of one input.  Batch norms stay as they are.

==================  =====================================================================
``plain_svd``       every layer truncated in the Euclidean metric, equal share of its MACs
``spatial_greedy``  AIMET: spatial SVD (k x 1, 1 x k), each layer scored at ten ratios by the
                    accuracy with that layer alone compressed, then the largest score that all
                    layers can be held to within the budget
``balf``            BALF (arXiv 2509.25136): inputs whitened, share of the energy of every layer
                    maximized together under one multiplier; a layer may stay dense
``tucker_vbmf``     Tucker-2 with ranks by variational Bayesian matrix factorization (Kim et al.,
                    arXiv 1511.06530; Nakajima et al. 2013), scaled to the budget
==================  =====================================================================
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Replaceable = nn.Conv2d | nn.Linear


@dataclass(frozen=True)
class Layer:
    """A layer that can be compressed, with the size of what it returns for one input."""

    name: str
    module: Any
    positions: int

    @property
    def macs(self) -> int:
        """Multiply-accumulates as it is."""
        return self.module.weight.numel() * self.positions


def layers_of(model: nn.Module, example: Tensor) -> list[Layer]:
    """Convolutions and linear layers, in the order in which they run on one input."""
    found: list[Layer] = []
    names = {module: name for name, module in model.named_modules()}

    def note(module: Any, args: Any, out: Tensor) -> None:
        positions = out[0, 0].numel() if isinstance(module, nn.Conv2d) else 1
        found.append(Layer(names[module], module, positions))

    kinds = [m for m in names if isinstance(m, Replaceable) and getattr(m, "groups", 1) == 1]
    handles = [module.register_forward_hook(note) for module in kinds]
    with torch.no_grad():
        model(example[:1])
    for handle in handles:
        handle.remove()
    return found


def replaced(model: nn.Module, new: Mapping[str, nn.Module]) -> nn.Module:
    """A copy of a model with other modules in some places."""
    out = copy.deepcopy(model)
    for name, module in new.items():
        owner, _, key = name.rpartition(".")
        setattr(out.get_submodule(owner), key, module)
    return out


def _conv(weight: Tensor, bias: Tensor | None, **words: Any) -> nn.Conv2d:
    m, n, *kernel = weight.shape
    layer = nn.Conv2d(n, m, tuple(kernel), bias=bias is not None, **words)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


# ---- channel truncation: plain SVD and BALF ---------------------------------------------


def channel_cost(layer: Layer, rank: int) -> int:
    """MACs of n·k → r → m."""
    weight = layer.module.weight
    return rank * (len(weight) + weight[0].numel()) * layer.positions


def channel_body(layer: Layer, left: Tensor, right: Tensor) -> nn.Module:
    """Two layers for the product of (m x r) and (r x n·k)."""
    old, rank = layer.module, len(right)
    if isinstance(old, nn.Linear):
        down, up = nn.Linear(old.in_features, rank, bias=False), nn.Linear(rank, old.out_features)
        with torch.no_grad():
            down.weight.copy_(right)
            up.weight.copy_(left)
            up.bias.copy_(torch.zeros_like(up.bias) if old.bias is None else old.bias)
        return nn.Sequential(down, up)
    words = {"stride": old.stride, "padding": old.padding, "dilation": old.dilation}
    down = _conv(right.reshape(rank, *old.weight.shape[1:]), None, **words)
    return nn.Sequential(down, _conv(left[:, :, None, None], old.bias))


def truncated(weight: Tensor, root: Tensor | None, rank: int) -> tuple[Tensor, Tensor]:
    """Best factors of a rank for ``‖(W - LR) root‖``."""
    w = weight.detach().double().flatten(1)
    u, s, v = torch.linalg.svd(w if root is None else w @ root, full_matrices=False)
    right = v[:rank] if root is None else torch.linalg.solve(root.T, v[:rank].T).T
    return u[:, :rank] * s[:rank], right


def plain_svd(model: nn.Module, keep: float, example: Tensor) -> nn.Module:
    """Euclidean truncation, the same share of MACs in every layer."""
    layers = layers_of(model, example)
    budget = keep * sum(layer.macs for layer in layers)

    def ranks(share: float) -> list[int | None]:
        out: list[int | None] = []
        for layer in layers:
            full = min(len(layer.module.weight), layer.module.weight[0].numel())
            rank = min(full, int(share * layer.macs / channel_cost(layer, 1)))
            out.append(None if share >= 1 else max(1, rank))
        return out

    chosen = _largest(ranks, lambda r: _channel_total(layers, r) <= budget)
    new = {
        layer.name: channel_body(layer, *truncated(layer.module.weight, None, rank))
        for layer, rank in zip(layers, chosen, strict=True)
        if rank is not None
    }
    return replaced(model, new)


def _channel_total(layers: Sequence[Layer], ranks: Sequence[int | None]) -> int:
    pairs = zip(layers, ranks, strict=True)
    return sum(layer.macs if rank is None else channel_cost(layer, rank) for layer, rank in pairs)


def _largest(make: Callable[[float], Any], fits: Callable[[Any], bool]) -> Any:
    """What the largest number in [0, 1] makes that fits."""
    low, high = 0.0, 1.0
    if fits(make(high)):
        return make(high)
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(make(middle)) else (low, middle)
    return make(low)


def balf(model: nn.Module, keep: float, example: Tensor, batches: Sequence[Tensor]) -> nn.Module:
    """Whitened inputs, and the kept share of every layer's energy maximized under one budget."""
    layers = layers_of(model, example)
    roots = _input_roots(model, layers, batches)
    energies = []
    for layer, root in zip(layers, roots, strict=True):
        s = torch.linalg.svdvals(layer.module.weight.detach().double().flatten(1) @ root).square()
        energies.append(s.cumsum(0) / s.sum())
    budget = keep * sum(layer.macs for layer in layers)

    def ranks(multiplier: float) -> list[int | None]:
        out: list[int | None] = []
        for layer, energy in zip(layers, energies, strict=True):
            costs = channel_cost(layer, 1) * torch.arange(1, len(energy) + 1).double()
            value = energy - multiplier * costs
            best = int(value.argmax())
            dense = 1.0 - multiplier * layer.macs
            out.append(None if dense >= float(value[best]) else best + 1)
        return out

    low, high = 0.0, 1.0
    while _channel_total(layers, ranks(high)) > budget:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (
            (low, middle) if _channel_total(layers, ranks(middle)) <= budget else (middle, high)
        )
    new = {
        layer.name: channel_body(layer, *truncated(layer.module.weight, root, rank))
        for layer, root, rank in zip(layers, roots, ranks(high), strict=True)
        if rank is not None
    }
    return replaced(model, new)


@torch.no_grad()
def _input_roots(
    model: nn.Module, layers: Sequence[Layer], batches: Sequence[Tensor]
) -> list[Tensor]:
    """A root of the second moments of every layer's inputs (patches)."""
    widths = {layer.name: layer.module.weight[0].numel() for layer in layers}
    sums = {name: torch.zeros(n, n, dtype=torch.float64) for name, n in widths.items()}

    def note(name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, out: Tensor) -> None:
            x = args[0]
            if isinstance(module, nn.Conv2d):
                x = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
                x = x.transpose(1, 2).flatten(0, 1)
            sums[name] += (x.T @ x).double()

        return hook

    handles = [layer.module.register_forward_hook(note(layer.name)) for layer in layers]
    for batch in batches:
        model(batch)
    for handle in handles:
        handle.remove()
    roots = []
    for total in sums.values():
        values, vectors = torch.linalg.eigh(total)
        roots.append((vectors * values.clamp_min(1e-6 * float(values.mean())).sqrt()) @ vectors.T)
    return roots


# ---- AIMET: spatial SVD with greedy ratios ----------------------------------------------

RATIOS = tuple(at / 10 for at in range(1, 11))


def spatial_body(old: nn.Conv2d, rank: int) -> nn.Module:
    """k x 1 to r channels, then 1 x k, truncated in the Euclidean metric."""
    m, n, h, w = old.weight.shape
    matrix = old.weight.detach().double().permute(1, 2, 0, 3).reshape(n * h, m * w)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    root = s[:rank].sqrt()
    down = (u[:, :rank] * root).T.reshape(rank, n, h, 1)
    up = (root[:, None] * v[:rank]).reshape(rank, m, 1, w).transpose(0, 1)
    (sh, sw), (ph, pw) = old.stride, old.padding
    first = _conv(down, None, stride=(sh, 1), padding=(ph, 0))
    return nn.Sequential(first, _conv(up, old.bias, stride=(1, sw), padding=(0, pw)))


def spatial_cost(layer: Layer, rank: int) -> int:
    """MACs of k x 1, then 1 x k; the first one runs at full width."""
    m, n, h, w = layer.module.weight.shape
    wide = layer.positions * layer.module.stride[1]
    return rank * (n * h * wide + m * w * layer.positions)


def spatial_greedy(
    model: nn.Module, keep: float, example: Tensor, evaluate: Callable[[nn.Module], float]
) -> nn.Module:
    """AIMET's greedy choice of compression ratios.

    ``evaluate`` is asked ten times a layer: share the answers between calls with a cache of its
    own if several budgets are wanted.
    """
    layers = layers_of(model, example)
    wide = [
        layer
        for layer in layers
        if isinstance(layer.module, nn.Conv2d) and min(layer.module.kernel_size) > 1
    ]
    budget = keep * sum(layer.macs for layer in layers)
    fixed = sum(layer.macs for layer in layers if layer not in wide)
    scores = spatial_scores(model, wide, evaluate)

    def chosen(threshold: float) -> list[float]:
        out = []
        for layer in wide:
            good = [r for r in RATIOS if r == 1 or scores[layer.name, r] >= threshold]
            out.append(min(good))
        return out

    def total(ratios: Sequence[float]) -> int:
        pairs = zip(wide, ratios, strict=True)
        return fixed + sum(
            layer.macs if r == 1 else spatial_cost(layer, _spatial_rank(layer, r))
            for layer, r in pairs
        )

    for threshold in sorted(set(scores.values()), reverse=True):
        ratios = chosen(threshold)
        if total(ratios) <= budget:
            break
    else:
        raise ValueError(f"no ratios of AIMET's ten keep {keep:g} of the MACs")
    new = {
        layer.name: spatial_body(layer.module, _spatial_rank(layer, r))
        for layer, r in zip(wide, ratios, strict=True)
        if r < 1
    }
    return replaced(model, new)


_SCORES: WeakKeyDictionary[nn.Module, dict[tuple[str, float], float]] = WeakKeyDictionary()


def spatial_scores(
    model: nn.Module, layers: Sequence[Layer], evaluate: Callable[[nn.Module], float]
) -> dict[tuple[str, float], float]:
    """Score of the model with one layer compressed, for each layer and ratio; kept by model."""
    if model not in _SCORES:
        _SCORES[model] = {
            (layer.name, ratio): evaluate(_alone(model, layer, ratio))
            for layer in layers
            for ratio in RATIOS[:-1]
        }
    return _SCORES[model]


def _alone(model: nn.Module, layer: Layer, ratio: float) -> nn.Module:
    body = spatial_body(layer.module, _spatial_rank(layer, ratio))
    return replaced(model, {layer.name: body})


def _spatial_rank(layer: Layer, ratio: float) -> int:
    m, n, h, w = layer.module.weight.shape
    return max(1, min(n * h, m * w, int(ratio * layer.macs / spatial_cost(layer, 1))))


# ---- Tucker-2 with VBMF ranks -----------------------------------------------------------


def vbmf_rank(matrix: Tensor) -> int:
    """Rank of a matrix by the global analytic solution of empirical VBMF (Nakajima et al. 2013)."""
    y = matrix.double()
    y = y if y.shape[0] <= y.shape[1] else y.T
    rows, columns = y.shape
    s = torch.linalg.svdvals(y)
    alpha = rows / columns
    tau = 2.5129 * math.sqrt(alpha)
    edge = (1 + tau) * (1 + alpha / tau)  # the largest singular value that noise explains, squared

    def evidence(variance: float) -> float:
        x = s.square() / (columns * variance)
        signal = x[x > edge]
        noise = x[x <= edge]
        t = 0.5 * (signal - (1 + alpha) + ((signal - (1 + alpha)).square() - 4 * alpha).sqrt())
        value = (noise - noise.log()).sum() + (signal - t).sum()
        value = value + ((t + 1) / signal).log().sum() + alpha * (t / alpha + 1).log().sum()
        return float(value)

    low = float(s[-max(1, rows // 2) :].square().mean()) / columns / edge
    high = float(s.square().sum()) / (rows * columns)
    grid = torch.logspace(math.log10(max(low, 1e-12 * high)), math.log10(high), 400)
    best = min(grid.tolist(), key=evidence)
    return int((s.square() / (columns * best) > edge).sum())


def tucker_body(old: nn.Conv2d, inputs: int, outputs: int) -> nn.Module:
    """1 x 1, k x k, 1 x 1 by the truncated HOSVD."""
    w = old.weight.detach().double()
    left = torch.linalg.svd(w.flatten(1), full_matrices=False).U[:, :outputs]
    right = torch.linalg.svd(w.transpose(0, 1).flatten(1), full_matrices=False).U[:, :inputs]
    core = torch.einsum("mnhw,ms,nr->srhw", w, left, right)
    words = {"stride": old.stride, "padding": old.padding, "dilation": old.dilation}
    return nn.Sequential(
        _conv(right.T[:, :, None, None], None),
        _conv(core, None, **words),
        _conv(left[:, :, None, None], old.bias),
    )


def tucker_cost(layer: Layer, inputs: int, outputs: int) -> int:
    """MACs of the three convolutions; the first one runs before the stride."""
    m, n, h, w = layer.module.weight.shape
    before = layer.positions * math.prod(layer.module.stride)
    rest = inputs * outputs * h * w + outputs * m
    return inputs * n * before + rest * layer.positions


def tucker_vbmf(model: nn.Module, keep: float, example: Tensor) -> nn.Module:
    """VBMF ranks, all scaled by one number so that the budget is met."""
    layers = layers_of(model, example)
    wide = [
        layer
        for layer in layers
        if isinstance(layer.module, nn.Conv2d)
        and min(layer.module.kernel_size) > 1
        and min(layer.module.weight.shape[:2]) > 1
    ]
    budget = keep * sum(layer.macs for layer in layers)
    fixed = sum(layer.macs for layer in layers if layer not in wide)
    found = []
    for layer in wide:
        w = layer.module.weight.detach()
        pair = (vbmf_rank(w.transpose(0, 1).flatten(1)), vbmf_rank(w.flatten(1)))
        found.append((max(1, pair[0]), max(1, pair[1])))

    def ranks(share: float) -> list[tuple[int, int]]:
        scale = 8 * share  # up to eight times what VBMF finds, where the budget allows it
        out = []
        for layer, (inputs, outputs) in zip(wide, found, strict=True):
            m, n = layer.module.weight.shape[:2]
            pair = (max(1, round(scale * inputs)), max(1, round(scale * outputs)))
            out.append((min(n, pair[0]), min(m, pair[1])))
        return out

    def cost(layer: Layer, pair: tuple[int, int]) -> int:
        return min(layer.macs, tucker_cost(layer, *pair))

    chosen = _largest(
        ranks,
        lambda r: fixed + sum(cost(x, pair) for x, pair in zip(wide, r, strict=True)) <= budget,
    )
    new = {
        layer.name: tucker_body(layer.module, *pair)
        for layer, pair in zip(wide, chosen, strict=True)
        if tucker_cost(layer, *pair) < layer.macs
    }
    return replaced(model, new)
