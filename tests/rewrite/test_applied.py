"""Weights that a forward applies by a function are operators like any other."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

import fxcompress
from fxcompress.forms import Body, find_form
from fxcompress.forms.target import Target
from fxcompress.graph.eligible import obstacle
from fxcompress.graph.recorder import Recording
from fxcompress.metric import METRICS, Moments, calibrate
from fxcompress.metric.whiten import Whiteners
from fxcompress.operators.applied import Applied, hold, operator_at, release
from fxcompress.operators.linear import LinearShape
from fxcompress.operators.modules import canonical_weight
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
from fxcompress.rules import match_rules
from tests.full_rank import entry, plan_for
from tests.isvt.problems import rules as of_rounds
from tests.small import rules

N = 12


class FalconLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        product = input @ self.weight.T
        return product if self.bias is None else product + self.bias


def same(size: int, kernel: int, stride: int, dilation: int) -> list[int]:
    total = max((math.ceil(size / stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
    return [total // 2, total - total // 2]


class SamePadding(nn.Conv2d):
    """Pads by the size of what it is given, as timm's ``Conv2dSame``."""

    def forward(self, input: Tensor) -> Tensor:
        pads: list[int] = []
        for dim in (1, 0):
            kernel, stride, dilation = self.kernel_size[dim], self.stride[dim], self.dilation[dim]
            pads += same(input.shape[dim - 2], kernel, stride, dilation)
        return F.conv2d(
            F.pad(input, pads), self.weight, self.bias, self.stride, (0, 0), self.dilation,
            self.groups,
        )  # fmt: skip


class StaticPadding(nn.Conv2d):
    """Pads by a module of its own, as EfficientNet does."""

    def __init__(self, *args: Any, size: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        pads = same(size, self.kernel_size[0], self.stride[0], self.dilation[0])
        self.static_padding = nn.ZeroPad2d((*pads, *pads))

    def forward(self, input: Tensor) -> Tensor:
        padded = self.static_padding(input)
        return F.conv2d(
            padded, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups
        )


class Bare(nn.Module):
    """A parameter of its own, and one function of it."""

    def __init__(self, size: tuple[int, ...], run: Callable[[Any, Tensor, Any], Tensor]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(size) / size[-1] ** 0.5)
        self.b = nn.Parameter(torch.randn(8))
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.w, x, self.b)


def bare(*size: int, run: Callable[[Any, Tensor, Any], Tensor]) -> Callable[[], nn.Module]:
    return lambda: Bare(size, run)


ROWS = {
    "falcon": lambda: FalconLinear(N, 8),
    "falcon without bias": lambda: FalconLinear(N, 8, bias=False),
    "linear": bare(8, N, run=lambda w, x, b: F.linear(x, w)),
    "linear with bias": bare(8, N, run=lambda w, x, b: F.linear(x, w, bias=b)),
    "matmul": bare(N, 8, run=lambda w, x, b: x @ w + b),
    "torch.matmul": bare(N, 8, run=lambda w, x, b: torch.matmul(x, w)),
    "transposed": bare(8, N, run=lambda w, x, b: x @ w.T),
    "t()": bare(8, N, run=lambda w, x, b: x.matmul(w.t())),
    "transpose()": bare(8, N, run=lambda w, x, b: x @ w.transpose(-1, -2)),
    "permute()": bare(8, N, run=lambda w, x, b: x @ w.permute(1, 0)),
    "to its own type": bare(8, N, run=lambda w, x, b: F.linear(x, w.to(x.dtype))),
    "addmm": bare(N, 8, run=lambda w, x, b: torch.addmm(b, x.flatten(0, -2), w)),
    "mm": bare(N, 8, run=lambda w, x, b: torch.mm(x.flatten(0, -2), w)),
    "einsum (m x n)": bare(8, N, run=lambda w, x, b: torch.einsum("bti,oi->bto", x, w)),
    "einsum (n x m)": bare(N, 8, run=lambda w, x, b: torch.einsum("bti,io->bto", x, w)),
    "einsum, ellipsis": bare(8, N, run=lambda w, x, b: torch.einsum("...i,oi->...o", x, w)),
    "einsum, weight first": bare(8, N, run=lambda w, x, b: torch.einsum("oi,bti->bto", w, x)),
    "einsum, channels first": bare(
        8, N, run=lambda w, x, b: torch.einsum("bit,oi->bot", x.mT, w).mT
    ),
    "einsum, output turned": bare(8, N, run=lambda w, x, b: torch.einsum("ti,oi->ot", x[0], w).T),
    "square (m x n)": bare(N, N, run=lambda w, x, b: F.linear(x, w)),
    "square (n x m)": bare(N, N, run=lambda w, x, b: x @ w),
    "called twice": bare(N, N, run=lambda w, x, b: torch.relu(x @ w) @ w),
}  # fmt: skip
PATCHES = {
    "same padding": lambda: SamePadding(6, 8, 3, stride=2),
    "same padding, grouped": lambda: SamePadding(6, 8, (3, 2), groups=2, bias=False),
    "static padding": lambda: StaticPadding(6, 8, 3, stride=2, size=9),
    "conv1d": bare(8, 6, 3, run=lambda w, x, b: F.conv1d(x.flatten(2), w, b, padding="same")),
    "conv_transpose2d": bare(
        6, 8, 3, 3, run=lambda w, x, b: F.conv_transpose2d(x, w, b, 2, output_padding=1)
    ),
}
TABLES = {
    "embedding": bare(20, N, run=lambda w, x, b: F.embedding(x, w)),
    "embedding, padded": bare(20, N, run=lambda w, x, b: F.embedding(x, w, padding_idx=-1)),
}
EVERYTHING: Any = {**ROWS, **PATCHES, **TABLES}
FORMS = {"linear": "pivoted", "embedding": "embedding"}


