"""``ProjectedAttention`` against ``nn.MultiheadAttention``, in float64.

Both compute the same sums, split up otherwise: a few hundred additions of numbers of order
one, so 1e-12 leaves four digits to spare.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxcompress.rewrite import ProjectedAttention
from fxcompress.rewrite.attention import expand_attention

WIDTH, HEADS, BATCH, LENGTH, KEYS = 32, 4, 2, 7, 5
ATOL = 1e-12


def pair(**options: Any) -> tuple[nn.MultiheadAttention, ProjectedAttention]:
    original = nn.MultiheadAttention(WIDTH, HEADS, dtype=torch.float64, **options).eval()
    if original.in_proj_bias is not None:  # zero when new, which would hide a missing bias
        nn.init.normal_(original.in_proj_bias)
        nn.init.normal_(original.out_proj.bias)
    return original, ProjectedAttention.of(original)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def padding() -> Tensor:
    mask = torch.zeros(BATCH, KEYS, dtype=torch.bool)
    mask[0, 3:] = True
    return mask


def blocked_per_head() -> Tensor:
    """Seeded, and no query without a key: that one would be NaN in both."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(BATCH * HEADS, LENGTH, KEYS, generator=generator) > 0.7
    mask[..., 0] = False
    return mask


def blocked() -> Tensor:
    mask = torch.zeros(LENGTH, KEYS, dtype=torch.bool)
    mask[:, 4] = True
    mask[2, 1] = True
    return mask


MASKS: dict[str, dict[str, Tensor]] = {
    "none": {},
    "bool padding": {"key_padding_mask": padding()},
    "float padding": {"key_padding_mask": padding().double() * -5},
    "bool mask": {"attn_mask": blocked()},
    "float mask": {"attn_mask": torch.randn(LENGTH, KEYS, dtype=torch.float64)},
    "both, bool": {"key_padding_mask": padding(), "attn_mask": blocked()},
    "both, float": {"key_padding_mask": padding() * -5.0, "attn_mask": blocked() * -3.0},
    "a mask per head": {"attn_mask": blocked_per_head()},
}


def assert_same(original: nn.Module, new: nn.Module, *args: Tensor, **kwargs: Any) -> None:
    for grad in (True, False):  # torch has a fused path without gradients
        with torch.set_grad_enabled(grad):
            wanted, got = original(*args, **kwargs), new(*args, **kwargs)
        assert (got[1] is None) == (wanted[1] is None)
        torch.testing.assert_close(got, wanted, rtol=0, atol=ATOL)


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize(
    ("batch_first", "bias", "sides"),
    [*itertools.product((True, False), (True, False), (None, 16))],
)
def test_cross_attention(batch_first: bool, bias: bool, sides: int | None, masks: str) -> None:
    original, new = pair(
        batch_first=batch_first, bias=bias, kdim=sides, vdim=None if sides is None else 24
    )
    query = normal(BATCH, LENGTH, WIDTH)
    key, value = normal(BATCH, KEYS, sides or WIDTH), normal(BATCH, KEYS, 24 if sides else WIDTH)
    if not batch_first:
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    kwargs = {k: v.double() if v.is_floating_point() else v for k, v in MASKS[masks].items()}
    for need, average in ((True, True), (True, False), (False, True)):
        assert_same(
            original, new, query, key, value,
            need_weights=need, average_attn_weights=average, **kwargs,
        )  # fmt: skip


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_self_attention(batch_first: bool, need_weights: bool) -> None:
    original, new = pair(batch_first=batch_first)
    x = normal(BATCH, LENGTH, WIDTH)
    assert_same(original, new, x, x, x, need_weights=need_weights)
    causal = nn.Transformer.generate_square_subsequent_mask(LENGTH, dtype=torch.float64)
    if batch_first:
        options = {"attn_mask": causal, "is_causal": True, "need_weights": need_weights}
        assert_same(original, new, x, x, x, **options)


