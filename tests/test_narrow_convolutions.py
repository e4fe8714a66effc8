"""Hidden values between convolutions: against dense models, what is counted, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor, fx, nn

import fxcompress
from fxcompress.operators.modules import shape_of
from fxcompress.plans.plan import Plan
from fxcompress.rules import LoadedRules, parse_rules
from tests.hidden import hidden_groups, narrowed_pair, trained

N, WIDE, SIDE = 6, 10, 7


class Padded(nn.Conv2d):
    """A convolution that pads by itself, as those of EfficientNet do."""

    def forward(self, x: Tensor) -> Tensor:
        side = self.kernel_size[0] - 1
        x = F.pad(x, (side // 2, side - side // 2, side // 2, side - side // 2))
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class LayerScale(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(n, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Basic(nn.Module):
    """A block of a ResNet; its own channels are hidden."""

    def __init__(self, conv: type[nn.Conv2d] = nn.Conv2d, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = conv(N, WIDE, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(WIDE)
        self.act = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(WIDE, N, 3, 1, 1)
        self.around = nn.Identity() if stride == 1 else nn.Conv2d(N, N, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.act(self.norm1(self.conv1(x)))) + self.around(x)


class Bottleneck(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(N, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.conv3, self.norm3 = nn.Conv2d(8, N, 1, bias=False), nn.BatchNorm2d(N)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        return self.norm3(self.conv3(F.relu(self.norm2(self.conv2(x))))) + F.max_pool2d(
            x[:, :1], 2, ceil_mode=True
        )


class Inverted(nn.Module):
    """Expand, one kernel a channel, project, of convolutions with a forward of their own."""

    def __init__(self, conv: type[nn.Conv2d] = Padded, bias: bool = True) -> None:
        super().__init__()
        same = {"padding": 1} if conv is nn.Conv2d else {}
        self.expand, self.norm1 = conv(N, WIDE, 1, bias=bias), nn.BatchNorm2d(WIDE)
        self.depthwise = conv(WIDE, WIDE, 3, groups=WIDE, bias=bias, **same)
        self.norm2 = nn.BatchNorm2d(WIDE)
        self.project = conv(WIDE, N, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu6(self.norm1(self.expand(x)))
        return x + self.project(F.relu6(self.norm2(self.depthwise(h))))


class Gates(nn.Module):
    """Two producers, a scale as a parameter by itself, slopes of each channel, and a pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(N, WIDE, 1), nn.Conv2d(N, WIDE, 3, padding=1)
        self.gamma = nn.Parameter(torch.rand(1, WIDE, 1, 1))
        self.shift = nn.Parameter(torch.rand(WIDE))
        self.slopes, self.scale = nn.PReLU(WIDE), LayerScale(WIDE)
        self.drop, self.norm = nn.Dropout2d(0.1), nn.InstanceNorm2d(WIDE, affine=True)
        self.out = nn.Conv2d(WIDE, N, (2, 3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.one(x).sigmoid() * self.two(x) * self.gamma + self.shift[:, None, None]
        h = F.avg_pool2d(self.drop(self.scale(self.slopes(h))), 2)
        return self.out(F.interpolate(self.norm(h), scale_factor=2))


class Head(nn.Module):
    """A convolution, the mean over positions, a classifier."""

    def __init__(self, mean: str = "flatten") -> None:
        super().__init__()
        self.conv, self.norm, self.head = (
            nn.Conv2d(N, WIDE, 1),
            nn.BatchNorm2d(WIDE),
            nn.Linear(WIDE, N),
        )
        self.mean = mean

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm(self.conv(x)))
        if self.mean == "mean":
            h = h.mean((2, 3))
        else:
            h = F.adaptive_avg_pool2d(h, 1).flatten(1)
        return self.head(h)[:, :, None, None].expand(-1, -1, SIDE, SIDE)


class Signal(nn.Module):
    """One dimension, transposed ones as producer and as consumer."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose1d(N, WIDE, 3, stride=2)
        self.norm = nn.BatchNorm1d(WIDE)
        self.down = nn.ConvTranspose1d(WIDE, N, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.down(F.gelu(self.norm(self.up(x.flatten(2)))))
        return h[:, :, : SIDE * SIDE].reshape(x.shape)


class Volume(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm = nn.Conv3d(N, WIDE, (1, 2, 3)), nn.BatchNorm3d(WIDE)
        self.pad, self.two = nn.ZeroPad3d((1, 1, 1, 0, 0, 0)), nn.Conv3d(WIDE, N, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.pad(F.elu(self.norm(self.one(x[:, :, None])))))[:, :, 0]


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "basic": Basic,
    "basic, padded": lambda: Basic(Padded),
    "basic, strided": lambda: Basic(stride=2),
    "bottleneck": Bottleneck,
    "inverted": lambda: Inverted(nn.Conv2d),
    "inverted, padded": Inverted,
    "inverted, padded, no biases": lambda: Inverted(bias=False),
    "gates": Gates,
    "head": Head,
    "head, mean": lambda: Head("mean"),
    "signal": Signal,
    "volume": Volume,
}


def randomized(model: nn.Module) -> nn.Module:
    """Statistics and scales of norms as of a trained model."""
    for module in model.modules():
        for tensor in (getattr(module, "running_mean", None), getattr(module, "bias", None)):
            if isinstance(tensor, Tensor):
                nn.init.normal_(tensor)
        if isinstance(module, nn.modules.batchnorm._NormBase):
            if module.running_var is not None:
                nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model.double().eval()


def network(block: str) -> nn.Module:
    """A block between a stem and a convolution after it."""
    torch.manual_seed(0)
    return randomized(nn.Sequential(nn.Conv2d(3, N, 1), BLOCKS[block](), nn.Conv2d(N, 4, 1)))


def data(count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(6, 3, SIDE, SIDE, generator=generator).double() for _ in range(count)]


TEXT = """
version: 1
budget: {{keep: {keep}, of: matched, unit: {unit}}}
metric: {{kind: {metric}, output: gaussian, held_back: 0.0}}
{more}
rules:
  - id: hidden
    match: {{node: {{op: [linear, conv1d, conv2d, conv3d, conv_transpose1d], name: "1.*"}}}}
    rewrite: {{any_of: [{form}]{fold}}}
"""


def rules(
    keep: float = 0.7, unit: str = "parameters", form: str = "narrow", metric: str = "kfac",
    more: str = "", fold: str = "",
) -> LoadedRules:  # fmt: skip
    text = TEXT.format(keep=keep, unit=unit, form=form, metric=metric, more=more, fold=fold)
    return parse_rules(text, "narrow.yaml")


def narrowed_sites(model: nn.Module) -> list[str]:
    return [site.name for site in fxcompress.plan_of(model).sites if site.form == "narrow"]


@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize("block", BLOCKS)
def test_as_with_columns_of_zeros(block: str, share: float) -> None:
    model, x = network(block), data(1)[0]
    work, groups, _ = hidden_groups(model, x)
    assert groups
    small, reference = narrowed_pair(model, work, groups, share)
    with torch.no_grad():
        wanted = reference(x)
        torch.testing.assert_close(small(x), wanted, rtol=0, atol=1e-11 * float(wanted.abs().max()))
    assert [name for name, _ in small.named_modules()] == [n for n, _ in model.named_modules()]
    for (_, new), (_, old) in zip(small.named_modules(), model.named_modules(), strict=True):
        assert type(new) is type(old)
    for site in groups[0].sites:
        layer = small.get_submodule(site.name)
        assert tuple(layer.weight.shape) == shape_of(layer).stored_size  # as the module says itself
    small.train()(x).sum().backward()  # norms take statistics of what is there
    assert all(p.grad is not None for p in small.parameters())


@pytest.mark.parametrize("unit", ["parameters", "macs", "bytes"])
@pytest.mark.parametrize("block", BLOCKS)
def test_what_is_counted_is_what_leaves_the_model(block: str, unit: str) -> None:
    small = fxcompress.compile(network(block), rules(0.7, unit), data())
    plan = fxcompress.plan_of(small)
    assert narrowed_sites(small)
    state = [*small.parameters(), *small.buffers()]
    counted = {
        "parameters": sum(p.numel() for p in small.parameters()),
        "bytes": sum(t.numel() * t.element_size() for t in state),
        "macs": plan.model_after.macs,  # recorded in the rewritten model
    }
    for word, number in counted.items():
        saved = sum(site.before[word] - site.after[word] for site in plan.sites)
        assert plan.model_after[word] == plan.model_before[word] - saved == number
    assert plan.budget.cost <= plan.budget.limit


def test_channels_that_others_repeat_cost_nothing() -> None:
    """Half of the channels are the others times two after the activation."""
    model = network("basic")
    block, half = model[1], WIDE // 2
    with torch.no_grad():
        for tensor in (block.conv1.weight, block.norm1.running_mean, block.norm1.bias):
            tensor[half:] = 2 * tensor[:half]
        block.norm1.weight[half:] = block.norm1.weight[:half]
        block.norm1.running_var[half:] = 4 * block.norm1.running_var[:half]
        block.norm1.weight[half:] *= 2
        block.norm1.eps = 0.0
    damping = "kfac, damping: {input: 1.0e-12, output: 1.0e-12}"
    small = fxcompress.compile(model, rules(0.51, "macs", metric=damping), data())
    assert small[1].conv2.in_channels == half == small[1].norm1.num_features
    x = data(1)[0]
    torch.testing.assert_close(small(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("metric", ["euclidean", "diagonal", "activation", "ekfac", "elementwise"])
def test_every_metric_narrows(metric: str) -> None:
    small = fxcompress.compile(network("inverted, padded"), rules(metric=metric), data())
    assert len(narrowed_sites(small)) == 3
    assert bool(small(data(1)[0]).isfinite().all())


@pytest.mark.parametrize("block", ["basic", "inverted, padded", "gates", "signal"])
def test_saved_and_loaded(block: str, tmp_path: Path) -> None:
    small = fxcompress.compile(network(block), rules(), data())
    fxcompress.save(small, tmp_path / "out")
    again = fxcompress.load(tmp_path / "out", network(block))
    x = data(1)[0]
    assert torch.equal(again(x), small(x))
    assert str(fxcompress.plan_of(again)) == str(fxcompress.plan_of(small))


def test_a_plan_that_says_other_things_of_a_norm_is_not_loaded(tmp_path: Path) -> None:
    small = fxcompress.compile(network("basic"), rules(), data())
    fxcompress.save(small, tmp_path / "out")
    text = (tmp_path / "out" / "plan.json").read_text()
    for wrong in (text.replace('"1.norm1"', '"1.act"'), text.replace('"1.norm1"', '"1.no"')):
        assert wrong != text
        (tmp_path / "out" / "plan.json").write_text(wrong)
        with pytest.raises(fxcompress.LoadError):
            fxcompress.load(tmp_path / "out", network("basic"))


@pytest.mark.parametrize("block", ["basic", "inverted, padded", "gates"])
def test_in_an_fx_graph(block: str) -> None:
    model = fx.symbolic_trace(network(block))
    small = fxcompress.compile(model, rules(), data())
    assert isinstance(small, fx.GraphModule)
    x = data(1)[0]
    like = fxcompress.compile(network(block), rules(), data())
    torch.testing.assert_close(small(x), like(x), rtol=1e-10, atol=1e-10)


def test_folded_batch_norms_are_gone() -> None:
    small = fxcompress.compile(network("basic"), rules(fold=", fold_batch_norm: true"), data())
    assert isinstance(small[1].norm1, nn.Identity)
    assert small[1].conv2.in_channels == small[1].conv1.out_channels < WIDE
    assert len(small[1].conv1.bias) == small[1].conv1.out_channels


def test_kernels_of_channels_have_forms_of_their_own() -> None:
    """By itself a depthwise convolution may be separated; narrowed, it is one of the group."""
    forms = ("narrow, spatial, low_rank", "spatial, low_rank")
    both, alone = (
        fxcompress.plan(network("inverted"), rules(0.8, form=form), data()) for form in forms
    )
    assert both.budget.predicted <= alone.budget.predicted * (1 + 1e-9)
    plan = fxcompress.plan(network("inverted"), rules(0.6), data())
    (bundle,) = plan.bundles.values()
    assert [site.name for site in bundle] == ["1.expand", "1.depthwise", "1.project"]


@pytest.mark.parametrize("block", ["basic", "inverted", "inverted, padded"])
def test_forms_of_what_is_left(block: str, tmp_path: Path) -> None:
    """Layers with a forward of their own take none: what stands in their place would not pad."""
    given = rules(0.4, "bytes", fold=", then: [spatial, pivoted]")
    small = fxcompress.compile(network(block), given, data())
    plan = fxcompress.plan_of(small)
    assert len(narrowed_sites(small)) == len(plan.sites)
    if block == "inverted, padded":
        assert all(site.then is None for site in plan.sites)
    state = [*small.parameters(), *small.buffers()]
    assert plan.model_after.bytes == sum(t.numel() * t.element_size() for t in state)
    fxcompress.save(small, tmp_path / "out")
    again, x = fxcompress.load(tmp_path / "out", network(block)), data(1)[0]
    assert torch.equal(again(x), small(x))


def test_a_long_chain_of_convolutions_is_not_all_combinations() -> None:
    """Every second value of a long chain is offered: the combinations would grow without bound."""
    layers = [part for _ in range(40) for part in (nn.Conv2d(4, 4, 1), nn.ReLU())]
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    model = nn.Sequential(nn.Identity(), nn.Sequential(*layers), *head).double().eval()
    plan = fxcompress.plan(
        model, rules(0.8, "macs", fold=", then: pivoted"), [torch.randn(2, 4, 5, 5).double()]
    )
    assert plan.budget.cost <= plan.budget.limit


def test_time_as_the_budget(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    plan = fxcompress.plan(network("inverted"), rules(1.0, unit="latency"), data())
    assert all(site.seconds is not None for site in plan.sites)


def test_rounds_descend() -> None:
    small, once = (
        fxcompress.compile(network("inverted, padded"), rules(0.6, more=more), data(8))
        for more in ("solver: {rounds: 2, steps: 3}", "")
    )
    model, x = network("inverted, padded"), torch.cat(data(2))
    with torch.no_grad():
        lost = [float((made(x) - model(x)).square().mean()) for made in (small, once)]
    assert lost[0] < lost[1]


def test_while_training() -> None:
    model = network("basic").train()
    small = trained(model, rules(0.6), data())
    assert narrowed_sites(small)
    x = data(1)[0]
    torch.testing.assert_close(small.eval()(x), model.eval()(x), rtol=1e-9, atol=1e-9)


# ---- random graphs ----------------------------------------------------------------------


class Chain(nn.Module):
    """Producers that are joined, what treats channels one by one, a consumer."""

    def __init__(
        self, dims: int, producers: int, steps: list[str], kernel: int, wide: int, bias: bool
    ) -> None:
        super().__init__()
        conv: Any = getattr(nn, f"Conv{dims}d")
        self.producers = nn.ModuleList(
            conv(3, wide, k, padding=k // 2, bias=bias) for k in (1, 3, 3)[:producers]
        )
        made: dict[str, Callable[[], nn.Module]] = {
            "norm": lambda: getattr(nn, f"BatchNorm{dims}d")(wide),
            "relu": nn.ReLU,
            "silu": lambda: nn.SiLU(inplace=True),
            "depthwise": lambda: conv(wide, wide, 3, padding=1, groups=wide, bias=bias),
            "prelu": lambda: nn.PReLU(wide),
            "slope": nn.PReLU,
            "pool": lambda: getattr(nn, f"MaxPool{dims}d")(2, 1),
            "average": lambda: getattr(nn, f"AdaptiveAvgPool{dims}d")(3),
            "dropout": nn.Dropout,
        }
        self.steps = nn.Sequential(*(made[step]() for step in steps))
        self.consumer = conv(wide, 4, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        first, *others = [producer(x) for producer in self.producers]
        for at, other in enumerate(others):
            first = first * other.sigmoid() if at else first + other
        return self.consumer(self.steps(first))


STEPS = ("norm", "relu", "silu", "depthwise", "prelu", "slope", "pool", "average", "dropout")


@settings(max_examples=40, deadline=None)
@given(
    dims=st.integers(1, 3), producers=st.integers(1, 3), kernel=st.sampled_from([1, 3]),
    steps=st.lists(st.sampled_from(STEPS), max_size=5), wide=st.integers(2, 7),
    bias=st.booleans(), share=st.sampled_from([0.3, 0.7, 1.0]), seed=st.integers(0, 99),
)  # fmt: skip
def test_random_graphs(
    dims: int, producers: int, kernel: int, steps: list[str], wide: int, bias: bool,
    share: float, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    model = randomized(Chain(dims, producers, steps, kernel, wide, bias))
    x = torch.randn(2, 3, *(6 for _ in range(dims))).double()
    work, groups, _ = hidden_groups(model, x)
    (group,) = groups
    assert len(group.sites) == producers + steps.count("depthwise") + 1
    small, reference = narrowed_pair(model, work, groups, share)
    with torch.no_grad():
        wanted = reference(x)
        torch.testing.assert_close(small(x), wanted, rtol=0, atol=1e-10 * float(wanted.abs().max()))
    width = max(1, int(share * wide))
    form = group.forms["narrow"]
    gone = form.parameters(torch.tensor([wide, width]).numpy())
    biases = sum(site.shape.bias * site.out_features for site in group.sites)
    before, after = (sum(p.numel() for p in each.parameters()) for each in (model, small))
    assert gone[0] + biases == sum(site.shape.weights for site in group.sites) + biases
    assert gone[0] - gone[1] == before - after


# ---- what is refused ------------------------------------------------------------------


class Excited(Inverted):
    """Squeeze and excitation."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d)
        self.squeeze, self.excite = nn.Conv2d(WIDE, 3, 1), nn.Conv2d(3, WIDE, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.depthwise(F.relu(self.expand(x)))
        gate = self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(h, 1)))).sigmoid()
        return self.project(h * gate)


