"""All convolutions, embeddings and linear layers of many models at full rank: nothing may change.

One form after the other takes every operator that it fits; bounds as in ``test_full_rank.py``.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from fxcompress.forms import Body, ConvShape, Target, find_form
from fxcompress.forms.words import BUILT_IN
from fxcompress.graph.eligible import obstacle
from fxcompress.metric.kronecker import Kronecker
from fxcompress.metric.quadratic import Grouped
from fxcompress.metric.whiten import whitener
from fxcompress.operators.applied import operator_at, operator_path
from fxcompress.operators.modules import canonical_weight
from fxcompress.operators.words import OPERATORS
from fxcompress.pipeline.sites import Site, gather_sites
from fxcompress.rewrite import (
    Factorized,
    apply_plan,
    own_parameters,
    planned_weight,
    prepared,
    record_operators,
    skeleton,
)
from fxcompress.rules import RuleSet, load_rules, match_rules
from tests.convolutions import spd
from tests.full_rank import counted_calls, dense_weight, entry, factorized, plan_for
from tests.zoo import ZOO, tensors

FORMS = tuple(
    dict.fromkeys(form.name for form in BUILT_IN.values() if not form.joint and not form.hidden)
)
RULES = RuleSet.model_validate(
    {
        "budget": {"keep": 1.0},
        "rules": [
            {
                "id": "all",
                "match": {"node": {"op": list(OPERATORS)}},
                "rewrite": {"any_of": list(FORMS)},
            }
        ],
    }
)


class Unet(nn.Module):
    """Down and up again, with skips, transposed and dilated convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.middle = nn.Conv2d(8, 12, 3, padding=2, dilation=2, padding_mode="reflect")
        self.up = nn.ConvTranspose2d(12, 8, 4, stride=2, padding=1)
        self.out = nn.Conv2d(11, 3, (3, 5), padding="same")

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(torch.relu(self.middle(torch.relu(self.down(x)))))
        return self.out(torch.cat([x, torch.relu_(h)], 1))


class Mobile(nn.Sequential):
    """Depthwise and pointwise."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3, stride=2, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU6(inplace=True),
            nn.Conv2d(8, 8, 3, padding=1, groups=8),
            nn.Hardswish(inplace=True),
            nn.Conv2d(8, 16, 1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(16, 5),
        )


class Volume(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv3d(2, 6, 3, padding=1, padding_mode="circular"),
            nn.GELU(),
            nn.ConvTranspose3d(6, 4, 2, stride=2, groups=2),
            nn.Flatten(2),
        )


class Waves(nn.Module):
    """Strided convolutions in time on unbatched and batched input, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(1, 8, 10, stride=5)
        self.again = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.back = nn.ConvTranspose1d(8, 2, 5, stride=5, output_padding=2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        h = h + torch.tanh(self.again(h))
        return self.back(self.again(h))


def residual() -> nn.Module:
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="bottleneck",
        num_labels=4,
    )  # fmt: skip
    return transformers.ResNetForImageClassification(config)


def pixels(*size: int) -> Callable[[], dict[str, Tensor]]:
    return lambda: {"x": torch.randn(*size, dtype=torch.float64)}


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "unet": (Unet, pixels(2, 3, 16, 16)),
    "mobile": (Mobile, pixels(2, 3, 17, 17)),
    "volume": (Volume, pixels(2, 2, 4, 4, 4)),
    "waves": (Waves, pixels(2, 1, 53)),
    "waves, no batch": (Waves, pixels(1, 53)),
    "resnet": (residual, lambda: {"pixel_values": torch.randn(2, 3, 32, 32).double()}),
    **{
        name: (case.build, lambda case=case: case.batch(torch.float64))
        for name, case in ZOO.items()
    },
}


