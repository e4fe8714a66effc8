"""A padded batch and its rows one by one, unpadded, have the same statistics."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import fxcompress
from fxcompress.errors import CalibrationError
from fxcompress.forms.target import Components
from fxcompress.metric import METRICS, Calibration, calibrate
from fxcompress.metric.directions import measure_directions
from fxcompress.metric.kronecker import KroneckerMetric
from fxcompress.metric.output import divergence
from fxcompress.metric.passes import Section, Whole
from tests.metric.test_moments import Target, target
from tests.small import rules

Batch = dict[str, Any]

EVERYTHING = KroneckerMetric(
    "all", frozenset({"input", "output", "entries", "weight"}), "", lambda m: (None, None)
)
ROWS = KroneckerMetric(
    "rows", frozenset({"input", "output"}), "", lambda m: (None, None), directions=True
)
VOCABULARY, WIDTH = 40, 16


# ---- batches --------------------------------------------------------------------------


def padded(lengths: tuple[int, ...] = (5, 2, 7, 1), side: str = "right", pad: int = 0) -> Batch:
    """Sequences of some lengths; what stands at padding is ``pad``."""
    size, longest = len(lengths), max(lengths)
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, VOCABULARY, (size, longest), generator=generator)
    mask = torch.zeros(size, longest, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, slice(0, length) if side == "right" else slice(longest - length, None)] = 1
    return {"input_ids": ids * mask + pad * (1 - mask), "attention_mask": mask}


def one_by_one(batch: Batch) -> list[Batch]:
    """Every row by itself, without its padding."""
    found = []
    for row in range(len(batch["input_ids"])):
        parts = {}
        for key, value in batch.items():
            decoder = key.startswith("decoder_") and "decoder_attention_mask" in batch
            mask = batch["decoder_attention_mask" if decoder else "attention_mask"][row].bool()
            fits = value.dim() > 1 and value.shape[1] == len(mask)
            parts[key] = value[row : row + 1][:, mask] if fits else value[row : row + 1]
        found.append(parts)
    return found


def squares(output: Any, batch: Any) -> Tensor:
    """A loss without chance: half of the squares of what the model says of a position."""
    for name in ("logits", "last_hidden_state", "text_embeds"):
        if hasattr(output, name):
            output = getattr(output, name)
            break
    return 0.5 * output.square().sum(-1)


# ---- comparison -----------------------------------------------------------------------


def sites(model: nn.Module, but: tuple[str, ...] = ()) -> list[Target]:
    """All linear layers and look-ups, but those whose input is shared by all samples."""
    return [
        target(model, name)
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Embedding, nn.Conv1d)) and not name.endswith(but)
    ]


def statistics(model: nn.Module, where: list[Target], batches: list[Batch], **words: Any) -> Any:
    words = {"loss": squares, **words}
    found: list[Calibration] = [
        calibrate(model, where, batches, metric, **words) for metric in (EVERYTHING, ROWS)
    ]
    numbers = {}
    for site in where:
        for calibration in found:
            moments = calibration.moments[site.name]
            for name in ("input", "output", "weight", "entries"):
                value = getattr(moments, name)
                if value is not None:
                    numbers[site.name, name] = value
        numbers[site.name, "rows"] = torch.tensor(found[0].reach[site.name].rows)
    wanted = {}
    for site in where:
        generator = torch.Generator().manual_seed(0)
        shape = (1, site.shape.out_features, 3, 1), (1, 3, 1, site.shape.in_features)
        if not isinstance(model.get_submodule(site.name), nn.Conv1d):
            left, right = (torch.randn(s, generator=generator).double() for s in shape)
            wanted[site.name] = {"some": Components(left, right)}
    some = tuple(site for site in where if site.name in wanted)
    passes = Whole(model, batches, (Section(some),), **words)
    for (name, _), value in measure_directions(passes, wanted).items():
        numbers[name, "directions"] = value
    return numbers


def _told(key: tuple[str, str], text: str) -> str:
    return f"{key}: {text}"


def require_equal(
    model: nn.Module, batch: Batch, but: tuple[str, ...] = (), rtol: float = 1e-8, **words: Any
) -> None:
    model = model.double().eval()
    where = sites(model, but)
    assert where
    whole = statistics(model, where, [batch], **words)
    single = statistics(model, where, one_by_one(batch), **words)
    assert whole.keys() == single.keys()
    for key, value in whole.items():
        torch.testing.assert_close(
            value.double(),
            single[key].double(),
            rtol=rtol,
            atol=1e-3 * rtol,
            msg=partial(_told, key),
        )


# ---- layouts --------------------------------------------------------------------------


class Tagger(nn.Module):
    """Two layers over tokens, which a layout brings into another order and back."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layout = layout
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        width = WIDTH // 4 if layout == "heads" else WIDTH
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)
        self.head = nn.Linear(WIDTH, 6)

    def body(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x)))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        size, length, width = x.shape
        if self.layout == "samples first":
            x = self.body(x)
        elif self.layout == "flattened":
            x = self.body(x.reshape(-1, width)).view(size, length, width)
        elif self.layout == "flattened, tokens first":
            x = self.body(x.transpose(0, 1).reshape(-1, width))
            x = x.unflatten(0, (length, size)).transpose(0, 1)
        elif self.layout == "tokens first":
            x = self.body(x.permute(1, 0, 2)).transpose(0, 1)
        elif self.layout == "heads":
            heads = self.body(x.unflatten(-1, (4, -1)).transpose(1, 2))
            x = heads.transpose(1, 2).flatten(2)
        elif self.layout == "one row more":
            start = self.embed.weight[:1].expand(size, 1, width)
            x = self.body(torch.cat([start, x], 1))[:, 1:]
        elif self.layout == "picked":
            assert attention_mask is not None
            places = attention_mask.flatten().nonzero().squeeze(1)
            rows = self.body(x.flatten(0, 1).index_select(0, places))
            x = torch.zeros_like(x.flatten(0, 1)).index_copy(0, places, rows).view_as(x)
        elif self.layout == "routed":
            flat = x.reshape(-1, width)
            chosen = flat[:, 0] > 0  # some tokens go through the layers, others past them
            rows = chosen.nonzero().squeeze(1)
            out = torch.zeros_like(flat)
            out.index_add_(0, rows, self.body(flat[rows]))
            x = (flat + out).view_as(x)
        elif self.layout == "sorted":
            flat = x.reshape(-1, width)
            order = flat[:, 0].argsort()
            x = torch.empty_like(flat)
            x[order] = self.body(flat[order])
            x = x.view(size, length, width)
        return self.head(x)


