"""Experts of Hugging Face's mixtures, whose weights are stacks of matrices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxcompress
from fxcompress.operators.stacked import Stack
from fxcompress.rules import parse_rules
from tests.full_rank import rewrite
from tests.moe import STACKED, mixture, tokens


def compressed(model: nn.Module, keep: float = 0.5, **options: Any) -> nn.Module:
    return fxcompress.compile(model, "decoder", tokens(), keep=keep, progress=False, **options)


def count(model: nn.Module, within: str = "") -> int:
    return sum(p.numel() for name, p in model.named_parameters() if within in name)


def eager(name: str) -> dict[str, str]:
    # Grouped products are not there in float64.
    return {} if name == "Llama4Text" else {"experts_implementation": "eager"}


@pytest.mark.parametrize("form", ["low_rank", "pivoted"])
@pytest.mark.parametrize("name", STACKED)
def test_at_full_rank_nothing_changes(name: str, form: str) -> None:
    model = mixture(name, **eager(name)).double()
    (batch,) = tokens(1)
    made = rewrite(model, batch, form)
    experts = [site for site in made.sites if ".experts." in site.name]
    biases = count(model, "proj_bias")
    whole = count(model, ".experts.") - biases
    # Each of them that the batch reached: all of it but one expert of one layer at most.
    assert whole * 3 / 4 < sum(site.shape.weights for site in experts) <= whole
    with torch.no_grad():
        torch.testing.assert_close(
            made.model(**batch).logits, model(**batch).logits, rtol=1e-9, atol=1e-9
        )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", STACKED)
def test_half_of_a_mixture_is_half_of_it(name: str, tmp_path: Path) -> None:
    model = mixture(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    implementation = model.config._experts_implementation  # type: ignore[union-attr]
    small: Any = compressed(model)
    plan = fxcompress.plan_of(small)
    assert type(small) is type(model)
    assert plan.budget.cost <= plan.budget.limit
    assert plan.model_after.parameters == count(small)
    left = count(model) - sum(site.before.parameters for site in plan.sites)
    assert count(small) - left <= 0.5 * (count(model) - left)
    assert count(small, ".experts.") < 0.62 * count(model, ".experts.")
    # The given model is as it was, and the result has memory of its own.
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.config._experts_implementation == implementation  # type: ignore[union-attr]
    assert small.config._experts_implementation == implementation
    mine, its = ({p.untyped_storage().data_ptr() for p in m.parameters()} for m in (small, model))
    assert not mine & its
    prompt = tokens(1)[0]["input_ids"][:1, :5]
    said = small.generate(prompt, max_new_tokens=5, do_sample=False)
    (batch,) = tokens(1)
    with torch.no_grad():
        logits = small(**batch).logits
        fxcompress.save(small, tmp_path / "own")
        again: Any = fxcompress.load(tmp_path / "own")
        torch.testing.assert_close(again(**batch).logits, logits, rtol=0, atol=0)
        small.save_pretrained(tmp_path / "hf")
        again = type(model).from_pretrained(tmp_path / "hf")  # type: ignore[attr-defined]
        torch.testing.assert_close(again(**batch).logits, logits, rtol=0, atol=0)
    assert torch.equal(again.generate(prompt, max_new_tokens=5, do_sample=False), said)


@pytest.mark.filterwarnings("ignore")
def test_a_saved_mixture_is_not_taken_for_a_dense_one(tmp_path: Path) -> None:
    model = mixture("Mixtral")
    small: Any = compressed(model)
    small.save_pretrained(tmp_path)
    # As it is read where nothing is known of the method that the configuration names.
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(RuntimeError, match="mismatch"):
        type(model).from_pretrained(tmp_path)  # type: ignore[attr-defined]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_the_implementation_of_experts_makes_no_difference(implementation: str) -> None:
    wanted = fxcompress.plan(mixture("Mixtral"), "decoder", tokens(), keep=0.5, progress=False)
    model = mixture("Mixtral", experts_implementation=implementation)
    found = fxcompress.plan(model, "decoder", tokens(), keep=0.5, progress=False)
    assert [(s.name, s.form, s.rank) for s in found.sites] == [
        (s.name, s.form, s.rank) for s in wanted.sites
    ]


@pytest.mark.filterwarnings("ignore")
def test_in_place_the_dense_stack_is_given_back() -> None:
    model = mixture("Mixtral")
    assert compressed(model, inplace=True) is model
    stacks = [module for module in model.modules() if isinstance(module, Stack)]
    assert len(stacks) == 4
    for stack in stacks:
        for parameter in stack.parameters():
            assert parameter.untyped_storage().nbytes() == parameter.nbytes


@pytest.mark.filterwarnings("ignore")
def test_experts_that_no_rule_is_about_stay_a_stack() -> None:
    model = mixture("Mixtral")
    attention = parse_rules(
        "version: 1\nbudget: {keep: 0.7}\nrules:\n  - id: a\n"
        '    match: {node: {op: linear, name: "*.self_attn.*"}}\n    rewrite: {form: pivoted}\n',
        "a.yaml",
    )
    small = fxcompress.compile(model, attention, tokens(), progress=False)
    assert not [module for module in small.modules() if isinstance(module, Stack)]
    experts: Any = small.get_submodule("model.layers.0.mlp.experts")
    assert experts.gate_up_proj.shape == (4, 48, 32)
    assert experts.config is small.config
