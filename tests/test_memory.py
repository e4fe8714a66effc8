"""A limit on memory changes how the work is done, and nothing of what comes out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import fxcompress
from fxcompress import parking
from fxcompress.errors import MemoryLimitError
from fxcompress.parking import Parking, mapped
from fxcompress.pipeline import room
from fxcompress.pipeline.estimate import passes_over
from fxcompress.pipeline.request import Request
from fxcompress.pipeline.room import Needs
from fxcompress.pipeline.survey import survey
from fxcompress.progress import stages
from fxcompress.rules import LoadedRules, parse_rules

EVERY = """
budget: {{keep: 0.6, of: matched, unit: parameters}}
metric: {{kind: {metric}, held_back: 0.3}}
rules:
  - {{id: all, match: {{node: {{op: [linear, conv2d]}}}}, rewrite: {rewrite}}}
"""


def rules(metric: str, rewrite: str) -> LoadedRules:
    return parse_rules(EVERY.format(metric=metric, rewrite=rewrite), "rules.yaml")


def llama(layers: int = 3) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def tokens() -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(3, 64, (4, 9), generator=generator)} for _ in range(4)]


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(16, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 16, 1))
            for _ in range(3)
        )
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        out: Tensor = self.head(x.mean((2, 3)))
        return out


def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(8, 3, 8, 8, generator=generator) for _ in range(4)]


@pytest.fixture
def tight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything waits in files, however small, and parts are as small as they can be."""
    monkeypatch.setattr(parking, "SMALL", 0)
    monkeypatch.setattr(Needs, "everything", lambda needs, sites: 1 << 60)
    monkeypatch.setattr(Needs, "decomposing", lambda needs, site: 0)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], list[Any]], str, str]] = {
    "pivoted": (llama, tokens, "kfac", "{form: pivoted}"),
    "narrowed": (llama, tokens, "kfac", "{any_of: [narrow, pivoted], then: pivoted}"),
    "ekfac": (llama, tokens, "ekfac", "{any_of: [pivoted, low_rank]}"),
    "activation": (llama, tokens, "activation", "{form: low_rank}"),
    "diagonal": (llama, tokens, "diagonal", "{form: low_rank}"),
    "no data": (llama, tokens, "euclidean", "{form: low_rank}"),
    "convolutions": (Network, images, "kfac", "{any_of: [narrow, low_rank]}"),
    "one layer after the other": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 24), nn.GELU(), nn.Linear(24, 8)).eval(),
        images,
        "kfac",
        "{any_of: [narrow, low_rank]}",
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore::fxcompress.FxcompressWarning")
def test_plan_and_weights_are_the_same(case: str, tight: None) -> None:
    make, data, metric, rewrite = CASES[case]
    model, given = make(), rules(metric, rewrite)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Needs, "everything", lambda needs, sites: 0)
        free = fxcompress.compile(model, given, data())
    small = fxcompress.compile(model, given, data(), memory=600_000 if data is images else 80_000)
    expected, found = fxcompress.plan_of(free), fxcompress.plan_of(small)
    assert len(expected.rewritten) > 0
    for one, other in zip(found.sites, expected.sites, strict=True):
        assert (one.form, one.rank, one.then) == (other.form, other.rank, other.then)
        assert one.predicted == pytest.approx(other.predicted, rel=1e-4, abs=1e-12)
    for (name, one), (other_name, other) in zip(
        small.state_dict().items(), free.state_dict().items(), strict=True
    ):
        assert name == other_name
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def surveyed(model: nn.Module, data: list[Any], memory: int) -> Any:
    loaded = rules("kfac", "{form: pivoted}")
    loaded = fxcompress.rules.read_rules(loaded, memory=memory)
    with stages(False) as silent:
        return survey(model, loaded, Request(silent, data))


def test_a_chain_of_layers_is_cut_at_its_layers(tight: None) -> None:
    found, data = surveyed(llama(4), tokens(), 150_000)
    assert found.room.blocks == tuple(f"model.layers.{at}" for at in range(4))
    passes = passes_over(found, data.batches, data.total)
    assert [section.block for section in passes.sections] == [4, 3, 2, 1, 0]


def test_the_default_is_a_share_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "free_memory", lambda device: 1000 << 20)
    found, *_ = surveyed(llama(), tokens(), None)  # type: ignore[arg-type]
    assert found.room.limit == 800 << 20
    assert found.room.parking is None
    assert not found.room.blocks


def test_what_nobody_limited_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "free_memory", lambda device: 1000)
    found, *_ = surveyed(llama(), tokens(), None)  # type: ignore[arg-type]
    assert found.room.parking is not None


