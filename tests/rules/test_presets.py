"""The presets against the module names of well-known models."""

from __future__ import annotations

import pytest

import fxcompress
from fxcompress.pipeline.request import Request
from fxcompress.pipeline.survey import survey
from fxcompress.progress import stages
from fxcompress.rules import load_rules, match_rules, preset_names, run_cases
from tests.rules.graphs import embedding, linear
from tests.zoo import ZOO

DECODER = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.31.mlp.down_proj",
    "model.language_model.layers.0.mlp.gate_proj",
    "layers.0.self_attn.q_proj",
    "transformer.h.0.attn.c_attn",
    "h.11.mlp.c_fc",
    "transformer.blocks.0.ffn.up_proj",
    "gpt_neox.layers.0.attention.query_key_value",
    "gpt_neox.layers.0.mlp.dense_h_to_4h",
    "model.decoder.layers.0.fc1",
    "decoder.block.0.layer.0.SelfAttention.q",
    "transformer.h.0.self_attention.dense",
    "bert.encoder.layer.0.attention.self.query",
    "decoder.roberta.encoder.layer.11.output.dense",
]
NOT_DECODER = [
    "lm_head",
    "model.lm_head",
    "embed_out",
    "score",
    "model.decoder.project_in",
    "model.layers.0.mlp.gate",
    "model.encoder.layers.0.fc1",
    "encoder.block.0.layer.0.SelfAttention.q",
    "model.vision_tower.encoder.layers.0.mlp.fc1",
    "visual.blocks.0.attn.qkv",
]
ENCODER = [
    "bert.encoder.layer.0.attention.self.query",
    "encoder.layer.0.attention.output.dense",
    "roberta.encoder.layer.11.output.dense",
    "distilbert.transformer.layer.0.attention.q_lin",
    "encoder.albert_layer_groups.0.albert_layers.0.ffn",
    "vit.encoder.layer.0.attention.attention.query",
    "vit.layers.0.attention.q_proj",
    "layers.0.attention.q_proj",
    "swin.encoder.layers.0.blocks.0.attention.self.query",
    "vision_model.encoder.layers.0.self_attn.q_proj",
    "text_model.encoder.layers.0.mlp.fc1",
    "wav2vec2.encoder.layers.0.attention.k_proj",
    "model.encoder.layers.0.fc1",
    "encoder.block.0.layer.1.DenseReluDense.wi",
    "blocks.0.attn.qkv",
    "model.layers.0.attn.Wqkv",
]
NOT_ENCODER = [
    "bert.pooler.dense",
    "pooler.dense",
    "classifier",
    "classifier.dense",
    "classifier.out_proj",
    "head",
    "cls.predictions.transform.dense",
    "qa_outputs",
    "visual_projection",
    "lm_head",
    "model.decoder.layers.0.fc1",
    "decoder.block.0.layer.0.SelfAttention.q",
]


def matched(preset: str, paths: list[str]) -> list[str]:
    operators = [linear(path) for path in paths]
    result = match_rules(load_rules(preset), operators, lambda operator: None)
    result.check()
    return [found.path for found in result.matches]


@pytest.mark.parametrize(
    ("preset", "wanted", "others"),
    [
        ("decoder", DECODER, NOT_DECODER),
        ("encoder", ENCODER, NOT_ENCODER),
        ("every-linear", DECODER + NOT_ENCODER, []),
    ],
)
def test_names(preset: str, wanted: list[str], others: list[str]) -> None:
    paths = list(dict.fromkeys(wanted + others))
    assert matched(preset, paths) == list(dict.fromkeys(wanted))


@pytest.mark.parametrize("preset", ["decoder", "encoder", "every-linear"])
def test_what_is_tied_to_the_embedding_stays(preset: str) -> None:
    tied = linear("model.layers.0.fc", weight="embed.weight")
    operators = [embedding("embed"), tied, linear("model.layers.1.fc")]
    result = match_rules(load_rules(preset), operators, lambda operator: None)
    assert [found.path for found in result.matches] == ["model.layers.1.fc"]