LAYOUTS = (
    *("samples first", "flattened", "flattened, tokens first", "tokens first", "heads"),
    *("one row more", "picked", "routed", "sorted"),
)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, side: str) -> None:
    require_equal(Tagger(layout), padded(side=side, pad=1))


def test_as_many_samples_as_positions() -> None:
    """Only what is followed tells the two apart."""
    require_equal(Tagger("tokens first"), padded((4, 2, 3, 1)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_stands_at_padding_does_not_count(layout: str) -> None:
    """Not its values, and not even NaN."""
    model = Tagger(layout).double().eval()
    batch = padded(pad=1)
    expected = statistics(model, sites(model, ("embed",)), [batch])
    with torch.no_grad():
        model.embed.weight[1] = float("nan")
    found = statistics(model, sites(model, ("embed",)), [batch])
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, msg=partial(_told, key))


@pytest.mark.parametrize("flat", [False, True])
def test_losses_and_labels_of_real_positions_only(flat: bool) -> None:
    """Predictions that are drawn, and KL, from outputs in either layout."""

    class Model(Tagger):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            out = super().forward(input_ids, attention_mask)
            return out.flatten(0, 1) if flat else out

    model = Model("samples first").double().eval()
    batch = padded(pad=1)
    with torch.no_grad():
        model.embed.weight[1] = float("nan")
    for fisher in ("sampled", "exact"):
        drawn = fxcompress.metric.Draws(fisher=fisher)  # type: ignore[arg-type, attr-defined]
        found = calibrate(model, sites(model), [batch], METRICS["kfac"], drawn=drawn)
        assert found.predictions == int(batch["attention_mask"].sum())
        assert found.moments["up"].output is not None
        assert bool(found.moments["up"].output.isfinite().all())


# ---- architectures --------------------------------------------------------------------

DECODER = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 24,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ENCODER = {**DECODER, "max_position_embeddings": 32, "type_vocab_size": 2}
ENCODER.pop("num_key_value_heads")


def _opt(**words: Any) -> nn.Module:
    config = transformers.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, ffn_dim=24, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=32, word_embed_proj_dim=WIDTH,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, **words,
    )  # fmt: skip
    return transformers.OPTForCausalLM(config)


def _llama(**words: Any) -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER, **words))


def _mixtral() -> nn.Module:
    config = transformers.MixtralConfig(
        **DECODER, num_local_experts=3, num_experts_per_tok=2, experts_implementation="eager"
    )
    return transformers.MixtralForCausalLM(config)


def _bert(**words: Any) -> nn.Module:
    return transformers.BertForMaskedLM(transformers.BertConfig(**ENCODER, **words))


def _roberta() -> nn.Module:
    return transformers.RobertaForMaskedLM(transformers.RobertaConfig(**ENCODER))


