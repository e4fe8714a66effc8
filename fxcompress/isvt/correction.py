"""Closed-form correction: weights fitted to the inputs that they really get.

A layer of the compressed model sees x', where the dense one saw x.  The weight of rank r that comes
closest to the dense layer's outputs on x' is, with ``C = E[x x'ᵀ]`` and ``A' = E[x' x'ᵀ]``,

    V = argmin E ‖L_Gᵀ (W x - V x')‖²  =  the rank r truncation of W C A'⁻¹ in A' ⊗ G

(AA-SVD and SAES have it for G = 1).  All layers are fitted at once, to inputs before the
correction; in the next round they are fitted to those after it.  A' is damped towards the weight
as it is, so that directions without data stay.

It removes what errors of earlier layers add to those of a layer; what it cannot know is that later
layers would rather have had them differently.  Measured (README): it helps deep cuts, and may
hurt mild ones, so it is kept only where the objective falls.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fxcompress.forms import LinearShape
from fxcompress.graph.inputs import Forward, padding_mask, run_model
from fxcompress.metric.passes import InputKey, input_key
from fxcompress.metric.quadratic import Kronecker
from fxcompress.metric.rows import input_rows
from fxcompress.metric.whiten import Whitener, whitener
from fxcompress.modules import canonical_weight
from fxcompress.sites import Site


@torch.no_grad()
def corrected(
    dense: nn.Module,
    model: nn.Module,
    ranks: Mapping[str, int | None],
    sites: Sequence[Site],
    metrics: Mapping[str, Any],
    batches: Iterable[Any],
    damping: float,
    forward: Forward | None,
) -> Iterator[tuple[Site, Tensor]]:
    """New weights (m x n) of all linear sites that are cut in a Kronecker metric.

    Args:
        dense: the dense model, with a module for every site.
        model: the same with the weights as they are now.
        ranks: of every site; None if it is not cut.
        sites: the matched ones.
        metrics: by site name; their output factor is used.
        batches: to take moments on.
        damping: of A', relative to its mean eigenvalue.
        forward: how to call a model on a batch.
    """
    fitted = [
        site
        for site in sites
        if isinstance(site.shape, LinearShape)
        and ranks.get(site.name) is not None
        and isinstance(metrics[site.name], Kronecker)
        and isinstance(metrics[site.name].outputs, Whitener)
        and not metrics[site.name].null
    ]
    crossed: dict[InputKey, Tensor] = {}
    second: dict[InputKey, Tensor] = {}
    count: dict[InputKey, int] = {}
    for batch in batches:
        mask = padding_mask(batch)
        pairs = []
        for each in (dense, model):
            with _inputs(each, fitted) as seen:
                run_model(each, batch, forward)
            pairs.append(seen)
        for site in {input_key(site): site for site in fitted}.values():
            key = input_key(site)
            for x, y in zip(pairs[0][key], pairs[1][key], strict=True):
                rows = zip(
                    input_rows(x, site.shape, mask), input_rows(y, site.shape, mask), strict=True
                )
                for before, after in rows:
                    n = before.shape[-1]
                    zeros = torch.zeros(n, n, dtype=torch.float64, device=x.device)
                    crossed[key] = crossed.get(key, zeros) + (before.T @ after)
                    second[key] = second.get(key, zeros) + (after.T @ after)
                    count[key] = count.get(key, 0) + len(after)
    roots = {key: whitener(moment / count[key], damping) for key, moment in second.items()}
    for site in fitted:
        key, rank = input_key(site), ranks[site.name]
        assert rank is not None
        inputs = roots[key]
        if inputs.null:
            continue
        old = canonical_weight(dense.get_submodule(site.name)).double()
        now = canonical_weight(model.get_submodule(site.name)).double()
        extra = damping * float(second[key].diagonal().mean()) / count[key]
        right = old @ (crossed[key] / count[key]) + extra * now
        best = inputs.solve(right.T).T
        metric = Kronecker(inputs, metrics[site.name].outputs)
        left, right = metric.truncations(best, "matrix").factors(rank)
        yield site, left.double() @ right.double()


@contextmanager
def _inputs(model: nn.Module, sites: Sequence[Site]) -> Iterator[dict[InputKey, list[Tensor]]]:
    """What the first site of each source is called with, call by call."""
    seen: dict[InputKey, list[Tensor]] = {}
    handles = []

    def hook(key: InputKey) -> Any:
        def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
            value = args[0] if args else next(iter(kwargs.values()))
            seen.setdefault(key, []).append(value)

        return keep

    for key, site in {input_key(site): site for site in reversed(sites)}.items():
        module = model.get_submodule(site.name)
        handles.append(module.register_forward_pre_hook(hook(key), with_kwargs=True))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
