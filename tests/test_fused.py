"""Hidden values behind views and fused producers, against dense models with zeros."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, fx, nn

import fxcompress
from fxcompress.rules import LoadedRules, parse_rules
from tests.hidden import trained

N, HIDDEN = 8, 20


def rules(
    keep: float = 0.6, name: str = "*.down", form: str = "narrow", more: str = ""
) -> LoadedRules:
    return parse_rules(
        f"""
version: 1
budget: {{keep: {keep}, of: matched, unit: parameters}}
metric: {{kind: kfac, held_back: 0.0}}
{more}
rules:
  - id: hidden
    match: {{node: {{op: linear, name: "{name}"}}}}
    rewrite: {{form: {form}}}
""",
        "fused.yaml",
    )


class Block(nn.Module):
    """One fused producer of gate and up, and the consumer."""

    def __init__(self, bias: bool = True, parts: int = 2) -> None:
        super().__init__()
        self.fused = nn.Linear(N, parts * HIDDEN, bias=bias)
        self.down = nn.Linear(HIDDEN, N)

    def hidden(self, x: Tensor) -> Tensor:
        gate, up = self.fused(x).chunk(2, dim=-1)
        return F.silu(gate) * up

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.hidden(x))


class Halves(Block):
    def hidden(self, x: Tensor) -> Tensor:
        return F.glu(self.fused(x), -1)


class Three(Block):
    """Of three parts, one behind a product of the others."""

    def __init__(self) -> None:
        super().__init__(parts=3)

    def hidden(self, x: Tensor) -> Tensor:
        a, b, c = F.relu(self.fused(x)).chunk(3, -1)
        return a * b.sigmoid() + c


class Mixed(Block):
    """A fused producer beside a single one."""

    def __init__(self) -> None:
        super().__init__()
        self.more = nn.Linear(N, HIDDEN)

    def hidden(self, x: Tensor) -> Tensor:
        return super().hidden(x) * self.more(x).tanh()


class Flat(Block):
    """Rows of all samples together, and back."""

    def hidden(self, x: Tensor) -> Tensor:
        gate, up = self.fused(x.reshape(-1, N)).chunk(2, -1)
        return (gate * up).unflatten(0, x.shape[:2])


class Turned(Block):
    """Channels in the middle, then last again."""

    def hidden(self, x: Tensor) -> Tensor:
        first, second = self.fused(x).transpose(1, 2).chunk(2, 1)
        return (first.relu() * second).permute(0, 2, 1).contiguous()


class Split(Block):
    """Sizes that follow the value; in the graph they are numbers."""

    def hidden(self, x: Tensor) -> Tensor:
        both = self.fused(x)
        gate, up = both.split(both.shape[-1] // 2, -1)
        return gate * up.sigmoid()


class Sliced(Block):
    def hidden(self, x: Tensor) -> Tensor:
        both = self.fused(x)
        half = both.shape[-1] // 2
        return both[..., :half] * both[..., half:].sigmoid()


class Reshaped(Block):
    def hidden(self, x: Tensor) -> Tensor:
        gate, up = self.fused(x).chunk(2, -1)
        both = (gate * up.tanh()).reshape(-1, gate.shape[-1])
        return both.view(*x.shape[:2], both.shape[-1])


BLOCKS: dict[str, Callable[[], Block]] = {
    "chunk": Block,
    "no bias": lambda: Block(bias=False),
    "glu": Halves,
    "three": Three,
    "mixed": Mixed,
    "flat": Flat,
    "turned": Turned,
    "split": Split,
    "sliced": Sliced,
    "reshaped": Reshaped,
}


def network(block: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(BLOCKS[block](), BLOCKS[block](), nn.Linear(N, 4)).double().eval()


def data(count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(6, 5, N, generator=generator).double() for _ in range(count)]


def kept_rows(dense: Tensor, small: Tensor) -> list[int]:
    rows = [int((dense - row).abs().sum(1).argmin()) for row in small]
    assert torch.equal(dense[rows], small)
    return rows


def reference(model: nn.Module, small: nn.Module) -> nn.Module:
    """The dense model whose consumers have zeros where channels went."""
    wide = copy.deepcopy(model)
    for path, layer in small.named_modules():
        if not path.endswith("down"):
            continue
        around = path.rpartition(".")[0]
        rows = kept_rows(
            model.get_submodule(f"{around}.fused").weight,  # type: ignore[arg-type]
            small.get_submodule(f"{around}.fused").weight,  # type: ignore[arg-type]
        )
        width = layer.in_features
        assert len(rows) % width == 0
        kept = rows[:width]
        assert kept == sorted({*kept})
        for part in range(len(rows) // width):  # the same channels of each part
            assert rows[part * width : (part + 1) * width] == [part * HIDDEN + c for c in kept]
        whole = wide.get_submodule(path)
        weight = torch.zeros_like(whole.weight)  # type: ignore[arg-type]
        weight[:, kept] = layer.weight  # type: ignore[assignment]
        whole.weight = nn.Parameter(weight)
    return wide


@pytest.mark.parametrize("block", BLOCKS)
def test_fused_producers_lose_the_same_channels_of_each_part(block: str) -> None:
    model = network(block)
    small = fxcompress.compile(model, rules(), data())
    plan = fxcompress.plan_of(small)
    assert {site.form for site in plan.sites} == {"narrow"}
    assert small[0].down.in_features < HIDDEN
    assert type(small[0].fused) is nn.Linear
    x = data(1)[0]
    torch.testing.assert_close(small(x), reference(model, small)(x), rtol=1e-12, atol=1e-12)
    assert plan.model_after.parameters == sum(p.numel() for p in small.parameters())
    after = sum(site.after.parameters for site in plan.sites)
    assert after <= 0.6 * sum(site.before.parameters for site in plan.sites)


def test_in_an_fx_graph() -> None:
    model = fx.symbolic_trace(network("chunk"))
    small = fxcompress.compile(model, rules(), data())
    x = data(1)[0]
    expected = fxcompress.compile(network("chunk"), rules(), data())(x)
    torch.testing.assert_close(small(x), expected, rtol=1e-12, atol=1e-12)


def test_with_forms_for_what_is_left() -> None:
    """A factorized producer stands for the same channels of each part."""
    model = network("chunk")
    small = fxcompress.compile(model, rules(0.5, form="narrow, then: pivoted"), data())
    plan = fxcompress.plan_of(small)
    fused = [site for site in plan.sites if site.then is not None and "fused" in site.name]
    assert fused
    for site in fused:
        dense = model.get_submodule(site.name).weight
        weight = small.get_submodule(site.name).weight
        rows = [int((dense - row).square().sum(1).argmin()) for row in weight]
        width = int(str(site.rank))
        assert rows[width:] == [HIDDEN + row for row in rows[:width]]
    assert plan.model_after.parameters == sum(p.numel() for p in small.parameters())
    rounds = "solver: {rounds: 2, steps: 2}"
    again = fxcompress.compile(
        network("chunk"), rules(0.5, form="narrow, then: pivoted", more=rounds), data()
    )
    assert bool(again(data(1)[0]).isfinite().all())


def test_saved_and_loaded(tmp_path: Any) -> None:
    small = fxcompress.compile(network("three"), rules(), data())
    fxcompress.save(small, tmp_path / "out")
    again = fxcompress.load(tmp_path / "out", network("three"))
    x = data(1)[0]
    assert torch.equal(again(x), small(x))


def test_rounds_and_training() -> None:
    more = "solver: {rounds: 2, steps: 3}"
    small = fxcompress.compile(network("mixed"), rules(0.5, more=more), data(8))
    assert {site.form for site in fxcompress.plan_of(small).sites} == {"narrow"}
    model = network("chunk").train()
    small = trained(model, rules(0.5), data())
    x = data(1)[0]
    torch.testing.assert_close(small.eval()(x), model.eval()(x), rtol=1e-9, atol=1e-9)


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def phi3() -> nn.Module:
    config = transformers.Phi3Config(**SIZES, num_key_value_heads=2, max_position_embeddings=64)
    return transformers.Phi3ForCausalLM(config)


def glm() -> nn.Module:
    config = transformers.GlmConfig(**SIZES, num_key_value_heads=2, head_dim=8)
    return transformers.GlmForCausalLM(config)


def modern_bert() -> nn.Module:
    config = transformers.ModernBertConfig(**SIZES, cls_token_id=1, sep_token_id=2)
    return transformers.ModernBertForMaskedLM(config)


@pytest.mark.parametrize(
    ("make", "fused", "down"),
    [
        (phi3, "gate_up_proj", "down_proj"),
        (glm, "gate_up_proj", "down_proj"),
        (modern_bert, "Wi", "Wo"),
    ],
)
def test_gated_blocks_of_transformers(
    make: Callable[[], Any], fused: str, down: str, tmp_path: Any
) -> None:
    """Exact against the dense model with zeros, and a plain checkpoint with one width."""
    torch.manual_seed(0)
    model = make().double().eval()
    generator = torch.Generator().manual_seed(1)
    batch = {"input_ids": torch.randint(3, 64, (4, 16), generator=generator)}
    given = rules(0.6, f"*.mlp.{down}", "narrow, group: widths")
    small = fxcompress.compile(model, given, [batch, batch])
    wide = copy.deepcopy(model)
    for path, layer in small.named_modules():
        if path.endswith(f"mlp.{down}"):
            around = path.rpartition(".")[0]
            rows = kept_rows(
                model.get_submodule(f"{around}.{fused}").weight,
                small.get_submodule(f"{around}.{fused}").weight,
            )
            width = layer.in_features
            assert width < 48
            assert rows[width:] == [48 + row for row in rows[:width]]
            whole = wide.get_submodule(path)
            weight = torch.zeros_like(whole.weight)
            weight[:, rows[:width]] = layer.weight
            whole.weight = nn.Parameter(weight)
    with torch.no_grad():
        torch.testing.assert_close(
            small(**batch).logits, wide(**batch).logits, rtol=1e-9, atol=1e-9
        )
    fxcompress.save(small, tmp_path, plain=True)
    again = type(small).from_pretrained(tmp_path)
    assert again.config.intermediate_size == width
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, small(**batch).logits)


def test_only_those_that_insist_stay() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Insisting(), Split(), nn.Linear(N, 4)).double().eval()
    small = fxcompress.compile(model, rules(0.8), data())
    assert small[0].down.in_features == HIDDEN
    assert small[1].down.in_features < HIDDEN
    (dense,) = (site for site in fxcompress.plan_of(small).sites if site.form is None)
    assert "runs with no other: " in dense.reason


# ---- what is refused ------------------------------------------------------------------


class Uneven(Block):
    def __init__(self) -> None:
        super().__init__()
        self.fused = nn.Linear(N, 3 * HIDDEN // 2)

    def hidden(self, x: Tensor) -> Tensor:
        wide, small = self.fused(x).split([HIDDEN, HIDDEN // 2], -1)
        return wide * small.mean(-1, keepdim=True)


class Elsewhere(Block):
    def hidden(self, x: Tensor) -> Tensor:
        gate, up = self.fused(x).chunk(2, -1)
        return gate * up.sum(-1, keepdim=True)


class OtherWay(Block):
    """Samples, not channels, are parted."""

    def hidden(self, x: Tensor) -> Tensor:
        first, second = (self.fused(x)[..., :HIDDEN] + 0.0).chunk(2, 0)
        return torch.cat([first, second])


class Scaled(Block):
    """A scale of both parts by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2 * HIDDEN))

    def hidden(self, x: Tensor) -> Tensor:
        gate, up = (self.fused(x) * self.scale).chunk(2, -1)
        return gate * up


