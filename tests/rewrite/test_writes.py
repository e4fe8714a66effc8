"""A write to the weight or the bias of a factorized layer works or raises: it never vanishes."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress
from fxcompress.rewrite import Factorized
from tests.full_rank import factorized, rewrite
from tests.small import data, net, rules

N, M = 10, 6
LOST = "what is written to it would be lost"


def layer(form: str = "low_rank") -> Factorized:
    """A factorized layer with a bias."""
    pair = rewrite(nn.Sequential(nn.Linear(N, M)), torch.randn(4, N), form, 3)
    (found,) = factorized(pair.model).values()
    return found


def convolution(chosen: Any = "convolutional") -> Factorized:
    """A factorized convolution with a bias."""
    images = [torch.randn(4, 6, 8, 8) for _ in range(2)]
    model = nn.Sequential(nn.Conv2d(6, 12, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 36, 3))
    small = fxcompress.compile(model.eval(), chosen, images, keep=0.6, progress=False)
    return next(m for m in small.modules() if isinstance(m, Factorized))


WRITES: dict[str, Callable[[Any], Any]] = {
    "add_": lambda w: w.add_(1.0),
    "+=": lambda w: w.__iadd__(1.0),
    "*=": lambda w: w.__imul__(2.0),
    "copy_": lambda w: w.copy_(torch.zeros(w.shape)),
    "zero_": lambda w: w.zero_(),
    "item": lambda w: w.__setitem__(0, 0.0),
    "mask": lambda w: w.__setitem__(w.abs() < 10, 0.0),
    "out": lambda w: torch.add(torch.ones(w.shape), 1.0, out=w),
    "init": nn.init.zeros_,
    "init by name": lambda w: nn.init.uniform_(tensor=w),
    "init orthogonal": nn.init.orthogonal_,
    "foreach": lambda w: torch._foreach_add_([w], 1.0),
    "functional": lambda w: F.relu(w, inplace=True),
    "data =": lambda w: setattr(w, "data", torch.zeros(w.shape)),
    "data +=": lambda w: setattr(w, "data", w.data + 1.0),
    "data.add_": lambda w: w.data.add_(1.0),
    "data[0]": lambda w: w.data.__setitem__(0, 0.0),
    "data.T.copy_": lambda w: w.data.T.copy_(torch.zeros(w.T.shape)),
    "detach": lambda w: w.detach().mul_(0.5),
    "row": lambda w: w[0].zero_(),
    "rows": lambda w: [row.zero_() for row in w],
    "view": lambda w: w.view(-1).fill_(1.0),
    "flatten": lambda w: w.flatten()[3:].fill_(1.0),
    "chunk": lambda w: w.chunk(2)[1].normal_(),
    "as it is": lambda w: w.to(torch.float32).clamp_(0, 1),
    "contiguous": lambda w: w.data.contiguous().clamp_(0, 1),
    "set_": lambda w: w.set_(torch.zeros(w.shape)),
    "requires_grad": lambda w: setattr(w, "requires_grad", False),
    "requires_grad_": lambda w: w.requires_grad_(False),
    "grad": lambda w: setattr(w, "grad", torch.zeros(w.shape)),
    "hook": lambda w: w.register_hook(lambda gradient: 2 * gradient),
    "retain_grad": lambda w: w.retain_grad(),
}


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
def test_every_write_to_the_weight_raises(name: str, grad: bool) -> None:
    owner = layer()
    before = owner.weight.clone()
    with torch.set_grad_enabled(grad and name != "out"), pytest.raises(RuntimeError, match=LOST):
        WRITES[name](owner.weight)
    assert torch.equal(owner.weight, before)


@pytest.mark.parametrize("name", sorted(WRITES.keys() - {"init orthogonal"}))
def test_so_does_every_write_to_a_computed_bias(name: str) -> None:
    match = {"node": {"op": "conv2d", "as": "c"}}
    owner = convolution(rules(match=match, rewrite={"form": "pivoted"}))
    before = owner.bias.clone()
    with torch.set_grad_enabled(name != "out"), pytest.raises(RuntimeError, match=LOST):
        WRITES[name](owner.bias)
    assert torch.equal(owner.bias, before)


def test_increments_of_data_raise_where_they_are_written() -> None:
    owner = layer()
    with pytest.raises(RuntimeError, match=r"layer\.weight\.clone\(\)"):
        owner.weight.data += 1
    with torch.no_grad(), pytest.raises(RuntimeError, match=LOST):
        owner.weight += 1
    array = owner.weight.detach().numpy()
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 0
    assert np.array_equal(array, owner.weight.detach().numpy())


@pytest.mark.parametrize("form", ["low_rank", "joint"])
def test_a_bias_that_the_form_keeps_is_the_parameter(form: str) -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(N, M), nn.Linear(N, M)

        def forward(self, x: Tensor) -> Tensor:
            return self.q(x) + self.k(x)

    model = rewrite(Pair(), torch.randn(4, N), form, 3).model
    x = torch.randn(4, N)
    with torch.no_grad():
        before = model(x)
        for each in factorized(model).values():
            each.bias.add_(1.0)
            each.bias.data += 1.0
        torch.testing.assert_close(model(x), before + 4.0)


def test_copies_are_ordinary_tensors() -> None:
    owner = layer()
    dense = owner.weight.detach().clone()
    clone = owner.weight.clone()
    assert type(clone) is Tensor
    with torch.no_grad():
        clone.add_(1.0)
        (owner.weight + 0).mul_(2.0)
        copy.deepcopy(owner.weight.data).zero_()
    other = nn.Linear(N, M)
    with torch.no_grad():
        other.weight.copy_(owner.weight)
    other.weight.data = owner.weight.data
    other.weight.data += 1.0
    torch.testing.assert_close(other.weight, dense + 1.0)
    torch.testing.assert_close(owner.weight, dense)
    stream = io.BytesIO()
    torch.save(owner.weight.data, stream)
    stream.seek(0)
    loaded = torch.load(stream, weights_only=True)
    assert type(loaded) is Tensor
    assert torch.equal(loaded, dense)


@pytest.mark.parametrize("of", [lambda w: w.data, lambda w: w.detach(), lambda w: w.data.T])
def test_a_parameter_made_of_the_weight_is_an_ordinary_one(of: Any) -> None:
    owner = layer()
    dense = owner.weight.detach().clone()
    made = nn.Parameter(of(owner.weight))
    assert type(made) is nn.Parameter
    assert made.is_leaf
    made.square().sum().backward()
    assert made.grad is not None
    torch.optim.SGD([made], 0.1).step()
    assert not torch.equal(made.detach(), of(owner.weight))
    assert torch.equal(owner.weight, dense)
    assert type(nn.Parameter(owner.weight.data, requires_grad=False)) is nn.Parameter


def test_a_detached_weight_can_have_a_gradient() -> None:
    owner = layer()
    leaf = owner.weight.detach().requires_grad_()
    seen = []
    leaf.register_hook(seen.append)
    (3 * leaf).sum().backward()
    assert torch.equal(leaf.grad, torch.full((M, N), 3.0))
    assert len(seen) == 1
    assert owner.weight.grad is None
    owner.weight.grad = None
    assert owner.weight.requires_grad_(True).requires_grad


def test_a_convolution_as_well() -> None:
    owner = convolution()
    with torch.no_grad(), pytest.raises(RuntimeError, match=LOST):
        owner.weight.mul_(2.0)
    with pytest.raises(RuntimeError, match=LOST):
        owner.weight.data[0] = 0


def test_merging_an_adapter_says_what_to_do() -> None:
    peft = pytest.importorskip("peft")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    model = peft.get_peft_model(LlamaForCausalLM(config), lora).eval()
    texts = [{"input_ids": torch.randint(40, (4, 12))} for _ in range(2)]
    small = fxcompress.compile(model, rules(0.6, name="*base_layer*"), texts, progress=False)
    with torch.no_grad():
        before = small(**texts[0]).logits
        for merge in (small.merge_adapter, small.merge_and_unload):
            with pytest.raises(RuntimeError, match="merge an adapter"):
                merge()
        assert torch.equal(small(**texts[0]).logits, before)


def test_whole_models_are_still_read() -> None:
    small = fxcompress.compile(net(), rules(0.5), data(), progress=False)
    for each in factorized(small).values():
        total = sum(float(w.norm()) for w in (each.weight, each.weight.data))
        assert total > 0
        assert each.weight.tolist() == each.weight.detach().tolist()
        assert repr(each.weight.data).startswith("tensor(")