def test_too_little_is_refused_before_the_work() -> None:
    calls = 0

    def counted(model: nn.Module, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        return model(**batch)

    with pytest.raises(MemoryLimitError, match=r"lm_head alone takes .* KiB: allow as much"):
        fxcompress.compile(
            llama(), rules("kfac", "{form: pivoted}"), tokens(), memory="1kB", forward=counted
        )
    assert calls == 1  # to record


@pytest.mark.parametrize("text", ["lots", "-1", "8 GiBs", 0, 1.5])
def test_a_limit_that_is_none_is_refused(text: Any) -> None:
    with pytest.raises(MemoryLimitError, match="as in '8GiB'"):
        fxcompress.compile(llama(), rules("kfac", "{form: pivoted}"), tokens(), memory=text)


@pytest.mark.parametrize(
    ("text", "expected"), [("8GiB", 8 << 30), ("500 MB", 500_000_000), ("1.5k", 1500), (7, 7)]
)
def test_limits_have_units(text: Any, expected: int) -> None:
    loaded = fxcompress.rules.read_rules(rules("kfac", "{form: pivoted}"), memory=text)
    assert loaded.rules.memory == expected


def test_rules_may_have_a_limit() -> None:
    text = EVERY.format(metric="kfac", rewrite="{form: pivoted}") + "memory: 2GiB\n"
    assert parse_rules(text, "rules.yaml").rules.memory == 2 << 30


# ---- what waits -----------------------------------------------------------------------


def test_what_waits_is_the_same_and_shared_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parking, "SMALL", 0)
    place, x = Parking(), torch.randn(5, 7)
    for each in (x, x.T, x[1:, ::2], x.bfloat16(), torch.arange(9), torch.randn(3) > 0):
        assert torch.equal(place.park(each), each)
        assert place.park(each).dtype == each.dtype
    first, again = place.park((x, [x, {"a": x}]))
    assert first is again[0] is again[1]["a"]
    place.cool()
    assert torch.equal(first, x)
    layer = nn.Linear(3, 4)
    weight = layer.weight.detach().T
    assert Parking(layer).park(weight) is weight
    assert place.park(first) is first


def test_nothing_is_left_of_what_waited(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parking, "SMALL", 0)
    place = Parking(directory=str(tmp_path))
    kept = place.park(torch.randn(1000))
    assert not [*tmp_path.iterdir()]
    del kept


def test_a_disk_that_is_full_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(parking, "SMALL", 0)
    place = Parking(directory=str(tmp_path / "nowhere"))
    with pytest.raises(MemoryLimitError, match="set TMPDIR"):
        place.park(torch.randn(1000))


def test_only_what_has_tensors_is_made_anew() -> None:
    value = {"a": (1, "b"), "c": [torch.ones(2)]}
    found = mapped(value, lambda tensor: tensor + 1)
    assert found["a"] == (1, "b")
    assert torch.equal(found["c"][0], torch.full((2,), 2.0))
    assert torch.equal(value["c"][0], torch.ones(2))  # type: ignore[arg-type]


# ---- the forecast ---------------------------------------------------------------------


def test_a_forecast_tells_what_the_work_keeps_to(tight: None) -> None:
    model, given = llama(4), rules("kfac", "{form: pivoted}")
    told = fxcompress.forecast(model, given, tokens(), memory=150_000)
    assert told.blocks == tuple(f"model.layers.{at}" for at in range(4))
    assert [stage.name for stage in told.stages] == [
        "calibrate", "held back", "decompose", "rewrite",
    ]  # fmt: skip
    assert told.waiting > 0
    assert "in 4 blocks, model.layers.0 to model.layers.3" in str(told)


def test_a_model_on_the_meta_device_is_foretold_as_well() -> None:
    given = rules("kfac", "{form: pivoted}")
    real = fxcompress.forecast(llama(), given, tokens())
    with torch.device("meta"):
        empty = LlamaForCausalLM(llama().config)
    told = fxcompress.forecast(empty, given, tokens())
    for one, other in zip(told.stages, real.stages, strict=True):
        assert (one.name, one.memory, one.waiting) == (other.name, other.memory, other.waiting)
    assert told.model == real.model
    assert told.passes == 1
    assert not told.blocks
    assert all(stage.waiting == 0 for stage in told.stages)


def test_more_layers_take_no_more_memory_within_a_limit(tight: None) -> None:
    given = rules("kfac", "{form: pivoted}")
    few, many = (
        fxcompress.forecast(llama(layers), given, tokens(), memory=150_000) for layers in (3, 6)
    )
    assert len(many.blocks) == 2 * len(few.blocks)
    for one, other in zip(few.stages[:3], many.stages[:3], strict=True):
        assert one.memory == other.memory