def run(model: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    """The outputs; where torch's fused encoder puts zeros for padding, without these."""
    outputs = tensors(model(batch["x"]) if set(batch) == {"x"} else model(**batch))
    padding = batch.get("src_key_padding_mask")
    return outputs if padding is None else [out[~padding] for out in outputs]


@cache
def original(name: str) -> tuple[nn.Module, Any, nn.Module, tuple[Site, ...]]:
    torch.manual_seed(0)
    build, inputs = MODELS[name]
    model, batch = build().double().eval(), inputs()
    work = prepared(model)
    example = (batch["x"],) if isinstance(model, nn.Sequential) and "x" in batch else batch
    recording = record_operators(work, [example])
    legality = obstacle(work, recording, (Factorized,))
    matched = match_rules(load_rules(RULES), recording.operators, legality)
    return model, batch, work, gather_sites(work, recording, matched)[0]


def full_rank_body(site: Site, module: nn.Module, name: str) -> Any:
    form, shape = find_form(name, site.op), site.shape
    weight = canonical_weight(module).detach()
    if isinstance(shape, ConvShape):
        n = shape.group_in * shape.taps
        pairs = [(spd(n), spd(shape.group_out)) for _ in range(shape.groups)]
        metric: Any = Grouped(
            tuple(Kronecker(whitener(a, 0.0), whitener(g, 0.0)) for a, g in pairs)
        )
    else:
        a = (
            torch.rand(shape.in_features) + 0.1
            if shape.op == "embedding"
            else spd(shape.in_features)
        )
        metric = Kronecker(whitener(a, 0.0), whitener(spd(shape.out_features), 0.0))
    rank = form.full_rank(shape)
    body = form.empty(shape, rank)
    form.fill(body, form.factors(Target(weight, metric), rank), getattr(module, "bias", None))
    return body, rank


@cache
def rewritten(name: str, form: str) -> tuple[nn.Module, nn.Module, Any, dict[str, Site]]:
    model, batch, work, sites = original(name)
    torch.manual_seed(0)
    taken = {
        site.name: site
        for site in sites
        if form in site.match.forms and find_form(form, site.op).misfit(site.shape) is None
    }
    if not taken:
        pytest.skip(f"{form} fits nothing in {name}")
    bodies, entries = {}, []
    for path, site in taken.items():
        bodies[path], rank = full_rank_body(site, operator_at(work, path), form)
        weight, applied = planned_weight(work, site.weight)
        made = entry(site, form, rank, rank)
        entries.append(made.model_copy(update={"weight": weight, "applied": applied}))
    small = skeleton(model)
    apply_plan(
        small, plan_for(entries), {name: Body(None, (body,)) for name, body in bodies.items()}
    )
    return model, own_parameters(small, model), batch, taken


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MODELS)
def test_nothing_changes(name: str, form: str) -> None:
    model, small, batch, taken = rewritten(name, form)
    bound = 1e-5 if name in ZOO and ZOO[name].single else 1e-9
    with torch.no_grad(), counted_calls(small) as calls:
        got = run(small, batch)
    with torch.no_grad():
        wanted = run(model, batch)
    assert calls == {site.name: site.calls for site in taken.values()}
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=bound * float(b.abs().max()))
    for path, layer in factorized(small).items():
        weight, _ = planned_weight(small, f"{operator_path(small, path)}.weight")
        dense = dense_weight(prepared(model), weight)
        assert layer.weight.shape == dense.shape
        torch.testing.assert_close(layer.dense(), dense, rtol=0, atol=1e-9)


@pytest.mark.parametrize("form", ["channel", "spatial", "tucker2", "pivoted", "embedding"])
@pytest.mark.parametrize("name", ["unet", "mobile", "waves", "resnet", "convnext", "gpt2"])
def test_copies_pickles_and_training(name: str, form: str) -> None:
    _, small, batch, taken = rewritten(name, form)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(small)))
    with torch.no_grad():
        for a, b in zip(run(twin, batch), run(small, batch), strict=True):
            assert torch.equal(a, b)
    twin.train()
    sum(t.square().mean() for t in run(twin, batch) if t.is_floating_point()).backward()
    layers = factorized(twin)
    assert set(layers) == set(taken)
    for layer in layers.values():
        gradients = [p.grad for p in layer.parameters()]
        assert all(g is not None and bool(g.isfinite().all()) for g in gradients)


@pytest.mark.parametrize("form", ["channel", "spatial", "tucker2", "pivoted"])
@pytest.mark.parametrize("name", ["unet", "mobile", "resnet"])
def test_compiled_and_exported(name: str, form: str) -> None:
    _, small, batch, _ = rewritten(name, form)
    with torch.no_grad():
        wanted = run(small, batch)
        compiled = torch.compile(small, backend="aot_eager", fullgraph=True)
        for a, b in zip(run(compiled, batch), wanted, strict=True):
            torch.testing.assert_close(a, b)
        args = (batch["x"],) if set(batch) == {"x"} else ()
        exported = torch.export.export(small, args, {} if args else batch).module()
        for a, b in zip(run(exported, batch), wanted, strict=True):
            torch.testing.assert_close(a, b)
