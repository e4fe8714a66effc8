"""The recorder's facts, checked against ``torch.export`` and against counts by hand."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import pytest
import torch
from torch import nn

from fxcompress.graph.recorder import record
from tests.zoo import ZOO, Case

Groups = set[frozenset[str]]


def shared_inputs_by_export(case: Case) -> Groups:
    """Linear layers that ``torch.export`` applies to one node."""
    model = case.build()
    for module in model.modules():
        if hasattr(module, "config"):
            module.config.use_cache = False  # a cache cannot be exported
    exported = torch.export.export(model, (), case.batch(), strict=False)
    parameters = exported.graph_signature.inputs_to_parameters
    readers = defaultdict(set)
    for node in exported.graph.nodes:
        if node.target is torch.ops.aten.linear.default:
            readers[node.args[0].name].add(parameters[node.args[1].name])
    return _several(readers.values())


def shared_inputs_by_recording(case: Case) -> Groups:
    recording = record(case.build(), [case.batch()])
    linear = {operator.weight for operator in recording.operators if operator.op == "linear"}
    readers = defaultdict(set)
    for name, facts in recording.weights.items():
        if name in linear:
            readers[facts.source].add(name)
    return _several(readers.values())


def _several(groups: Iterable[set[str]]) -> Groups:
    return {frozenset(group) for group in groups if len(group) > 1}


@pytest.mark.parametrize("name", ["llama", "qwen3", "bert", "vit", "whisper", "t5"])
def test_attention_shares_its_inputs(name: str) -> None:
    groups = shared_inputs_by_recording(ZOO[name])
    assert groups == shared_inputs_by_export(ZOO[name])
    assert groups


@pytest.mark.parametrize("name", ["sequential", "loop", "unet_head", "lstm"])
def test_plain_layers_share_nothing(name: str) -> None:
    assert shared_inputs_by_recording(ZOO[name]) == shared_inputs_by_export(ZOO[name]) == set()


def test_llama_shares_what_a_reader_of_its_code_would_say() -> None:
    layer = "model.layers.{}.{}_proj.weight"
    wanted = set()
    for index in range(2):
        attention = [f"self_attn.{part}" for part in "qkv"]
        for group in (attention, ["mlp.gate", "mlp.up"]):
            wanted.add(frozenset(layer.format(index, part) for part in group))
    assert shared_inputs_by_recording(ZOO["llama"]) == wanted


def test_macs_and_rows_of_a_small_network_by_hand() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    recording = record(model, [torch.randn(5, 7, 8)])
    assert recording.macs == 5 * 7 * (8 * 16 + 16 * 3)
    assert recording.weights["0.weight"].rows == recording.weights["2.weight"].rows == 35


def test_samples_are_rows_that_the_layer_met() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    x = torch.randn(5, 7, 8)
    recording = record(model, [x])
    rows = model[:2](x).detach().reshape(-1, 16)
    samples = recording.samples["2.weight"]
    assert 1 <= len(samples) <= 32
    assert all(any(torch.equal(sample, row) for row in rows) for sample in samples)