def test_a_bare_encoder_gives_no_warning() -> None:
    operators = [linear("encoder.layer.0.attention.self.query")]
    assert not match_rules(load_rules("encoder"), operators, lambda operator: None).problems


def test_forms() -> None:
    operators = [linear("model.layers.0.fc")]
    forms = {
        preset: match_rules(load_rules(preset), operators, lambda operator: None).matches[0].forms
        for preset in ("decoder", "encoder", "every-linear")
    }
    assert forms == {
        "decoder": ("narrow", "pivoted"),
        "encoder": ("narrow", "pivoted"),
        "every-linear": ("pivoted", "low_rank"),
    }


def test_convolutions_are_narrowed_inside_of_blocks() -> None:
    case = ZOO["resnet"]
    explained = fxcompress.explain(case.build(), "convolutional", case.batch())
    refused = [each for rule in explained.rules for each in rule.without]
    assert all("narrow: " in each.reason for each in refused)
    layers = {path.rpartition(".")[2] for each in refused for path, _ in each.paths}
    assert layers == {"conv1", "0"}  # what reads the residual stream; conv2 reads a hidden value


@pytest.mark.parametrize("preset", preset_names())
def test_the_tests_that_a_preset_carries(preset: str) -> None:
    results = run_cases(load_rules(preset))
    assert results
    assert not [str(result) for result in results if not result.passed]


# Two blocks each, so that the numbers can be counted by hand: 2 x (q, k, v), 2 x (gate, up) ...
REAL = [
    ("llama", "decoder", {"attention-inputs": 6, "gate-and-up": 4, "decoder-linears": 4}),
    ("gemma", "decoder", {"attention-inputs": 6, "gate-and-up": 4, "decoder-linears": 4}),
    ("gpt2", "decoder", {"attention-inputs": 0, "gate-and-up": 0, "decoder-linears": 8}),
    # The decoder's own attention, and keys and values of the encoder's output.
    ("t5", "decoder", {"attention-inputs": 10, "gate-and-up": 0, "decoder-linears": 10}),
    ("vit", "vision-transformer", {"attention-inputs": 6, "feed-forward": 2, "encoder-linears": 2}),
    (
        "clip",
        "vision-transformer",
        {"attention-inputs": 6, "feed-forward": 2, "encoder-linears": 2},
    ),
    ("bert", "encoder", {"heads-stay": 2, "encoder-linears": 12}),
    ("wav2vec2", "speech", {"ends-stay": 2, "attention-inputs": 6, "stack-linears": 6}),
    ("resnet", "convolutional", {"stem-stays": 1, "head-stays": 1, "kernels": 16, "pointwise": 3}),
    ("convnext", "convolutional", {"stem-stays": 1, "kernels": 3, "depthwise": 4, "linears": 8}),
    ("whisper", "speech", {"attention-inputs": 16, "stack-linears": 16}),
]


@pytest.mark.parametrize(("name", "preset", "counts"), REAL)
def test_real_models(name: str, preset: str, counts: dict[str, int]) -> None:
    case = ZOO[name]
    explained = fxcompress.explain(case.build(), preset, case.batch())
    assert not explained.problems
    found = {rule.rule_id: rule.funnel["kept"] for rule in explained.rules}
    assert {rule: found[rule] for rule in counts} == counts


@pytest.mark.parametrize(
    ("name", "preset", "count"),
    [
        ("llama", "decoder", 2),
        ("gpt2", "decoder", 2),
        ("bert", "encoder", 2),
        ("roberta", "encoder", 2),
        ("t5", "encoder", 2),
        ("vit", "vision-transformer", 2),
        ("swin", "vision-transformer", 4),
        ("clip", "vision-transformer", 2),
        ("wav2vec2", "speech", 2),
        ("whisper", "speech", 4),
    ],
)
def test_feed_forward_blocks_can_become_narrower(name: str, preset: str, count: int) -> None:
    case = ZOO[name]
    model = case.build().eval()
    with stages(False) as silent:
        found, *_ = survey(model, load_rules(preset), Request(silent, [case.batch()]))
    hidden = [group for group in found.groups if group.hidden]
    assert len(hidden) == count
    assert all({*group.forms} == {"narrow"} for group in hidden)