def _classifier() -> nn.Module:
    config = transformers.BertConfig(**ENCODER, num_labels=3)
    return transformers.BertForSequenceClassification(config)


def _clip() -> nn.Module:
    config = transformers.CLIPTextConfig(**ENCODER, projection_dim=8)
    return transformers.CLIPTextModelWithProjection(config)


def _deberta() -> nn.Module:
    config = transformers.DebertaV2Config(
        **ENCODER, relative_attention=True, pos_att_type=["p2c", "c2p"], num_labels=3
    )
    return transformers.DebertaV2ForTokenClassification(config)


OWN = ("position_embeddings", "token_type_embeddings")
"""Look-ups of what a model numbers itself, not of tokens."""

MODELS: dict[str, tuple[Callable[[], nn.Module], str, tuple[str, ...]]] = {
    "bert": (_bert, "right", OWN),
    "bert, eager": (lambda: _bert(attn_implementation="eager"), "right", OWN),
    "roberta": (_roberta, "right", OWN[1:]),
    "bert, classifier": (_classifier, "right", OWN),
    "clip text": (_clip, "right", ("position_embedding",)),
    "deberta": (_deberta, "right", (*OWN, "rel_embeddings", "_proj")),
    "opt": (_opt, "right", ()),
    "opt, left": (_opt, "left", ()),
    "opt, eager": (lambda: _opt(attn_implementation="eager"), "left", ()),
    "llama": (_llama, "right", ()),
    "llama, left": (_llama, "left", ()),
    "llama, eager": (lambda: _llama(attn_implementation="eager"), "left", ()),
    "mixtral": (_mixtral, "right", ()),
    "mixtral, left": (_mixtral, "left", ()),
}


@pytest.mark.parametrize("name", MODELS)
def test_architectures(name: str) -> None:
    make, side, but = MODELS[name]
    torch.manual_seed(0)
    # Angles of positions are in float32, and those of a padded row are others.
    require_equal(make(), padded(side=side), but, 1e-5 if side == "left" else 1e-8)


