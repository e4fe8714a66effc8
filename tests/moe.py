"""Small mixtures of experts: those of transformers, and one whose moments can be written down."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

EXPERTS = 4
_SIZES: Mapping[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_LOCAL = {"num_local_experts": EXPERTS, "num_experts_per_tok": 2}
_NAMED = {"num_experts": EXPERTS, "num_experts_per_tok": 2}
_ROUTED = {"n_routed_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "Mixtral": {"intermediate_size": 24, **_LOCAL},
    "Qwen2Moe": {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, **_NAMED},
    "Qwen3Moe": {"moe_intermediate_size": 24, "head_dim": 8, **_NAMED},
    "DeepseekV3": {
        **{"num_key_value_heads": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
        **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8},
        **{"v_head_dim": 8, "intermediate_size": 48, **_ROUTED},
    },
    "Olmoe": {"intermediate_size": 24, **_NAMED},
    "Phimoe": {"intermediate_size": 24, **_LOCAL},
    "GraniteMoe": {"intermediate_size": 24, **_LOCAL},
    "Glm4Moe": {
        **{"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "head_dim": 8},
        **{"intermediate_size": 48, **_ROUTED},
    },
    "GptOss": {"intermediate_size": 24, "head_dim": 8, **_LOCAL},
    "Llama4Text": {
        **{"intermediate_size": 24, "intermediate_size_mlp": 48, "head_dim": 8},
        **{"num_local_experts": EXPERTS, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1},
    },
    "Jamba": {
        **{"intermediate_size": 24, "expert_layer_period": 2, "expert_layer_offset": 1},
        **{"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
        **{"mamba_d_state": 4, **_NAMED},
    },
}
STACKED = tuple(_OPTIONS)
"""Architectures whose experts are stacks of matrices."""


def mixture(name: str, **options: Any) -> nn.Module:
    """A seeded model of an architecture, with weights large enough for routers to differ."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**_SIZES, **_OPTIONS[name], **options})
    model: Any
    if name == "Llama4Text":
        model = transformers.Llama4ForCausalLM(config)
    else:
        model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    return model.eval()  # type: ignore[no-any-return]


def tokens(count: int = 3, *, batch: int = 4, length: int = 40) -> list[dict[str, Tensor]]:
    """Batches of random tokens."""
    numbers = torch.Generator().manual_seed(0)
    size = (batch, length)
    return [{"input_ids": torch.randint(3, 64, size, generator=numbers)} for _ in range(count)]


class Mixture(nn.Module):
    """One layer of experts between two linear ones; ``routes`` says who gets a row.

    Attributes:
        probes: what is added to the outputs of ``up`` (rows x experts x hidden), to take gradients.
    """

    N, HIDDEN, CLASSES = 6, 5, 4

    def __init__(self, experts: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Linear(self.N, experts)
        self.up = nn.Parameter(torch.randn(experts, self.HIDDEN, self.N))
        self.down = nn.Parameter(torch.randn(experts, self.HIDDEN, self.N))
        self.head = nn.Linear(self.N, self.CLASSES)
        self.double()
        self.probes: Tensor | None = None

    def routes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and numbers of the two experts of each row."""
        weights, chosen = self.router(x).softmax(-1).topk(2, -1)
        return weights, chosen

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.routes(x)
        out = torch.zeros_like(x)
        for expert in range(len(self.up)):
            rows, place = (chosen == expert).nonzero(as_tuple=True)
            if not len(rows):
                continue
            hidden = F.linear(x[rows], self.up[expert])
            if self.probes is not None:
                hidden = hidden + self.probes[rows, expert]
            made = F.silu(hidden) @ self.down[expert]
            out = out.index_add(0, rows, made * weights[rows, place, None])
        return self.head(x + out)
