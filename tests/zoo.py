"""Small models of many architectures, with random weights, and inputs for them.

>>> case = ZOO["llama"]
>>> model = case.build()          # seeded: the same weights every time
>>> output = model(**case.batch())
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

Batch = dict[str, Tensor]

VOCABULARY = 128
WIDTH = 64


@dataclass(frozen=True)
class Case:
    """One model.

    Attributes:
        name: what tests call it.
        make: builds it with random weights.
        inputs: ``inputs(batch size, length)``; the length of an image is that of its side.
        sites: linear layers that can be rewritten, counted by hand.
        sizes: batch size and length to record on, and others to run on.
        generates: has ``generate``.
        single: computes in float32 inside (norms, rotary angles, routers), whatever its type.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int, int], Batch]
    sites: int
    sizes: tuple[tuple[int, int], tuple[int, int]] = ((2, 12), (3, 9))
    generates: bool = False
    single: bool = False

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        return self.make().eval()

    def batch(self, dtype: torch.dtype = torch.float32) -> Batch:
        """Inputs of the size that models are recorded on."""
        return self._inputs(self.sizes[0], dtype)

    def other_batch(self, dtype: torch.dtype = torch.float32) -> Batch:
        """Inputs with another batch size and, where the model allows it, length."""
        return self._inputs(self.sizes[1], dtype)

    def _inputs(self, size: tuple[int, int], dtype: torch.dtype) -> Batch:
        torch.manual_seed(1)
        batch = self.inputs(*size)
        return {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}


ZOO: dict[str, Case] = {}


def add(name: str, make: Callable[[], nn.Module], inputs: Any, sites: int, **facts: Any) -> None:
    ZOO[name] = Case(name, make, inputs, sites, **facts)


def tensors(output: Any) -> list[Tensor]:
    """All tensors of a model's output, caches excepted."""
    if isinstance(output, transformers.utils.ModelOutput):
        output = {k: v for k, v in output.items() if k != "past_key_values"}
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


# ---- inputs ---------------------------------------------------------------------------


def text(batch: int, length: int) -> Batch:
    return {
        "input_ids": torch.randint(3, VOCABULARY, (batch, length)),
        "attention_mask": torch.ones(batch, length, dtype=torch.long),
    }


def ids(batch: int, length: int) -> Batch:
    return {"input_ids": torch.randint(3, VOCABULARY, (batch, length))}


def image(batch: int, side: int) -> Batch:
    return {"pixel_values": torch.randn(batch, 3, side, side)}


def features(batch: int, length: int) -> Batch:
    return {"x": torch.randn(batch, length, WIDTH)}


def picture(batch: int, side: int) -> Batch:
    return {"x": torch.randn(batch, 3, side, side)}


def translation(batch: int, length: int) -> Batch:
    return {**text(batch, length), "decoder_input_ids": ids(batch, length // 2)["input_ids"]}


def speech(batch: int, length: int) -> Batch:
    return {
        "input_features": torch.randn(batch, 8, 60),
        "decoder_input_ids": ids(batch, length)["input_ids"],
    }


def captioned(batch: int, length: int) -> Batch:
    return {**text(batch, length), **image(batch, 32)}


# ---- Hugging Face: decoders -----------------------------------------------------------

DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def decoder(name: str, config: type, sites: int, **options: Any) -> None:
    def make() -> nn.Module:
        # Grouped matrix products of experts are not there in float64.
        given = {key: value for key, value in {**DECODER, **options}.items() if value is not None}
        built = config(**given, experts_implementation="eager")
        return transformers.AutoModelForCausalLM.from_config(built)

    add(name, make, text, sites, generates=True, single=True)


# Two layers of q, k, v, o, gate, up, down, and an untied head.
decoder("llama", transformers.LlamaConfig, 15)
decoder("qwen3", transformers.Qwen3Config, 15)
decoder("mistral", transformers.MistralConfig, 15, sliding_window=8)
# Falcon's layers spell their product out; its head is tied.
decoder("falcon", transformers.FalconConfig, 8, head_dim=None)
# Gemma ties its head to the embedding.
decoder("gemma", transformers.GemmaConfig, 14)
# Of four experts in each layer, slices of two parameters; the router is a bare parameter.
decoder("mixtral", transformers.MixtralConfig, 27, num_local_experts=4, num_experts_per_tok=2)
decoder(
    "qwen2_moe",
    transformers.Qwen2MoeConfig,
    35,  # and a shared expert of three layers with a gate, in both layers
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    shared_expert_intermediate_size=48,
)


def _gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=2, n_head=4, n_positions=64,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def _mamba() -> nn.Module:
    config = transformers.MambaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=2, state_size=8,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return transformers.MambaForCausalLM(config)


add("gpt2", _gpt2, text, 8, generates=True)
# Of in, x, dt and out projection, dt_proj.weight is read by the mixer itself.
add("mamba", _mamba, text, 6, generates=True, single=True)

# ---- Hugging Face: encoders and the rest ----------------------------------------------

ENCODER = {
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
LANGUAGE = {**ENCODER, "vocab_size": VOCABULARY, "max_position_embeddings": 64, "num_labels": 3}
STAGES = {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 48, 64], "num_labels": 3}


def _bert() -> nn.Module:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**LANGUAGE))