def _translator(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "t5":
        config = transformers.T5Config(
            vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
            decoder_start_token_id=0, pad_token_id=0, eos_token_id=2,
        )  # fmt: skip
        return transformers.T5ForConditionalGeneration(config)
    config = transformers.BartConfig(
        vocab_size=VOCABULARY, d_model=WIDTH, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24,
        decoder_ffn_dim=24, max_position_embeddings=32, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration(config)


SHARED = ("relative_attention_bias", "embed_positions", "shared", "embed_tokens")


@pytest.mark.parametrize("kind", ["t5", "bart"])
@pytest.mark.parametrize("lengths", [(2, 6, 3), (5, 2, 7)])
def test_an_encoder_and_a_decoder_with_a_mask_each(kind: str, lengths: tuple[int, ...]) -> None:
    """Also where both are of one length."""
    inside = padded(lengths)
    batch = padded((5, 7, 2)) | {f"decoder_{key}": value for key, value in inside.items()}
    require_equal(_translator(kind), batch, SHARED)


def test_a_decoder_fed_by_labels() -> None:
    """Without a mask of its own: labels of -100 are no predictions."""
    batch = padded((5, 7, 2))
    labels = padded((2, 7, 3), pad=-100)["input_ids"]
    model = _translator("t5").double().eval()
    where = sites(model, SHARED)
    whole = statistics(model, where, [{**batch, "labels": labels}])
    single = [
        {**each, "labels": row[row != -100][None]}
        for each, row in zip(one_by_one(batch), labels, strict=True)
    ]
    for key, value in statistics(model, where, single).items():
        torch.testing.assert_close(whole[key], value, msg=partial(_told, key))


# ---- other ways to say it -------------------------------------------------------------


@pytest.mark.parametrize("batch_first", [True, False])
def test_masks_of_torch(batch_first: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            layer = nn.TransformerEncoderLayer(WIDTH, 2, 24, batch_first=batch_first)
            self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
            self.head = nn.Linear(WIDTH, 4)

        def forward(self, src: Tensor, src_key_padding_mask: Tensor) -> Tensor:
            return self.head(self.encoder(src, src_key_padding_mask=src_key_padding_mask))

    model = Model().double().eval()
    mask = ~padded((5, 2, 7))["attention_mask"].bool()
    src = torch.randn(3, 7, WIDTH, dtype=torch.float64)

    def batches(rows: list[slice], real: bool) -> list[Batch]:
        found = []
        for row in rows:
            cut = (~mask[row]).sum() if real else mask.shape[1]
            x = src[row, : int(cut)]
            x = x if batch_first else x.transpose(0, 1)
            found.append({"src": x, "src_key_padding_mask": mask[row, : int(cut)]})
        return found

    where = sites(model, ("out_proj",))
    whole = statistics(model, where, batches([slice(None)], real=False))
    single = statistics(model, where, batches([slice(i, i + 1) for i in range(3)], real=True))
    for key, value in whole.items():
        if key[1] in ("input", "output", "rows"):
            torch.testing.assert_close(single[key], value, msg=partial(_told, key))


def test_a_batch_within_a_batch() -> None:
    model = Tagger("flattened").double().eval()
    batch, where = padded(), sites(model)
    expected = statistics(model, where, [batch])
    pairs = [(batch, torch.zeros(4))]
    found = statistics(model, where, pairs, forward=lambda m, pair: m(**pair[0]))
    for key, value in expected.items():
        assert torch.equal(found[key], value)


@pytest.mark.parametrize("padding", ["same", "valid", "causal"])
def test_convolutions_over_positions(padding: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed = nn.Embedding(VOCABULARY, WIDTH)
            pads = 1 if padding == "same" else 0
            self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=pads)
            self.head = nn.Linear(WIDTH, 4)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            x = self.embed(input_ids) * attention_mask[..., None]
            x = x.transpose(1, 2)
            x = F.pad(x, (2, 0)) if padding == "causal" else x
            return self.head(self.conv(x).transpose(1, 2))

    require_equal(Model(), padded((5, 3, 7, 4)))


# ---- refused --------------------------------------------------------------------------


class Shifted(Tagger):
    """Adds to every token the one before it: which rows are padding is then a matter of taste."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        return self.head(self.body(x + x.roll(1, 1)))


class Unknown(Tagger):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.head(self.body(torch.fft.fft(self.embed(input_ids), dim=1).real))


@pytest.mark.parametrize(
    ("kind", "words"), [(Shifted, "mixed with real ones.*add"), (Unknown, "has no rule")]
)
def test_what_cannot_be_followed_is_refused(kind: Any, words: str) -> None:
    model = kind("samples first").double().eval()
    with pytest.raises(CalibrationError, match=f"which rows of the input of up.*{words}.*without"):
        calibrate(model, sites(model), [padded()], METRICS["activation"])
    # Without padding nothing has to be followed.
    calibrate(model, sites(model), one_by_one(padded()), METRICS["activation"])


def test_a_mask_of_nothing_is_refused() -> None:
    batch = padded()
    batch["input_ids"] = batch["input_ids"][:, :-1]
    model = Tagger("samples first")
    with pytest.raises(CalibrationError, match=r"attention_mask of shape .* no tensor beside it"):
        calibrate(model, sites(model), [batch], METRICS["activation"])


def test_pooled_rows_are_no_padding() -> None:
    """Attention and means mix positions: what they make counts, whatever stands first."""

    class Model(Tagger):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            assert attention_mask is not None
            x = self.embed(input_ids)
            real = attention_mask[..., None]
            pooled = (x * real).sum(1) / real.sum(1)
            return self.head(self.body(pooled))

    require_equal(Model("samples first"), padded(side="left", pad=1))


def test_attention_that_sees_nothing_spreads_no_nan() -> None:
    """Rows of a softmax of -inf are NaN, and their gradients would go to every key."""

    class Model(Tagger):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            assert attention_mask is not None
            x = self.embed(input_ids)
            n = x.shape[1]
            far = torch.zeros(n, n, dtype=x.dtype).masked_fill_(
                ~torch.ones(n, n, dtype=torch.bool).tril(), float("-inf")
            )
            unseen = torch.zeros_like(attention_mask, dtype=x.dtype)
            unseen = unseen.masked_fill(attention_mask == 0, float("-inf"))
            scores = self.body(x) @ x.transpose(1, 2) + far + unseen[:, None]
            return self.head(x + scores.softmax(-1) @ self.body(x))

    model = Model("samples first").double().eval()
    batch = padded(side="left")
    assert bool(model(**batch).isnan().any())
    require_equal(model, batch)


def test_measured_divergence_is_of_real_positions() -> None:
    """KL of outputs in a layout of their own, NaN at padding."""

    class Model(Tagger):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            return super().forward(input_ids, attention_mask).transpose(0, 1).flatten(0, 1)

    batch, model = padded((6, 4, 7), pad=1), Model("samples first")
    with torch.no_grad():
        model.embed.weight[1] = float("nan")
    small = fxcompress.compile(model, rules(0.7, name=["up", "down"]), [batch], progress=False)
    found = fxcompress.measure(model, small, [batch], progress=False)
    real = batch["attention_mask"].T.flatten().bool()
    with torch.no_grad():
        p, q = (m(**batch)[real] for m in (model, small))
    total, count = divergence(p, q)
    assert found.predictions == count
    assert found.measured == pytest.approx(total / count, rel=1e-5)