@pytest.mark.parametrize("need_weights", [True, False])
def test_without_a_batch(need_weights: bool) -> None:
    original, new = pair(batch_first=True)
    query, key = normal(LENGTH, WIDTH), normal(KEYS, WIDTH)
    assert_same(original, new, query, key, key, need_weights=need_weights)
    assert_same(
        original, new, query, key, key, need_weights=need_weights,
        key_padding_mask=padding()[0], attn_mask=blocked(),
    )  # fmt: skip
    per_head = torch.rand(HEADS, LENGTH, KEYS) > 0.7
    assert_same(original, new, query, key, key, need_weights=need_weights, attn_mask=per_head)


def test_is_causal_needs_a_mask_in_both() -> None:
    original, new = pair(batch_first=True)
    x = normal(BATCH, LENGTH, WIDTH)
    for attention in (original, new):
        with pytest.raises(RuntimeError, match="attn_mask"):
            attention(x, x, x, is_causal=True, need_weights=False)


def test_projections_see_one_tensor() -> None:
    """So that q, k and v are known to share their input."""
    _, new = pair(batch_first=False)
    seen = []
    for projection in (new.q_proj, new.k_proj, new.v_proj):
        projection.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x = normal(LENGTH, BATCH, WIDTH)
    new(x, x, x)
    assert len(seen) == 3
    assert all(tensor is seen[0] for tensor in seen)


def test_it_is_an_attention_and_keeps_its_settings() -> None:
    original, new = pair(batch_first=True, dropout=0.3)
    assert isinstance(new, nn.MultiheadAttention)
    assert (new.embed_dim, new.num_heads, new.dropout, new.batch_first) == (WIDTH, HEADS, 0.3, True)
    assert not new.training
    assert ProjectedAttention.of(original.train()).training
    assert set(new.state_dict()) == {
        f"{name}_proj.{part}" if name != "out" else f"out_proj.{part}"
        for name in ("q", "k", "v", "out")
        for part in ("weight", "bias")
    }
    assert "in_proj_weight" in original.state_dict()


def test_dropout_is_applied_in_training_only() -> None:
    _, new = pair(batch_first=True, dropout=0.5)
    x = normal(BATCH, LENGTH, WIDTH)
    for need in (True, False):
        assert torch.equal(new(x, x, x, need_weights=need)[0], new(x, x, x, need_weights=need)[0])
    new.train()
    for need in (True, False):
        assert not torch.equal(
            new(x, x, x, need_weights=need)[0], new(x, x, x, need_weights=need)[0]
        )


class Holder(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.a = nn.MultiheadAttention(WIDTH, HEADS, **options)
        self.b = self.a


class Subclass(nn.MultiheadAttention):
    pass


def test_an_attention_under_two_names_is_expanded_once() -> None:
    model = Holder()
    expand_attention(model)
    assert isinstance(model.a, ProjectedAttention)
    assert model.b is model.a


def test_attentions_that_share_parameters_are_left_alone() -> None:
    model = nn.ModuleList(nn.MultiheadAttention(WIDTH, HEADS) for _ in range(3))
    model[1].in_proj_weight = model[0].in_proj_weight
    expand_attention(model)
    assert [type(m) for m in model] == 2 * [nn.MultiheadAttention] + [ProjectedAttention]


def test_what_cannot_be_expanded_is_left_alone() -> None:
    parametrized = nn.MultiheadAttention(WIDTH, HEADS)
    nn.utils.parametrizations.weight_norm(parametrized, "in_proj_weight")
    model = nn.ModuleList(
        [
            nn.MultiheadAttention(WIDTH, HEADS, add_bias_kv=True),
            nn.MultiheadAttention(WIDTH, HEADS, add_zero_attn=True),
            Subclass(WIDTH, HEADS),
            parametrized,
        ]
    )
    before = [type(m) for m in model]
    expand_attention(model)
    assert [type(m) for m in model] == before


def test_only_attentions_above_a_site_are_expanded() -> None:
    model = nn.ModuleDict({name: nn.MultiheadAttention(WIDTH, HEADS) for name in ("a", "ab")})
    untouched = copy.deepcopy(model["a"])
    expand_attention(model, above=["ab.q_proj"])
    assert type(model["a"]) is nn.MultiheadAttention
    assert type(model["ab"]) is ProjectedAttention
    assert torch.equal(model["a"].in_proj_weight, untouched.in_proj_weight)
