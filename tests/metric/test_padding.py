"""A padded batch and its rows without padding give the same metric, wherever the rows go."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcompress.errors import CalibrationError
from fxcompress.metric import METRICS, calibrate
from fxcompress.metric.metric import Metric
from tests.metric.test_moments import target

ALL = Metric("all", frozenset({"input", "output", "weight"}), "", lambda m: (None, None))

LAYOUTS = ["plain", "flattened", "routed", "packed", "turned", "four", "attention", "windows"]


class Tokens(nn.Module):
    """Two layers between an embedding and a head, in one layout of the rows."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layout = layout
        self.e, self.head = nn.Embedding(20, 4), nn.Linear(4, 5)
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 4)
        self.conv = nn.Conv1d(4, 4, 3, padding=1)

    def between(self, x: Tensor) -> Any:
        return x + self.b(self.a(x).tanh())

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Any = None) -> Any:
        x = self.e(input_ids)
        real = attention_mask.bool()
        if self.layout == "flattened":
            return self.head(self.between(x.reshape(-1, 4)).view(x.shape))
        if self.layout == "routed":
            flat = x.flatten(0, 1)
            out = torch.zeros_like(flat)
            for expert in range(2):
                (at,) = torch.where(input_ids.flatten() % 2 == expert)
                out.index_add_(0, at, self.between(flat[at]) * (1 + expert))
            return self.head(out.view(x.shape))
        if self.layout == "packed":
            out = torch.zeros_like(x)
            out[real] = self.between(x[real])
            return self.head(out)
        if self.layout == "turned":
            return self.head(self.between(x.transpose(0, 1)).transpose(0, 1))
        if self.layout == "four":
            halves = torch.stack([x, 2 * x], 1)  # batch x 2 x positions x width
            return self.head(self.between(halves).sum(1))
        if self.layout == "windows":
            x = self.conv((x * real[..., None]).transpose(1, 2)).transpose(1, 2)
        if self.layout == "attention":
            scores = x @ x.transpose(1, 2)
            seen = real[:, None] & torch.ones(scores.shape[1:], dtype=torch.bool).tril()
            x = x + scores.masked_fill(~seen, -torch.inf).softmax(-1) @ x
        return self.head(self.between(x))


def lengths_mask(side: str = "right") -> Tensor:
    mask = (torch.arange(6) < torch.tensor([6, 2, 4, 1])[:, None]).long()
    return mask if side == "right" else mask.flip(1)


def padded(side: str = "right", vocabulary: int = 20) -> dict[str, Tensor]:
    mask = lengths_mask(side)
    ids = torch.randint(2, vocabulary, mask.shape, generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": (ids * 3) % 5}


def unpadded(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    masks = batch["attention_mask"].bool()
    return [{k: v[i : i + 1, m] for k, v in batch.items()} for i, m in enumerate(masks)]


def losses(output: Any, batch: Any) -> Tensor:
    logits = output if isinstance(output, Tensor) else output.logits
    labels = batch["labels"]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(
        labels.shape
    )


def both(model: nn.Module, names: list[str], batch: Any, **words: Any) -> Any:
    targets = [target(model, name) for name in names]
    return [
        calibrate(model, targets, data, ALL, loss=losses, **words)
        for data in ([batch], unpadded(batch))
    ]


def require_equal(found: Any, expected: Any, names: list[str]) -> None:
    assert found.predictions == expected.predictions
    for name in names:
        for side in ("input", "output", "weight"):
            one, two = (getattr(each.moments[name], side) for each in (found, expected))
            torch.testing.assert_close(one, two, msg=f"{name}: {side}")


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, side: str) -> None:
    model = Tokens(layout).double().eval()
    model.e.weight.data[0] = 50.0  # what stands at padding is large
    names = ["a", "b", "head"]
    found, expected = both(model, names, padded(side))
    if layout == "turned":  # by itself, nothing tells positions from samples
        model.layout = "plain"
        _, expected = both(model, names, padded(side))
    require_equal(found, expected, names)


def test_rows_of_nothing_among_real_ones_are_refused() -> None:
    class Filled(Tokens):
        def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Any = None) -> Any:
            x, real = self.e(input_ids), attention_mask.bool()
            out = torch.zeros(x.shape, dtype=x.dtype)
            out[real] = self.between(x[real])
            return self.head(out)

    with pytest.raises(CalibrationError, match="no position of the batch"):
        both(Filled("plain").double(), ["head"], padded())


@pytest.mark.parametrize("kind", ["activation", "kfac", "diagonal"])
def test_nan_at_padding_is_not_looked_at(kind: str) -> None:
    model = Tokens("attention").double().eval()
    batch = padded("left")
    out = model(**batch)
    assert out.isnan().any()
    assert out[batch["attention_mask"].bool()].isfinite().all()
    names = ["a", "b", "head"]
    found = calibrate(model, [target(model, name) for name in names], [batch], METRICS[kind])
    for name in names:
        moments = found.moments[name]
        for value in (moments.input, moments.output, moments.weight):
            assert value is None or value.isfinite().all()


def test_positions_that_are_mixed_are_refused() -> None:
    class Shifted(Tokens):
        def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Any = None) -> Any:
            x = self.e(input_ids)
            return self.head(self.between(x + x.roll(1, 1)))

    model = Shifted("plain").double()
    with pytest.raises(CalibrationError, match=r"padding cannot be told.*without padding"):
        both(model, ["a"], padded())


def test_a_mask_that_belongs_to_nothing_is_refused() -> None:
    model = Tokens("plain").double()
    batch = {**padded(), "attention_mask": lengths_mask()[:, :5]}
    with pytest.raises(CalibrationError, match="no tensor beside it"):
        calibrate(model, [target(model, "a")], [batch], METRICS["activation"])


def tiny(name: str) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    size = {
        "vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 12, "max_position_embeddings": 16,
    }  # fmt: skip
    if name == "bert":
        config = transformers.BertConfig(**size)
        return transformers.BertForMaskedLM(config)
    if name == "opt":
        config = transformers.OPTConfig(**size, ffn_dim=12, word_embed_proj_dim=8, pad_token_id=1)
        return transformers.OPTForCausalLM(config)
    if name == "llama":
        config = transformers.LlamaConfig(**size, num_key_value_heads=1)
        return transformers.LlamaForCausalLM(config)
    raise AssertionError(name)


@pytest.mark.parametrize(
    ("name", "side", "sites"),
    [
        ("bert", "right", ["bert.encoder.layer.1.intermediate.dense"]),
        ("opt", "right", ["model.decoder.layers.0.fc1", "model.decoder.layers.1.fc2"]),
        ("opt", "left", ["model.decoder.layers.0.fc1", "model.decoder.layers.1.fc2"]),
        ("llama", "right", ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]),
        ("llama", "left", ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]),
    ],
)
def test_models(name: str, side: str, sites: list[str]) -> None:
    model = tiny(name).double().eval()

    def forward(model: nn.Module, batch: Any) -> Any:
        given = {k: v for k, v in batch.items() if k != "labels"}
        if name == "llama":  # a sample by itself begins at position 0
            given["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        return model(**given)

    found, expected = both(model, sites, padded(side), forward=forward)
    require_equal(found, expected, sites)