def _roberta() -> nn.Module:
    return transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**LANGUAGE))


def _vit() -> nn.Module:
    config = transformers.ViTConfig(**ENCODER, image_size=32, patch_size=8, num_labels=3)
    return transformers.ViTForImageClassification(config)


def _swin() -> nn.Module:
    config = transformers.SwinConfig(
        image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4],
        window_size=4, num_labels=3,
    )  # fmt: skip
    return transformers.SwinForImageClassification(config)


def _convnext() -> nn.Module:
    return transformers.ConvNextForImageClassification(transformers.ConvNextConfig(**STAGES))


def _segformer() -> nn.Module:
    config = transformers.SegformerConfig(
        **STAGES, num_attention_heads=[1, 2, 2, 4], decoder_hidden_size=32
    )
    return transformers.SegformerForSemanticSegmentation(config)


def _whisper() -> nn.Module:
    config = transformers.WhisperConfig(
        vocab_size=VOCABULARY, num_mel_bins=8, d_model=WIDTH, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=96,
        decoder_ffn_dim=96, max_source_positions=30, max_target_positions=32, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, suppress_tokens=None,
        begin_suppress_tokens=None,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config)


def _t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=WIDTH, d_kv=16, d_ff=96, num_layers=2, num_heads=4,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def _clip() -> nn.Module:
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.CLIPConfig(
        text_config={**ENCODER, **special, "vocab_size": VOCABULARY, "max_position_embeddings": 64},
        vision_config={**ENCODER, "image_size": 32, "patch_size": 8},
        projection_dim=32,
    )
    return transformers.CLIPModel(config)


def _wav2vec2() -> nn.Module:
    config = transformers.Wav2Vec2Config(
        **ENCODER, vocab_size=32, conv_dim=(16, 16, 16), conv_stride=(5, 2, 2),
        conv_kernel=(10, 3, 3), num_feat_extract_layers=3, num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
    )  # fmt: skip
    return transformers.Wav2Vec2ForCTC(config)


def _wave(batch: int, length: int) -> Batch:
    return {"input_values": torch.randn(batch, length)}


IMAGES = ((2, 32), (3, 32))
add("bert", _bert, text, 14)  # q, k, v, o, up, down twice; pooler, classifier
add("roberta", _roberta, text, 14)
add("vit", _vit, image, 13, sizes=IMAGES)
add("swin", _swin, image, 26, sizes=IMAGES)
add("convnext", _convnext, image, 9, sizes=((2, 32), (3, 48)))
add("segformer", _segformer, image, 28, sizes=((2, 64), (3, 96)))
add("whisper", _whisper, speech, 32, sizes=((2, 6), (3, 4)), generates=True)
add("t5", _t5, translation, 32, generates=True, single=True)
add("clip", _clip, captioned, 26)
add("wav2vec2", _wav2vec2, _wave, 14, sizes=((2, 1600), (3, 1200)))


# ---- plain torch ----------------------------------------------------------------------


def _transformer_encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 96, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


def _sequence(batch: int, length: int) -> Batch:
    return {"src": torch.randn(batch, length, WIDTH)}


def _padded_sequence(batch: int, length: int) -> Batch:
    padding = torch.zeros(batch, length, dtype=torch.bool)
    padding[0, -4:] = True
    return {**_sequence(batch, length), "src_key_padding_mask": padding}


