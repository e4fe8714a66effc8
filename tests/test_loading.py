"""Directories from a stranger: nothing runs, nothing large is made, nothing reaches a terminal."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fxcompress
from fxcompress import LoadError, RecordError, RuleError, plan_of
from fxcompress.errors import printable
from fxcompress.forms.reserved import is_reserved
from fxcompress.operators.modules import parse_shape
from fxcompress.rules import parse_rules
from tests.plan_fuzz import RULES, Net, written
from tests.small import data, net, rules
from tests.zoo import DECODER

WEIGHTS = "model.fxcompress.safetensors"


def refused(path: Path, change: Callable[[Any], Any], *words: str) -> str:
    plan = json.loads((path / "plan.json").read_text())
    change(plan)
    (path / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(LoadError) as caught:
        fxcompress.load(path, Net())
    text = str(caught.value)
    assert all(word in text for word in words), text
    assert text.isprintable()
    return text


@pytest.mark.parametrize(
    "name",
    [
        "a=print()",
        'a", None) or print() or getattr(self, "a',
        "a: print()",
        "in",
        "training",
        "_modules",
        "a b",
        "",
        "a\nb",
        "ａ",
    ],
)
def test_no_word_of_a_plan_becomes_code(name: str, tmp_path: Path) -> None:
    written(tmp_path)
    plan = (tmp_path / "plan.json").read_text()
    new = json.dumps(name)[1:-1]
    for step in ("small", "h"):
        (tmp_path / "plan.json").write_text(plan.replace(f'"{step}"', f'"{new}"'))
        with pytest.raises(LoadError, match="plan"):
            fxcompress.load(tmp_path, Net())


def test_names_of_torch_are_reserved() -> None:
    """Of the installed version; a node called so would hide them, or be hidden."""
    graph = torch.fx.Graph()
    graph.output(graph.placeholder("x"))
    made = torch.fx.GraphModule(nn.Module(), graph)
    names = {*dir(made), *vars(made), "self", "None", "lambda"}
    assert not [name for name in names if not is_reserved(name)]
    assert not any(map(is_reserved, ("down", "up", "a", "small", "input", "print", "torch", "x1")))


@pytest.mark.parametrize("name", ["print", "torch", "input", "getattr", "inf", "device", "match"])
def test_other_names_of_nodes_work(name: str, tmp_path: Path) -> None:
    small = fxcompress.compile(
        net(), parse_rules(RULES.split("  - id: two")[0].replace("small", name).replace(
            '"own"', '"up"'), "t.yaml"), data()
    )  # fmt: skip
    assert plan_of(small).rewritten
    fxcompress.save(small, tmp_path)
    loaded = fxcompress.load(tmp_path, net())
    assert torch.equal(small(data()[0]), loaded(data()[0]))


def test_a_reserved_name_is_told_when_rules_are_checked() -> None:
    with pytest.raises(RuleError, match=r"t\.yaml:8:9 error\[reserved-name\]: 'training'"):
        parse_rules(RULES.replace("small", "training"), "t.yaml")


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda p: p["sites"][1].update(rank=10**9, full_rank=10**9), "sites[1].full_rank"),
        (lambda p: p["sites"][1].update(rank=2), "sites[1].after.parameters"),
        (lambda p: p["sites"][1].update(form="tucker2"), "sites[1].form"),
        (lambda p: p["sites"][0].update(form="joint"), "sites[0].form"),
        (lambda p: p["sites"][0].update(op="linear"), "sites[0].op"),
        (lambda p: p["sites"][0].update(operator="conv1d 8→16 3"), "Net is not what the plan"),
        (lambda p: p["sites"][2].update(bundle=""), "sites[2].form"),
        (lambda p: p["sites"][2].update(member=1), "sites[2].member"),
        (lambda p: p["sites"][2]["parts"].pop(), "sites[2].parts"),
        (lambda p: p["sites"][1].update(name="q"), "a site appears twice"),
        (lambda p: p["sites"][1].update(name="nowhere"), "no linear layer nowhere"),
        (lambda p: p["folded"].append(p["folded"][0]), "folded[1]"),
        (lambda p: p["folded"][0].update(norm="own"), "no batch norm own"),
        (lambda p: p["folded"][0].update(convolution="own"), "folded[0].convolution"),
        (lambda p: p["budget"].update(cost=1.0), "budget.cost"),
        (lambda p: p["budget"].update(predicted=7.0), "budget.predicted"),
        (lambda p: p["tradeoff"].update(now=10**6), "out of order"),
        (lambda p: p["tradeoff"]["losses"].__setitem__(0, 7.0), "not the sum of its parts"),
        (lambda p: p["tradeoff"]["curves"].pop(), "not the sum of its parts"),
        (lambda p: p["tradeoff"]["curves"][0]["taken"].pop(), "does not fit its points"),
        (
            lambda p: p["tradeoff"].update(
                now=len(p["tradeoff"]["costs"]) - 1, more=len(p["tradeoff"]["costs"]) - 1
            ),
            "tradeoff.now",
        ),
        (lambda p: p["model_before"].update(parameters=10**30), "model_before.parameters"),
        (lambda p: p["templates"]["graph:two"].update(name="pivoted"), "templates.graph:two"),
        (lambda p: p["templates"]["graph:own"]["steps"].reverse(), "templates.graph:own"),
        (lambda p: p.update(expanded=["own"]), "expanded"),
        (
            lambda p: p.update(earlier=[{**p, "earlier": [{**p, "sites": []}], "sites": []}]),
            "earlier[0].earlier",
        ),
        (
            lambda p: p["templates"]["graph:own"]["steps"][0].update(inputs=[]),
            "'small' reads nothing",
        ),
        (lambda p: p.update(earlier=[dict(p)]), "was rewritten before"),
    ],
)
def test_what_cannot_be_true(change: Callable[[Any], Any], place: str, tmp_path: Path) -> None:
    written(tmp_path)
    refused(tmp_path, change, place)


def test_texts_of_a_stranger_are_shown_not_obeyed(tmp_path: Path) -> None:
    written(tmp_path)
    evil = "\x1b[2J\x9b31m\u202e\nerror: none"
    refused(tmp_path, lambda p: p["sites"][1].update(name=evil), r"\x1b[2J\x9b31m\u202e\nerror")
    written(tmp_path)
    plan = json.loads((tmp_path / "plan.json").read_text())
    plan.update(warnings=[evil], rules=evil, metric=evil, calibration={evil: evil})
    plan["sites"][0].update(rule=evil, location=evil)
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    loaded = fxcompress.load(tmp_path, Net())
    for shown in (str(plan_of(loaded)), str(fxcompress.diff(Net(), loaded))):
        assert r"\x1b[2J\x9b31m\u202e\nerror: none" in shown
        assert shown.replace("\n", "").isprintable()
    state = load_file(tmp_path / WEIGHTS)
    save_file({**state, evil: torch.ones(1)}, tmp_path / WEIGHTS)
    refused(tmp_path, lambda p: None, r"the model has no \x1b[2J")


def test_names_that_no_plan_could_hold_are_refused_at_once() -> None:
    model = net()
    model.add_module("a\x1b", nn.Linear(2, 2))
    with pytest.raises(RecordError, match=r"a\\x1b"):
        fxcompress.compile(model, rules(), data())


def test_printable() -> None:
    assert printable("linear 3→4, λ ½") == "linear 3→4, λ ½"
    assert printable("a\x07\u2028\ud800") == r"a\x07\u2028\ud800"
    assert printable("a" * 10, 3) == "aaa..."


@pytest.mark.parametrize(
    "text",
    [
        *("linear 3→4", "embedding 10→3", "conv2d 6→4 3×3, stride 2, padding 1, groups 2"),
        *("conv1d 6→4 3, padding same, dilation 2", "conv2d 4→8 3×1, padding 1×0, reflect"),
        "conv_transpose2d 4→8 3×2, stride 2×1, output_padding 1×0",
    ],
)
def test_shapes_from_words(text: str) -> None:
    assert str(parse_shape(text, False, torch.float32)) == text
    for wrong in (f"{text} ", f"{text}, evil", text.replace("→", "→99999999"), text[:-1] + "x"):
        with pytest.raises(ValueError, match=r"describes|bounds|numbers"):
            parse_shape(wrong, False, torch.float32)


class _Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(24, 24)
        self.k = nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x) * self.k(x)


@pytest.mark.parametrize("first", ["q", "k"])
def test_layers_named_in_another_order_than_they_run(first: str, tmp_path: Path) -> None:
    """Each gets the half that is its own."""
    torch.manual_seed(0)
    model = _Two().eval()
    names = sorted("qk", key=lambda name: name != first)
    nodes = ", ".join(f'{n}: {{op: linear, input: $x, name: "{n}"}}' for n in names)
    text = (
        "budget: {keep: 0.8}\nrules:\n"
        f"  - {{id: a, match: {{inputs: [x], nodes: {{{nodes}}}}}, rewrite: {{form: joint}}}}\n"
    )
    small = fxcompress.compile(model, parse_rules(text, "t.yaml"), data())
    for name in "qk":
        own, other = model.get_submodule(name), model.get_submodule("k" if name == "q" else "q")
        made = small.get_submodule(name).weight
        assert (made - own.weight).norm() < 0.5 * (made - other.weight).norm()  # type: ignore[operator]
    fxcompress.save(small, tmp_path)
    assert torch.equal(fxcompress.load(tmp_path, _Two())(data()[0]), small(data()[0]))


def test_configs_of_a_stranger(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batches = [{"input_ids": torch.randint(3, 100, (2, 8))}]
        fxcompress.save(fxcompress.compile(model, rules(0.7), batches), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, words in [
        ({"attn_implementation": "stranger/kernel"}, "code from elsewhere"),
        ({"experts_implementation": "stranger/kernel"}, "code from elsewhere"),
        ({"use_pretrained_backbone": True}, "a model from elsewhere"),
        ({"model_type": "\x1b[2J"}, r"\x1b"),
        ({"vocab_size": 10**10}, "twice the size"),
        ({"hidden_size": 2**20}, "twice the size"),
        ({"num_hidden_layers": 10**9}, "twice the size"),
    ]:
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(LoadError, match=r"config\.json") as caught:
            fxcompress.load(tmp_path)
        assert words in str(caught.value)
        assert str(caught.value).isprintable()
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert type(fxcompress.load(tmp_path)) is transformers.LlamaForCausalLM
