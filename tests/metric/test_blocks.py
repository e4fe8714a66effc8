"""Moments that are gathered block by block are those of one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from fxcompress.forms.target import Components
from fxcompress.graph.blocks import cut
from fxcompress.graph.recorder import record
from fxcompress.metric import METRICS, Calibration, Draws, Moments
from fxcompress.metric.blocks import Blocks, Uncuttable, in_blocks
from fxcompress.metric.capture import gather
from fxcompress.metric.directions import measure_directions
from fxcompress.metric.passes import Section, Whole
from fxcompress.operators.modules import shape_of
from fxcompress.parking import Parking
from tests.metric.test_moments import Target

CPU = torch.device("cpu")
TOKENS = torch.Generator().manual_seed(0)


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
        num_attention_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    return BertModel(config).eval()


def t5() -> nn.Module:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).eval()


class Skips(nn.Module):
    """A network whose last blocks read what the first ones returned, too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True))
        self.down = nn.Sequential(nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.ReLU(inplace=True))
        self.up = nn.Sequential(nn.ConvTranspose2d(8, 8, 2, stride=2), nn.Identity())
        self.last = nn.Sequential(nn.Conv2d(16, 8, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        first = self.stem(x)
        second = self.up(self.down(first))
        second += first  # in place, on what a block returned
        both = self.last(torch.cat([first, second], 1))
        out: Tensor = self.head(both.mean((2, 3)))
        return out


def ids(*lengths: int) -> list[Tensor]:
    return [torch.randint(3, 64, (2, length), generator=TOKENS) for length in lengths]


def padded(length: int) -> dict[str, Tensor]:
    (tokens,) = ids(length)
    mask = torch.ones_like(tokens)
    mask[0, length // 2 :] = 0
    return {"input_ids": tokens, "attention_mask": mask}


CASES: dict[str, tuple[Callable[[], nn.Module], Sequence[Any]]] = {
    "decoder": (llama, [{"input_ids": each} for each in ids(7, 9, 7)]),
    "decoder, padded": (llama, [padded(8), padded(6)]),
    "encoder": (bert, [{"input_ids": each} for each in ids(7, 9)]),
    "encoder and decoder": (
        t5,
        [
            {"input_ids": a, "decoder_input_ids": b}
            for a, b in zip(ids(7, 5), ids(4, 6), strict=True)
        ],
    ),
    "skips": (Skips, [torch.randn(4, 3, 8, 8, generator=TOKENS) for _ in range(3)]),
}


def wide(data: Sequence[Any]) -> Sequence[Any]:
    """Data for a model in float64 (RMS norms compute in float32 all the same)."""
    return [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in data]


def sites_of(model: nn.Module, example: Any) -> list[Target]:
    """All operators that have weights of their own."""
    recording = record(model, [example])
    found = []
    for operator in recording.operators:
        if operator.weight is None or operator.op == "embedding" or operator.path == "lm_head":
            continue
        module = model.get_submodule(operator.path)
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            source = recording.weights[operator.weight].source
            found.append(Target(operator.path, shape_of(module), source))
    return found


def blockwise(
    model: nn.Module, sites: Sequence[Target], data: Sequence[Any], most: int, **words: Any
) -> Blocks:
    """Passes through blocks of so many sites at most."""
    blocks = cut(record(model, data[:1]), [site.name for site in sites], len, most)
    assert blocks
    sections = tuple(Section(mine, at) for at, mine in in_blocks(sites, blocks) if mine)
    return Blocks(Whole(model, data, sections, **words), blocks, Parking().park)


def equal(one: Calibration, other: Calibration) -> None:
    assert one.moments.keys() == other.moments.keys()
    assert (one.batches, one.predictions, one.kind) == (
        other.batches, other.predictions, other.kind,
    )  # fmt: skip
    assert one.reach == other.reach
    assert one.unmeasured == other.unmeasured
    for name, expected in other.moments.items():
        near(one.moments[name], expected)


def near(found: Moments, expected: Moments) -> None:
    assert found.units == expected.units
    for mine, wanted in zip(found.tensors, expected.tensors, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-6 * float(wanted.abs().max()))


@pytest.mark.parametrize("parts", [2, 4, 100])
@pytest.mark.parametrize("metric", ["kfac", "activation", "elementwise"])
@pytest.mark.parametrize("case", CASES)
def test_moments_are_those_of_one_pass(case: str, metric: str, parts: int) -> None:
    make, data = CASES[case]
    model, data = make().double(), wide(data)
    sites = sites_of(model, data[0])
    words, most = {"drawn": Draws(seed=3)}, max(1, len(sites) // parts)
    whole = gather(Whole(model, data, (Section(tuple(sites)),), **words), METRICS[metric], CPU)
    passes = blockwise(model, sites, data, most, **words)
    equal(gather(passes, METRICS[metric], CPU), whole)
    # Sections may be run again, in any order, and in parts.
    again = Whole(model, data, tuple(Section((site,)) for site in sites), **words)
    equal(gather(again, METRICS[metric], CPU), whole)
    for section in passes.sections:
        for site in section.sites:
            one = gather(_Single(passes, Section((site,), section.block)), METRICS[metric], CPU)
            near(one.moments[site.name], whole.moments[site.name])


class _Single:
    """Passes with one section."""

    def __init__(self, passes: Blocks, section: Section) -> None:
        self.sections, self.batches, self.run = (section,), passes.batches, passes.run
        self.processes = passes.processes


def test_a_chain_of_layers_is_the_same_bit_for_bit() -> None:
    model = llama()
    data = [{"input_ids": each} for each in ids(7, 9, 7)]
    sites = sites_of(model, data[0])
    whole = gather(Whole(model, data, (Section(tuple(sites)),)), METRICS["kfac"], CPU)
    found = gather(blockwise(model, sites, data, 7), METRICS["kfac"], CPU)
    for name, expected in whole.moments.items():
        for mine, wanted in zip(found.moments[name].tensors, expected.tensors, strict=True):
            assert torch.equal(mine, wanted), name


def test_every_pass_of_the_exact_fisher_goes_back() -> None:
    make, data = CASES["skips"]
    model, data = make().double(), wide(data)
    sites = sites_of(model, data[0])
    words = {"drawn": Draws(fisher="exact")}
    whole = gather(Whole(model, data, (Section(tuple(sites)),), **words), METRICS["kfac"], CPU)
    equal(gather(blockwise(model, sites, data, 1, **words), METRICS["kfac"], CPU), whole)


def test_directions_are_those_of_one_pass() -> None:
    make, data = CASES["decoder"]
    model, data = make().double(), wide(data)
    sites = sites_of(model, data[0])
    generator = torch.Generator().manual_seed(0)
    wanted = {
        site.name: {
            "some": Components(
                torch.randn(1, site.shape.out_features, 3, 1, generator=generator),
                torch.randn(1, 3, 1, site.shape.in_features, generator=generator),
            )
        }
        for site in sites
    }
    whole = measure_directions(Whole(model, data, (Section(tuple(sites)),)), wanted)
    passes = blockwise(model, sites, data, 7)
    gather(passes, METRICS["kfac"], CPU)
    found = measure_directions(passes, wanted)
    assert found.keys() == whole.keys()
    for key, value in whole.items():
        torch.testing.assert_close(found[key], value, rtol=1e-9, atol=0)


def test_a_loss_of_the_users_goes_back_too() -> None:
    make, data = CASES["decoder"]
    model, data = make().double(), wide(data)
    sites = sites_of(model, data[0])
    words = {"loss": lambda output, batch: output.logits.square().sum(-1)}
    whole = gather(Whole(model, data, (Section(tuple(sites)),), **words), METRICS["kfac"], CPU)
    equal(gather(blockwise(model, sites, data, 7, **words), METRICS["kfac"], CPU), whole)


class Twice(nn.Module):
    """Runs its only block twice on long inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.second = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.third = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if len(x) > 3:
            x = self.first(x)
        out: Tensor = self.third(self.second(x))
        return out


def test_a_block_that_runs_twice_is_told() -> None:
    model, x = Twice().eval(), torch.randn(3, 4)
    sites = sites_of(model, x)
    with pytest.raises(Uncuttable, match="first runs more than once"):
        blockwise(model, sites, [x, torch.randn(5, 4)], 1)


class Counting(nn.Module):
    """Returns something else every time."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.times = 0

    def forward(self, x: Tensor) -> Tensor:
        self.times += 1
        out: Tensor = self.layer(x) * self.times
        return out


def test_a_block_that_returns_something_else_when_run_again_is_told() -> None:
    model = nn.Sequential(Counting(), nn.Linear(4, 4), nn.Linear(4, 4)).eval()
    x = torch.randn(3, 4)
    sites = sites_of(model, x)
    passes = blockwise(model, sites, [x], 1)
    with pytest.raises(Uncuttable, match="0 returns something else"):
        gather(passes, METRICS["kfac"], CPU)


class Wide(nn.Module):
    """Two layers that cannot be told apart: both are in one function."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        half: Tensor = self.one(x)
        return half + self.two(half).relu() + self.one(half)


def test_what_comes_last_may_be_more_than_there_is_room_for() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), Wide()).double().eval()
    x = [torch.randn(3, 4, dtype=torch.float64)]
    sites = [Target(name, shape_of(model.get_submodule(name)), name, calls)
             for name, calls in (("0", 1), ("2.one", 2), ("2.two", 1))]  # fmt: skip
    assert cut(record(model, x), [site.name for site in sites], len, 1) == ("0",)
    whole = gather(Whole(model, x, (Section(tuple(sites)),)), METRICS["kfac"], CPU)
    equal(gather(blockwise(model, sites, x, 1), METRICS["kfac"], CPU), whole)
