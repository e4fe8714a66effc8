"""Plain checkpoints: what is saved is loaded where this package is not, and means the same."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import nn

import fxcompress
from fxcompress import LoadError, SaveError
from fxcompress.rules import LoadedRules, parse_rules

FOREIGN = """
import sys
sys.modules["fxcompress"] = None  # any import of it fails
import torch, transformers
for case in sys.argv[1:]:
    name, batch = torch.load(f"{case}.pt")
    model = getattr(transformers, name).from_pretrained(case)
    with torch.no_grad():
        values = model(**batch)[0]
    made = None
    if "generate" in dir(model) and "input_ids" in batch and model.can_generate():
        ids = batch["input_ids"][:2, :4]
        made = model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    count = sum(parameter.numel() for parameter in model.parameters())
    torch.save((type(model).__name__, count, values, made), f"{case}.out.pt")
"""
"""Loads checkpoints and runs them, without this package."""


def rules(
    keep: float, *names: str, form: str = "narrow", group: str = "widths", multiple_of: int = 1
) -> LoadedRules:
    """Of every name a group of its own."""
    text = f"version: 1\nbudget: {{keep: {keep}}}\nmetric: {{kind: activation}}\nrules:\n"
    for at, name in enumerate(names):
        own = f", group: {group}{at}" if group else ""
        text += (
            f"  - id: rule{at}\n    match: {{node: {{op: linear, name: '{name}'}}}}\n"
            f"    rewrite: {{form: {form}, multiple_of: {multiple_of}{own}}}\n"
        )
    return parse_rules(text, "plain.yaml")


SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXT = {**SIZES, "vocab_size": 64, "intermediate_size": 96, "max_position_embeddings": 32}
IMAGES = {**SIZES, "image_size": 16, "patch_size": 8, "num_channels": 3, "num_labels": 5}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def tokens() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"input_ids": torch.randint(3, 64, (4, 12), generator=generator)}


def images() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))}


def both() -> dict[str, torch.Tensor]:
    given = tokens()["input_ids"]
    return {"input_ids": given, "decoder_input_ids": given.flip(1)[:, :6]}


def speech() -> dict[str, torch.Tensor]:
    features = torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(1))
    return {"input_features": features, "decoder_input_ids": torch.tensor([[1, 5, 7]] * 2)}


def llama(**more: Any) -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**TEXT, **more}))


def opt() -> nn.Module:
    config = transformers.OPTConfig(**{**TEXT, "ffn_dim": 96, "word_embed_proj_dim": 32})
    return transformers.OPTForCausalLM(config)


def gpt2(n_inner: int | None = None) -> nn.Module:
    config = transformers.GPT2Config(
        n_embd=32, n_layer=3, n_head=4, vocab_size=64, n_positions=32, n_inner=n_inner, **SPECIAL
    )
    return transformers.GPT2LMHeadModel(config)


def bert() -> nn.Module:
    return transformers.BertForMaskedLM(transformers.BertConfig(**TEXT))


def vit() -> nn.Module:
    config = transformers.ViTConfig(**{**IMAGES, "intermediate_size": 96})
    return transformers.ViTForImageClassification(config)


def swin() -> nn.Module:
    """Its config has a ratio in place of a width."""
    config = transformers.SwinConfig(
        image_size=16, patch_size=4, embed_dim=24, depths=[2], num_heads=[2], window_size=2,
        mlp_ratio=3.0, num_labels=5,
    )  # fmt: skip
    return transformers.SwinForImageClassification(config)


def dinov2() -> nn.Module:
    """The ratio is a whole number."""
    return transformers.Dinov2ForImageClassification(
        transformers.Dinov2Config(**{**IMAGES, "mlp_ratio": 3})
    )


def t5() -> nn.Module:
    config = transformers.T5Config(
        d_model=32, d_ff=96, d_kv=8, num_heads=4, num_layers=2, vocab_size=64, **SPECIAL
    )
    return transformers.T5ForConditionalGeneration(config)


def whisper() -> nn.Module:
    config = transformers.WhisperConfig(
        d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=96, decoder_ffn_dim=64,
        encoder_attention_heads=4, decoder_attention_heads=4, vocab_size=64, num_mel_bins=8,
        max_source_positions=20, max_target_positions=16, decoder_start_token_id=1, **SPECIAL,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config)


Case = tuple[Callable[[], nn.Module], Callable[[], dict[str, torch.Tensor]], tuple[str, ...]]
CASES: dict[str, Case] = {
    "intermediate_size": (llama, tokens, ("*.down_proj",)),
    "ffn_dim": (opt, tokens, ("*.fc2",)),
    "n_inner": (gpt2, tokens, ("*.mlp.c_proj",)),
    "bert": (bert, tokens, ("*.layer.[0-9].output.dense",)),
    "vit": (vit, images, ("*.{fc2,output.dense}",)),
    "mlp_ratio": (swin, images, ("*.fc2",)),
    "d_ff": (t5, both, ("*.wo",)),
    "two widths": (whisper, speech, ("*.encoder.*.fc2", "*.decoder.*.fc2")),
}


def compressed(make: Callable[[], nn.Module], batch: Any, given: LoadedRules) -> Any:
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():  # so that layers differ in what they lose
        for at, parameter in enumerate(model.parameters()):
            parameter.mul_(1 + at % 5 / 5)
    return fxcompress.compile(model, given, [batch, batch])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path, Any]]:
    """For every case the compressed model, its plain checkpoint and what the others make of it."""
    place = tmp_path_factory.mktemp("plain")
    models = {}
    for case, (make, data, names) in CASES.items():
        models[case] = compressed(make, data(), rules(0.6, *names))
        fxcompress.save(models[case], place / case, plain=True)
        torch.save((type(models[case]).__name__, data()), place / f"{case}.pt")
    done = subprocess.run(
        [sys.executable, "-c", FOREIGN, *(str(place / case) for case in CASES)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {
        case: (model, place / case, torch.load(place / f"{case}.out.pt"))
        for case, model in models.items()
    }


@pytest.mark.parametrize("case", CASES)
def test_it_loads_without_this_package(case: str, saved: dict[str, tuple[Any, Path, Any]]) -> None:
    small, _, (name, count, values, made) = saved[case]
    assert {site.form for site in fxcompress.plan_of(small).sites} == {"narrow"}
    batch = CASES[case][1]()
    assert (name, count) == (type(small).__name__, sum(p.numel() for p in small.parameters()))
    with torch.no_grad():
        torch.testing.assert_close(values, small(**batch)[0], rtol=1e-5, atol=1e-5)
    if made is not None:
        ids = batch["input_ids"][:2, :4]
        own = small.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        assert torch.equal(made, own)


@pytest.mark.parametrize("case", CASES)
def test_it_has_the_layout_of_its_class(
    case: str, saved: dict[str, tuple[Any, Path, Any]], tmp_path: Path
) -> None:
    """Names and shapes of the weights are those that a dense model of that config saves.

    Converters and inference engines read nothing else.
    """
    small, directory, _ = saved[case]
    assert "plan.json" not in [each.name for each in directory.iterdir()]
    assert "fxcompress" not in (directory / "config.json").read_text()
    kind: Any = type(small)
    kind(kind.config_class.from_pretrained(directory)).save_pretrained(tmp_path)
    assert _layout(directory) == _layout(tmp_path)
    configs = [json.loads((each / "config.json").read_text()) for each in (directory, tmp_path)]
    assert configs[0] == configs[1]


def _layout(directory: Path) -> dict[str, tuple[list[int], str]]:
    found = {}
    for each in directory.glob("*.safetensors"):
        with safe_open(each, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                found[name] = (part.get_shape(), part.get_dtype())
    return found


def test_the_config_says_the_width(tmp_path: Path) -> None:
    small = compressed(llama, tokens(), rules(0.6, "*.down_proj"))
    width = small.model.layers[0].mlp.down_proj.in_features
    assert width < 96
    before = json.loads(json.dumps(small.config.to_dict(), default=str))
    fxcompress.save(small, tmp_path, plain=True)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert config.intermediate_size == width
    assert config.hidden_size == 32
    assert json.loads(json.dumps(small.config.to_dict(), default=str)) == before  # left alone
    assert fxcompress.plan_of(small) is not None
    fxcompress.save(small, tmp_path / "again")  # as before
    assert fxcompress.plan_of(fxcompress.load(tmp_path / "again")) == fxcompress.plan_of(small)
    sized = compressed(lambda: gpt2(96), tokens(), rules(0.6, "*.mlp.c_proj"))
    fxcompress.save(sized, tmp_path / "gpt2", plain=True)
    assert json.loads((tmp_path / "gpt2/config.json").read_text())["n_inner"] < 96


def test_a_list_of_widths(tmp_path: Path) -> None:
    """Where a config has one for every layer, they need not be equal."""
    config = transformers.Gemma3nTextConfig(
        **{**TEXT, "intermediate_size": [96, 96, 64]}, head_dim=8, num_key_value_heads=2,
        hidden_size_per_layer_input=8, vocab_size_per_layer_input=64, laurel_rank=4,
        altup_num_inputs=2, num_kv_shared_layers=0, activation_sparsity_pattern=[0.0] * 3,
        layer_types=["full_attention"] * 3, **SPECIAL,
    )  # fmt: skip
    small = compressed(
        lambda: transformers.Gemma3nForCausalLM(config),
        tokens(),
        rules(0.6, "*.down_proj", group=""),
    )
    widths = [layer.mlp.down_proj.in_features for layer in small.model.layers]
    assert len({*widths}) > 1
    fxcompress.save(small, tmp_path, plain=True)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.intermediate_size == widths
    torch.testing.assert_close(again(**tokens()).logits, small(**tokens()).logits)


def test_bfloat16_and_ties_and_settings_are_kept(tmp_path: Path) -> None:
    def made() -> nn.Module:
        config = transformers.LlamaConfig(**TEXT, tie_word_embeddings=True)
        model: Any = transformers.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
        return model  # type: ignore[no-any-return]

    small = compressed(made, tokens(), rules(0.6, "*.down_proj"))
    small.generation_config.max_length = 17
    fxcompress.save(small, tmp_path, plain=True)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == torch.bfloat16
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert again.generation_config.max_length == 17
    assert torch.equal(again(**tokens()).logits, small(**tokens()).logits)


def test_a_model_that_nothing_was_done_to(tmp_path: Path) -> None:
    small = compressed(llama, tokens(), rules(1.0, "*.down_proj"))
    fxcompress.save(small, tmp_path, plain=True)
    assert transformers.AutoConfig.from_pretrained(tmp_path).intermediate_size == 96


def test_over_another_save(tmp_path: Path) -> None:
    """Pieces of a plain checkpoint of before are gone; a save with a plan is not touched."""
    small = compressed(llama, tokens(), rules(0.6, "*.down_proj"))
    llama().save_pretrained(tmp_path / "a", max_shard_size="20KB")
    assert (tmp_path / "a/model.safetensors.index.json").exists()
    fxcompress.save(small, tmp_path / "a", plain=True)
    assert [each.name for each in (tmp_path / "a").glob("model*")] == ["model.safetensors"]
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    fxcompress.save(small, tmp_path / "b")
    with pytest.raises(SaveError, match="of a compressed model, which a plain checkpoint does not"):
        fxcompress.save(small, tmp_path / "b", plain=True)
    fxcompress.load(tmp_path / "b")


# ---- what is refused ------------------------------------------------------------------


def test_load_says_what_it_is(tmp_path: Path) -> None:
    small = compressed(llama, tokens(), rules(0.6, "*.down_proj"))
    fxcompress.save(small, tmp_path, plain=True)
    with pytest.raises(LoadError, match="holds an ordinary Hugging Face model"):
        fxcompress.load(tmp_path)


def test_unequal_widths_are_named(tmp_path: Path) -> None:
    small = compressed(llama, tokens(), rules(0.6, "*.down_proj", group=""))
    with pytest.raises(SaveError) as refused:
        fxcompress.save(small, tmp_path / "out", plain=True)
    text = str(refused.value)
    assert "LlamaConfig has one intermediate_size for layers that have several: " in text
    assert "{form: narrow, group: widths}" in text
    widths = {layer.mlp.down_proj.in_features for layer in small.model.layers}
    assert len(widths) > 1
    for width in widths:
        assert f"{width} (model.layers." in text
    assert not (tmp_path / "out").exists()


def test_one_block_that_stayed_wide(tmp_path: Path) -> None:
    small = compressed(llama, tokens(), rules(0.6, "*.{0,1}.mlp.down_proj"))
    with pytest.raises(SaveError, match=r"several: 96 \(model.layers.2"):
        fxcompress.save(small, tmp_path, plain=True)


def test_other_forms_are_named(tmp_path: Path) -> None:
    given = rules(0.6, "*.q_proj", form="low_rank", group="")
    small = compressed(llama, tokens(), given)
    with pytest.raises(SaveError, match=r"low_rank: model.layers.\{0..2\}.self_attn.q_proj"):
        fxcompress.save(small, tmp_path, plain=True)


class Stubborn(transformers.LlamaForCausalLM):
    """Its width is what it is, whatever the config says."""

    def __init__(self, config: Any) -> None:
        config.intermediate_size = 3 * config.hidden_size
        super().__init__(config)


def test_a_width_that_no_config_gives(tmp_path: Path) -> None:
    small = compressed(
        lambda: Stubborn(transformers.LlamaConfig(**TEXT)), tokens(), rules(0.6, "*.down_proj")
    )
    with pytest.raises(SaveError, match="has one hidden_size for layers that have several"):
        fxcompress.save(small, tmp_path, plain=True)


def test_a_ratio_that_is_whole(tmp_path: Path) -> None:
    small = compressed(dinov2, images(), rules(0.6, "*.fc2"))
    with pytest.raises(SaveError, match=r"a Dinov2Config takes no mlp_ratio of .*; multiple_of"):
        fxcompress.save(small, tmp_path, plain=True)
    small = compressed(dinov2, images(), rules(0.7, "*.fc2", multiple_of=32))
    fxcompress.save(small, tmp_path, plain=True)
    assert transformers.AutoConfig.from_pretrained(tmp_path).mlp_ratio == 2


def test_what_keeps_a_group_wide_is_told() -> None:
    """BERT's attention ends in a layer of the same name, which reads no hidden value."""
    with pytest.raises(fxcompress.BudgetError, match=r"narrow: its input .*more reasons"):
        compressed(bert, tokens(), rules(0.6, "*.output.dense"))


def test_a_model_of_ones_own(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 8))
    text = "version: 1\nbudget: {keep: 0.6}\nmetric: {kind: activation}\nrules:\n"
    text += "  - {id: a, match: {node: {op: linear, name: '2'}}, rewrite: {form: narrow}}\n"
    small = fxcompress.compile(model, parse_rules(text, "r.yaml"), [torch.randn(16, 8)] * 2)
    with pytest.raises(SaveError, match="Sequential is no Hugging Face model"):
        fxcompress.save(small, tmp_path, plain=True)


def test_a_changed_model_is_refused(tmp_path: Path) -> None:
    small = compressed(llama, tokens(), rules(0.6, "*.down_proj"))
    small.model.extra = nn.Linear(2, 2)
    with pytest.raises(SaveError, match=r"not what its config builds: model\.extra\.bias"):
        fxcompress.save(small, tmp_path, plain=True)