class Between(nn.Module):
    """A convolution, something, another one."""

    def __init__(self, between: Callable[[], nn.Module], **groups: int) -> None:
        super().__init__()
        self.one = nn.Conv2d(N, 12, 1, groups=groups.get("one", 1))
        self.between = between()
        self.two = nn.Conv2d(12, N, 1, groups=groups.get("two", 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.between(self.one(x)))


class Twice(Between):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(super().forward(x))


class Told(Between):
    """The number of channels stands in the forward."""

    def __init__(self) -> None:
        super().__init__(nn.Identity)
        self.gamma = nn.Parameter(torch.rand(12))

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x) * self.gamma.view(1, 12, 1, 1))


class Apart(Between):
    """A norm of which the second half is read, too."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.between(self.one(x))
        return self.two(h) + h[:, N:]


class Flat(nn.Module):
    """Positions and channels become one axis."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(N, 4, 1), nn.Linear(4 * SIDE * SIDE, N)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).flatten(1))[:, :, None, None] + x


class PooledChannels(nn.Module):
    """A pooling over the last dimension, which counts channels here."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(SIDE, 8), nn.Linear(8, SIDE)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(F.avg_pool2d(self.one(x), 3, 1, 1))


class OneNorm(nn.Module):
    """Two hidden values with one norm."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Conv2d(N, 8, 1), nn.Conv2d(8, N, 1), nn.Conv2d(N, 8, 1)
        self.norm, self.four = nn.BatchNorm2d(8), nn.Conv2d(8, N, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(self.norm(self.one(x)))
        return self.four(self.norm(self.three(x)))


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "squeeze and excitation": (Excited, "squeeze and excitation"),
    "group norm": (lambda: Between(lambda: nn.GroupNorm(3, 12)), "(group_norm), which"),
    "layer norm": (
        lambda: Between(lambda: nn.LayerNorm([12, SIDE, SIDE])), "(layer_norm), which"
    ),
    "softmax": (lambda: Between(lambda: nn.Softmax(1)), "(softmax), which is not entrywise"),
    "shuffle": (lambda: Between(lambda: nn.ChannelShuffle(3)), "(channel_shuffle), which"),
    "grouped producer": (lambda: Between(nn.ReLU, one=3), "one (conv2d) has 3 groups"),
    "grouped consumer": (lambda: Between(nn.ReLU, two=3), "two (conv2d) has 3 groups"),
    "grouped between": (
        lambda: Between(lambda: nn.Conv2d(12, 12, 3, 1, 1, groups=4)), "has 4 groups of channels"
    ),
    "multiplier": (
        lambda: nn.Sequential(
            nn.Conv2d(N, 4, 1), nn.Conv2d(4, 8, 3, 1, 1, groups=4), nn.Conv2d(8, N, 1)
        ),
        "makes 2 channels of each",
    ),
    "several calls": (lambda: Twice(nn.ReLU), "called several times"),
    "one norm": (OneNorm, "1.norm (batch_norm) is called several times"),
    "told": (Told, "is given the number of channels"),
    "read": (lambda: Apart(nn.ReLU), "reads the value of"),
    "flat": (Flat, "(flatten), which is not entrywise"),
    "pooled channels": (PooledChannels, "goes over channels"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_narrowed_says_why(name: str) -> None:
    torch.manual_seed(0)
    make, reason = REFUSED[name]
    model = randomized(nn.Sequential(nn.Conv2d(3, N, 1), make(), nn.Conv2d(N, 4, 1)))
    told = str(fxcompress.explain(model, rules(1.0), data(1)[0]))
    assert reason in told, told


def test_a_residual_stays() -> None:
    """Told of a layer that makes no hidden value itself, which is the other half of the answer."""
    text = TEXT.format(keep=1.0, unit="macs", form="narrow", metric="kfac", more="", fold="")
    given = parse_rules(f"{text}    unless: [{{name: 1.conv2}}]\n", "narrow.yaml")
    told = str(fxcompress.explain(network("basic"), given, data(1)[0]))
    assert "narrow: 1.around (identity) reads the value of 0 (conv2d), too" in told


def test_a_plan_says_whether_it_is_sound() -> None:
    plan = fxcompress.plan(network("inverted"), rules(0.6), data())
    assert Plan.model_validate_json(plan.model_dump_json()) == plan


@pytest.mark.parametrize("form", ["narrow", "pivoted", "channel", "spatial", "tucker2"])
@pytest.mark.parametrize("traced", [False, True])
def test_memory_format_is_kept(form: str, traced: bool) -> None:
    torch.manual_seed(0)
    model: nn.Module = Basic().eval().to(memory_format=torch.channels_last)
    model = fx.symbolic_trace(model) if traced else model
    images = [torch.randn(4, N, SIDE, SIDE).to(memory_format=torch.channels_last)]
    rules = parse_rules(
        f"""
budget: {{keep: 0.5, of: matched, unit: parameters}}
rules:
  - id: convolutions
    match: {{node: {{op: conv2d}}}}
    rewrite: {{form: {form}}}
""",
        "format.yaml",
    )
    small = fxcompress.compile(model, rules, images, progress=False)
    assert fxcompress.plan_of(small).rewritten
    weights = [p for p in small.parameters() if p.dim() == 4]
    assert weights
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)


@pytest.mark.parametrize("metric", ["diagonal", "kfac", "ekfac", "elementwise"])
@pytest.mark.parametrize("form", ["channel", "channel_input", "spatial", "tucker2", "pivoted"])
def test_layers_without_a_rank_in_every_metric(metric: str, form: str) -> None:
    """A form has no rank that saves anything in a kernel of 1 x 1, or of one channel."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip
    asked = parse_rules(
        f"""
budget: {{keep: 0.7}}
metric: {{kind: {metric}}}
rules:
  - id: convolutions
    match: {{node: {{op: conv2d}}}}
    rewrite: {{any_of: [{form}, narrow]}}
""",
        "no-rank.yaml",
    )
    images = [torch.randn(8, 1, 9, 9) for _ in range(4)]
    small = fxcompress.compile(model, asked, images, progress=False)
    assert fxcompress.plan_of(small).rewritten
    assert bool(small(images[0]).isfinite().all())