def data(name: str, items: int = 3) -> Tensor:
    torch.manual_seed(1)
    if name in TABLES:
        return torch.randint(19, (items, 5))  # not the padding
    size = (items, 6, 9, 9) if name in PATCHES else (items, 5, N)
    return torch.randn(size, dtype=torch.float64)


def build(name: str) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(EVERYTHING[name](), nn.Identity()).double().eval()


def everything() -> Any:
    """A rule for every operator with a weight."""
    ops = ["conv1d", "conv2d", "conv3d", "conv_transpose2d"]
    more = [
        {"id": "convs", "match": {"node": {"op": ops}}, "rewrite": {"form": "channel"}},
        {"id": "tables", "match": {"node": {"op": "embedding"}}, "rewrite": {"form": "embedding"}},
    ]
    return rules(0.5, rewrite={"form": "pivoted"}, more=more)


def matched_sites(work: nn.Module, recording: Recording) -> tuple[Site, ...]:
    legality = obstacle(work, recording, (Factorized,))
    matched = match_rules(everything(), recording.operators, legality)
    return gather_sites(work, recording, matched)[0]


def rewritten(model: nn.Module, x: Any, *, lifted: bool = False) -> nn.Module:
    """The model with all its operators factorized at full rank."""
    work = prepared(model)
    recording = record_operators(work, [x])
    bodies, entries = {}, []
    for site in matched_sites(work, recording):
        module = operator_at(work, site.name)
        name = FORMS.get(site.op, "channel")
        form: Any = find_form(name, site.op)
        metric = METRICS["euclidean"].quadratic(site.shape, Moments(), Whiteners((0.0, 0.0)))
        full = form.full_rank(site.shape)
        body = form.empty(site.shape, full)
        factors = form.factors(Target(canonical_weight(module).detach(), metric), full)
        form.fill(body, factors, getattr(module, "bias", None))
        bodies[site.name] = Body(None, (body,))
        weight, applied = planned_weight(work, site.weight)
        made = entry(site, name, full)
        entries.append(made.model_copy(update={"weight": weight, "applied": applied}))
    assert entries
    assert lifted or all(each.applied for each in entries)
    made_of = skeleton(model)
    apply_plan(made_of, plan_for(entries), bodies)
    return own_parameters(made_of, model)


