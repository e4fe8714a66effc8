"""``nn.MultiheadAttention`` with its projections as real linear layers.

The module keeps q, k and v in one bare parameter and applies them inside a fused function,
out of reach of any rewrite.  :func:`expand_attention` swaps it for a subclass with the same
call contract whose projections are ``nn.Linear``s.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcompress.graph.paths import containing
from fxcompress.rewrite.replace import Places

_PACKED = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias")


class ProjectedAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` with ``q_proj``, ``k_proj``, ``v_proj`` and ``out_proj``.

    Made by :meth:`of` only.  Lacks ``add_bias_kv`` and ``add_zero_attn``.
    """

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear

    @classmethod
    def of(cls, original: nn.MultiheadAttention) -> ProjectedAttention:
        """An attention with projections apart; only ``out_proj`` shares the original's memory."""
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        for key, value in original.__dict__.items():
            if key not in ("_parameters", "_buffers", "_modules"):
                new.__dict__[key] = value
        if original._qkv_same_embed_dim:
            packed = original.in_proj_weight.detach()
            weights = packed.chunk(3)
        else:
            weights = tuple(
                getattr(original, f"{name}_proj_weight").detach() for name in ("q", "k", "v")
            )
        bias = original.in_proj_bias
        biases = (None,) * 3 if bias is None else bias.detach().chunk(3)
        names = ("q_proj", "k_proj", "v_proj")
        for name, weight, part in zip(names, weights, biases, strict=True):
            source = original.in_proj_weight
            if source is None:
                source = getattr(original, f"{name[0]}_proj_weight")
            own = None if bias is None or part is None else _like(part.clone(), bias)
            new.add_module(name, _linear(_like(weight.clone(), source), own))
        out = original.out_proj
        out_bias = None if out.bias is None else _like(out.bias.detach(), out.bias)
        new.add_module("out_proj", _linear(_like(out.weight.detach(), out.weight), out_bias))
        new.train(original.training)
        new.register_parameter("in_proj_weight", None)
        new.register_parameter("in_proj_bias", None)
        # Steers torch's fused paths, which read the packed weight, away from this module.
        new.__dict__["_qkv_same_embed_dim"] = False
        return new

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``nn.MultiheadAttention.forward``."""
        if is_causal and attn_mask is None:
            raise RuntimeError("need attn_mask if specifying the is_causal hint")
        same_key, same_value = key is query, value is key
        unbatched = query.dim() == 2
        if unbatched:
            query, key, value = query[None], key[None], value[None]
        elif not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        # One tensor object where the caller gave one, so that the projections share it.
        key = query if same_key else key
        value = key if same_value else value
        batch, length, _ = query.shape
        q, k, v = (
            projection(x).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for projection, x in zip(
                (self.q_proj, self.k_proj, self.v_proj), (query, key, value), strict=True
            )
        )
        mask = self._mask(attn_mask, key_padding_mask, unbatched, batch, q, k)
        dropout = self.dropout if self.training else 0.0
        weights: Tensor | None = None
        if need_weights:
            weights = (q * self.head_dim**-0.5) @ k.transpose(-1, -2)
            weights = (weights if mask is None else weights + mask).softmax(-1)
            weights = F.dropout(weights, dropout)
            mixed = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        out = self.out_proj(mixed.transpose(1, 2).reshape(batch, length, self.embed_dim))
        if unbatched:
            return out[0], None if weights is None else weights[0]
        return (out if self.batch_first else out.transpose(0, 1)), weights

    def _mask(
        self,
        attn_mask: Tensor | None,
        padding: Tensor | None,
        unbatched: bool,
        batch: int,
        q: Tensor,
        k: Tensor,
    ) -> Tensor | None:
        """The masks as one additive mask that broadcasts to (batch, heads, L, S)."""
        mask: Tensor | None = None
        if attn_mask is not None:
            mask = _additive(attn_mask, q.dtype)
            if mask.dim() == 3:
                mask = mask.view(batch, self.num_heads, q.shape[2], k.shape[2])
        if padding is not None:
            padding = _additive(padding[None] if unbatched else padding, q.dtype)[:, None, None]
            mask = padding if mask is None else mask + padding
        return mask


def expand_attention(model: nn.Module, above: Sequence[str] | None = None) -> None:
    """Expand every ``nn.MultiheadAttention`` of a model that can be; changes ``model``.

    Subclasses, parametrized ones, those with ``add_bias_kv`` or ``add_zero_attn`` and those
    that share a parameter with another module are left alone.

    Args:
        model: its parameters are only read.
        above: expand only attentions that contain one of these module paths.
    """
    holders = Counter(id(p) for m in model.modules() for p in m._parameters.values())
    wanted = None if above is None else containing(above)
    places = Places(model)
    for name, module in list(model.named_modules()):
        if (
            name
            and (wanted is None or name in wanted)
            and type(module) is nn.MultiheadAttention
            and module.bias_k is None
            and not module.add_zero_attn
            and all(holders[id(parameter)] == 1 for parameter in module.parameters())
        ):
            places.replace(module, ProjectedAttention.of(module))


def _like(value: Tensor, source: Tensor) -> nn.Parameter:
    """A parameter that learns if another one does."""
    return nn.Parameter(value, requires_grad=source.requires_grad)


def _linear(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = weight
    if bias is not None:
        linear.bias = bias
    return linear


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))
    return mask.to(dtype)