class Shuffled(Block):
    def hidden(self, x: Tensor) -> Tensor:
        h: Tensor = super().hidden(x)[..., torch.arange(HIDDEN).flip(0)]
        return h


class Insisting(Block):
    """The number of channels stands in the source."""

    def hidden(self, x: Tensor) -> Tensor:
        gate, up = self.fused(x).split(HIDDEN, -1)
        return gate * up


class Overlapping(Block):
    def hidden(self, x: Tensor) -> Tensor:
        both = self.fused(x)
        return both[..., :HIDDEN] * both[..., 1 : HIDDEN + 1]


class TwoWays(Block):
    """The same matrix as it is and transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = nn.Linear(N, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        square = self.fused(x[0, 0].expand(HIDDEN, N)).relu()
        return x + self.down(square.T + square).mean()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Uneven, "(mean), which is not entrywise"),
        (Elsewhere, "(sum), which is not entrywise"),
        (OtherWay, "(cat), which is not entrywise"),
        (Scaled, "has entries of 2 parts"),
        (Shuffled, "(getitem), which is not entrywise"),
        (Overlapping, "(getitem), which is not entrywise"),
        (Insisting, "is given the number of channels, and runs with no other: "),
        (TwoWays, "are read in two ways"),
    ],
)
def test_what_is_not_parted_by_channels_is_refused(
    make: Callable[[], nn.Module], reason: str
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(make(), nn.Linear(N, N)).double().eval()
    told = str(fxcompress.explain(model, rules(1.0), data()[0]))
    assert reason in told, told