@pytest.mark.parametrize("name", EVERYTHING)
def test_at_full_rank_nothing_changes(name: str) -> None:
    model, x = build(name), data(name)
    made = rewritten(model, x)
    assert sum(isinstance(module, Factorized) for module in made.modules()) == 1
    torch.testing.assert_close(made(x), model(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(copy.deepcopy(made)(x), model(x), rtol=0, atol=1e-12)
    # The dense weight is there for whoever asks, and the factors learn.
    (held,) = (module for module in made.modules() if isinstance(module, Applied))
    (weight,) = (p for n, p in model.named_parameters() if n in ("0.weight", "0.w"))
    torch.testing.assert_close(held.clone(), weight, rtol=0, atol=1e-12)
    torch.testing.assert_close(held * 2 + held, 3 * weight, rtol=0, atol=1e-11)
    assert (held.shape, held.dtype, len(held)) == (weight.shape, weight.dtype, len(weight))
    made(x).sum().backward()
    assert all(p.grad is not None for p in held.parameters())


GRAPHS: dict[str, Callable[[nn.Module, Tensor], fx.GraphModule]] = {
    "traced": lambda model, x: fx.symbolic_trace(model),
    "exported": lambda model, x: torch.export.export(model, (x,)).module(),
}
UNTRACED = {"same padding", "same padding, grouped"}  # sizes decide what they do


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("name", EVERYTHING)
def test_in_a_graph_they_become_nodes(name: str, graph: str) -> None:
    if graph == "traced" and name in UNTRACED:
        pytest.skip("cannot be traced")
    x = data(name)
    model = GRAPHS[graph](build(name), x)
    made = rewritten(model, x, lifted=True)
    assert isinstance(made, fx.GraphModule)
    torch.testing.assert_close(made(x), model(x), rtol=0, atol=1e-12)
    if (name, graph) == ("to its own type", "traced"):  # which type is known when it runs
        assert any(isinstance(module, Applied) for module in made.modules())
        return
    assert not any(isinstance(module, Factorized | Applied) for module in made.modules())
    assert any("fxcompress" in node.meta for node in made.graph.nodes)


@pytest.mark.parametrize("name", EVERYTHING)
def test_the_moments_are_those_at_the_call(name: str) -> None:
    """Against one gradient of the parameter by autograd for every prediction, in float64."""
    model = nn.Sequential(build(name), nn.Flatten(1)).double()
    x = data(name, items=4)
    if name in ("addmm", "mm", "einsum, output turned"):  # rows are samples
        x = x[:1]
    work = prepared(model)
    recording = record_operators(work, [x])
    (site,) = matched_sites(work, recording)
    found = calibrate(
        work, [site], [x], METRICS["elementwise"], loss=lambda out, batch: out.square().sum(1) / 2
    ).moments[site.name]
    assert found.entries is not None
    (weight,) = (p for n, p in model.named_parameters() if n in ("0.0.weight", "0.0.w"))
    squares = []
    for loss in model(x).square().sum(1) / 2:
        (gradient,) = torch.autograd.grad(loss, weight, retain_graph=True)
        squares.append(site.shape.canonical(gradient).square())
    expected = torch.stack(squares).sum(0) / len(squares)
    torch.testing.assert_close(
        found.entries.reshape(expected.shape) * found.units[2] ** 2, expected, rtol=1e-9, atol=1e-12
    )


def two_ways(w: Any, x: Tensor, b: Any) -> Tensor:
    return F.linear(F.linear(x, w), w.T)


REFUSED: Any = {
    "a slice": (bare(16, N, run=lambda w, x, b: F.linear(x, w[:8])), "a part of its weight 0.w"),
    "two ways": (bare(N, N, run=two_ways), "in different ways (linear 12→12, linear 12→12, tr"),
    "also read": (bare(N, N, run=lambda w, x, b: x @ w + w.mean()), "also read by 0"),
    "scaled": (bare(N, 8, run=lambda w, x, b: torch.addmm(b, x[0], w, alpha=2)), ""),
    "from the left": (bare(8, N, run=lambda w, x, b: w @ x[0].T), ""),
    "summed away": (bare(8, N, run=lambda w, x, b: torch.einsum("bti,oi->bt", x, w)), ""),
    "three dimensions": (
        bare(3, N, 8, run=lambda w, x, b: torch.einsum("bti,hio->bhto", x, w)), "",
    ),
    "computed with": (bare(8, N, run=lambda w, x, b: F.linear(x, w.softmax(0))), ""),
    "in other pieces": (bare(4, 2, N, run=lambda w, x, b: F.linear(x, w.view(8, N))), "in another"),
    "renormalized": (
        bare(20, N, run=lambda w, x, b: F.embedding(x[..., 0].long() % 20, w, max_norm=1)), "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_product_with_the_whole_weight_is_refused(name: str) -> None:
    make, reason = REFUSED[name]
    torch.manual_seed(0)
    model, x = nn.Sequential(make(), nn.Flatten()).eval(), torch.randn(3, 5, N)
    before = model(x)
    work = prepared(model)
    recording = record_operators(work, [x])
    legality = obstacle(work, recording, (Factorized,))
    told = [why for o in recording.operators if o.weight and (why := legality(o)) is not None]
    matched = match_rules(everything(), recording.operators, legality)
    assert not matched.matches
    assert reason in str(told), told
    torch.testing.assert_close(work(x), before)


class Particular(nn.Module):
    """Runs with nothing but a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, N))

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.w, nn.Parameter)
        return F.linear(x, self.w)


def test_a_forward_that_takes_nothing_but_a_parameter_keeps_it() -> None:
    model = nn.Sequential(FalconLinear(N, N), Particular())
    work = prepared(model)
    recording = record_operators(work, [torch.randn(3, N)])
    reason = obstacle(work, recording, (Factorized,))
    told = {o.path: reason(o) for o in recording.operators if o.op == "linear"}
    assert told["0"] is None
    assert "does not run with an object in its place" in str(told["1"])
    assert isinstance(work[1].w, nn.Parameter)


class Saving(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, w)
        return F.linear(x, w)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        x, w = ctx.saved_tensors
        return g @ w, g.T @ x


class Fused(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        out: Tensor = Saving.apply(input, self.weight)
        return out + self.bias


def test_what_a_function_saves_for_the_backward_pass_stays_a_parameter() -> None:
    model = nn.Sequential(Fused(16, 16), nn.ReLU(), FalconLinear(16, 8)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = fxcompress.compile(model, rules(0.6), batches(), progress=False)
    plan = fxcompress.plan_of(made)
    assert [site.name for site in plan.sites] == ["2"]
    (told,) = plan.unmatched
    assert "an autograd.Function applies it" in told.reason
    made(batches(1)[0]).sum().backward()


def test_objects_are_taken_out_again() -> None:
    model = nn.Sequential(FalconLinear(N, 8))
    weight = model[0].weight
    hold(model, "0.weight", LinearShape(N, 8, False))
    assert isinstance(operator_at(model, "0"), nn.Linear)
    assert operator_at(model, "0").weight is weight
    release(model, "0.weight")
    assert model[0].weight is weight
    with pytest.raises(ValueError, match=r"no parameter 0\.weight of linear 8→12"):
        hold(model, "0.weight", LinearShape(8, N, False))


def test_a_write_to_a_rewritten_weight_is_refused() -> None:
    model, x = build("falcon"), data("falcon")
    made: Any = rewritten(model, x)
    with pytest.raises(RuntimeError, match="would be lost"):
        nn.init.zeros_(made[0].weight)
    with pytest.raises(RuntimeError, match="would be lost"):
        made[0].weight.data.add_(1)


class Unit(nn.Module):
    """An inverted residual, its convolutions padding in a forward of their own."""

    def __init__(self, width: int, conv: Callable[..., nn.Module]) -> None:
        super().__init__()
        wide = 4 * width
        self.expand = conv(width, wide, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(wide)
        self.depthwise = conv(wide, wide, 3, groups=wide, bias=False)
        self.bn2 = nn.BatchNorm2d(wide)
        self.project = conv(wide, width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu6(self.bn1(self.expand(x)))
        h = F.relu6(self.bn2(self.depthwise(h)))
        return x + self.bn3(self.project(h))


class Lite(nn.Module):
    """Of the kind of EfficientNet-Lite."""

    def __init__(self, conv: Callable[..., nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = conv(3, 16, 3, stride=2, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.blocks = nn.Sequential(Unit(16, conv), Unit(16, conv))
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.blocks(F.relu6(self.bn(self.stem(x)))).mean((2, 3)))
        return out


def static(*args: Any, stride: int = 1, **kwargs: Any) -> nn.Module:
    return StaticPadding(*args, stride=stride, size=15 if stride == 2 else 8, **kwargs)


@pytest.mark.parametrize("conv", [SamePadding, static], ids=["same", "static"])
def test_a_network_of_padding_convolutions(conv: Callable[..., nn.Module], tmp_path: Path) -> None:
    """The preset reaches what it reaches of ordinary convolutions, and all goes on from there."""
    model, ordinary = Lite(conv).eval(), Lite(_ordinary).eval()
    ordinary.load_state_dict(model.state_dict())
    batches = [torch.randn(8, 3, 15, 15) for _ in range(3)]
    torch.testing.assert_close(model(batches[0]), ordinary(batches[0]), rtol=0, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made, other = (
            fxcompress.compile(m, "convolutional", batches, keep=0.8, progress=False)
            for m in (model, ordinary)
        )
    plan, usual = fxcompress.plan_of(made), fxcompress.plan_of(other)
    names = {site.name for site in plan.sites}
    assert names == {site.name for site in usual.sites}
    assert "blocks.0.expand" in names
    reached = sum(site.before.macs for site in plan.sites)
    assert reached == sum(site.before.macs for site in usual.sites)
    assert reached > 0.8 * plan.model_before.macs  # all but the stem and the classifier
    assert {s.name: (s.form, s.rank) for s in plan.sites} == {
        s.name: (s.form, s.rank) for s in usual.sites
    }
    assert all(site.applied for site in plan.sites if site.op == "conv2d")
    torch.testing.assert_close(made(batches[0]), other(batches[0]), rtol=0, atol=1e-4)
    # Other sizes than it was compressed with, as far as the padding allows.
    if conv is SamePadding:
        larger = torch.randn(2, 3, 21, 19)
        assert made(larger).shape == (2, 10)
    fxcompress.save(made, tmp_path)
    back = fxcompress.load(tmp_path, Lite(conv).eval())
    torch.testing.assert_close(back(batches[0]), made(batches[0]), rtol=0, atol=0)
    assert "blocks" in str(fxcompress.diff(model, made))
    measured = fxcompress.measure(model, made, batches)
    assert measured is not None


def _ordinary(*args: Any, **kwargs: Any) -> nn.Module:
    return nn.Conv2d(*args, padding=args[2] // 2, **kwargs)


class Mixed(nn.Module):
    """Parameters applied in three ways, and a layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Parameter(torch.randn(16, 16) / 4) for _ in range(3))
        self.out = FalconLinear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        gated = torch.relu(x @ self.q) * torch.sigmoid(F.linear(x, self.k))
        out: Tensor = self.out(gated + torch.einsum("bi,io->bo", x, self.v))
        return out


def batches(count: int = 8) -> list[Tensor]:
    return [torch.randn(64, 16, generator=torch.Generator().manual_seed(i)) for i in range(count)]


@pytest.mark.parametrize(
    "solver", [{}, {"rounds": 2, "steps": 3}, {"rounds": 2, "correct": True}], ids=str
)
def test_one_shot_and_in_rounds(solver: dict[str, Any], tmp_path: Path) -> None:
    model, x = Mixed().eval(), batches(1)[0]
    before = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = fxcompress.compile(model, of_rounds(0.6, **solver), batches(), progress=False)
    plan = fxcompress.plan_of(made)
    assert {site.name: site.applied for site in plan.sites} == {
        "q": "transposed", "k": "as stored", "v": "transposed", "out": "as stored",
    }  # fmt: skip
    assert {site.weight for site in plan.sites} == {"q", "k", "v", "out.weight"}
    assert plan.model_after.parameters == sum(p.numel() for p in made.parameters())
    assert plan.model_after.macs < plan.model_before.macs
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    fxcompress.save(made, tmp_path)
    assert torch.equal(fxcompress.load(tmp_path, Mixed().eval())(x), made(x))


def test_while_it_is_trained() -> None:
    model, x = Mixed(), batches(1)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        isvt = fxcompress.ISVT(model, rules(0.6), batches(), steps=4, every=2)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        for batch in batches(4):
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()
            isvt.step()
        made = isvt.finalize()
    torch.testing.assert_close(made(x), model(x), rtol=0, atol=1e-5)
    assert torch.linalg.matrix_rank(model.q) < 16


def test_compilers_see_the_product() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = fxcompress.compile(Mixed().eval(), rules(0.6), batches(), progress=False)
    x = batches(1)[0]
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), made(x))
    for strict in (False, True):
        program = torch.export.export(made, (x,), strict=strict).module()
        with FlopCounterMode(display=False) as flops:
            out = program(x)
        torch.testing.assert_close(out, made(x))
        # No dense weight is computed: the products are those of the plan.
        assert flops.get_total_flops() == 2 * fxcompress.plan_of(made).model_after.macs
    torch.testing.assert_close(torch.jit.trace(made, (x,))(x), made(x))


def test_other_models_do_not_pay_for_it() -> None:
    """Nothing is an object that no function applies."""
    model = nn.Sequential(nn.Linear(N, N), nn.ReLU(), nn.Linear(N, N))
    work = prepared(model)
    record_operators(work, [torch.randn(3, N)])
    assert not any(isinstance(module, Applied) for module in work.modules())