class Attention(nn.Module):
    """``nn.MultiheadAttention`` as a part of something."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attention(x, x, x)[0])


class Recurrent(nn.Module):
    """An LSTM, whose weights stay, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, WIDTH, 2, batch_first=True)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(x)[0])


class Residual(nn.Module):
    """Two 3x3 convolutions around a shortcut, with in-place activations."""

    def __init__(self, n: int, m: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n, m, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(m)
        self.conv2 = nn.Conv2d(m, m, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(m)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module | None = None
        if stride != 1 or n != m:
            conv = nn.Conv2d(n, m, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(m))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        y += x if self.shortcut is None else self.shortcut(x)
        return self.relu(y)


class ResNet(nn.Module):
    """Eight residual blocks and a linear head."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width),
            nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1),
        )  # fmt: skip
        n = width
        for stage, (m, stride) in enumerate(
            zip((width, 2 * width, 4 * width, 8 * width), (1, 2, 2, 2), strict=True), 1
        ):
            blocks = nn.Sequential(Residual(n, m, stride), Residual(m, m, 1))
            self.add_module(f"layer{stage}", blocks)
            n = m
        self.fc = nn.Linear(n, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.stem(x)))))
        return self.fc(x.mean((2, 3)))


def _double(n: int, m: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(n, m, 3, 1, 1), nn.ReLU(), nn.Conv2d(m, m, 3, 1, 1), nn.ReLU())


class UNet(nn.Module):
    """Two levels, a 1x1 convolution at the end, and nothing linear unless ``classes``."""

    def __init__(self, width: int = 16, classes: int | None = None) -> None:
        super().__init__()
        self.down1 = _double(3, width)
        self.down2 = _double(width, 2 * width)
        self.bottom = _double(2 * width, 4 * width)
        self.pool = nn.MaxPool2d(2)
        self.up2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2)
        self.up1 = nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.merge2 = _double(4 * width, 2 * width)
        self.merge1 = _double(2 * width, width)
        self.out = nn.Conv2d(width, 2, 1)
        self.head = None if classes is None else nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Any:
        a = self.down1(x)
        b = self.down2(self.pool(a))
        c = self.bottom(self.pool(b))
        b = self.merge2(torch.cat([b, self.up2(c)], 1))
        a = self.merge1(torch.cat([a, self.up1(b)], 1))
        mask = self.out(a)
        return mask if self.head is None else (mask, self.head(c.mean((2, 3))))


class Branching(nn.Module):
    """Which layer runs depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.positive, self.negative = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.positive(x) if bool(x.sum() > 0) else self.negative(x)


class Twice(nn.Module):
    """One linear layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.relu(self.linear(x))) + self.norm(x)


class Tied(nn.Module):
    """A head that is tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(torch.relu(self.linear(self.embedding(input_ids))))


class Loop(nn.Module):
    """Layers of an ``nn.ModuleList``, run in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            x = layer(x)
            x = torch.relu(x) if index % 2 else x
        return x


class Functional(nn.Module):
    """``F.linear`` on a bare parameter, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) * 0.1)
        self.bias = nn.Parameter(torch.zeros(WIDTH))
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(F.linear(x, self.weight, self.bias)))


class Einsum(nn.Module):
    """An einsum with a bare parameter, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.Parameter(torch.randn(WIDTH, 4, 16) * 0.1)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.einsum("bsd,dhk->bshk", x, self.heads).flatten(2))


class Sequential(nn.Sequential):
    """Whose argument is called ``x``, as everywhere here."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def _sequential() -> nn.Module:
    return Sequential(nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 48))


add("transformer_encoder", _transformer_encoder, _sequence, 12)
add("transformer_encoder_padded", _transformer_encoder, _padded_sequence, 12)
add("attention", Attention, features, 5)
add("lstm", Recurrent, features, 1)
add("resnet", ResNet, picture, 1, sizes=((2, 32), (3, 48)))
add("unet", UNet, picture, 0, sizes=((2, 16), (3, 24)))
add("unet_head", lambda: UNet(classes=5), picture, 1, sizes=((2, 16), (3, 24)))
add("branching", Branching, features, 2)
add("twice", Twice, features, 1)
add("tied", Tied, ids, 1)
add("loop", Loop, features, 4)
add("functional", Functional, features, 2)
add("einsum", Einsum, features, 1)
add("sequential", _sequential, features, 3)
