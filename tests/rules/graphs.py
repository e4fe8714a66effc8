"""Hand-made operators to match rules against."""

from __future__ import annotations

from typing import Any

from fxcompress.graph.operator import Operator


def linear(path: str, inputs: int = 512, outputs: int = 512, **given: Any) -> Operator:
    """A linear module at ``path``; ``weight=`` ties it, ``name=`` tells repeated calls apart."""
    attributes = {"in_features": inputs, "out_features": outputs, "bias": True, "dtype": "float32"}
    return _operator("linear", path, attributes, given)


def conv2d(path: str, channels: int = 64, kernel: int = 3, groups: int = 1) -> Operator:
    attributes = {
        "in_channels": channels,
        "out_channels": channels,
        "kernel_size": (kernel, kernel),
        "stride": (1, 1),
        "padding": (kernel // 2, kernel // 2),
        "dilation": (1, 1),
        "groups": groups,
        "bias": False,
        "padding_mode": "zeros",
        "dtype": "float32",
    }
    return _operator("conv2d", path, attributes, {})


def embedding(path: str) -> Operator:
    attributes = {"num_embeddings": 1000, "embedding_dim": 512, "dtype": "float32"}
    return _operator("embedding", path, attributes, {})


def plain(op: str, scope: str) -> Operator:
    return Operator(f"{scope}_{op}", op, scope, scope, {}, (), (), (1, 512))


def decoder(layers: int = 4) -> list[Operator]:
    """A small Llama: tied head, grouped keys and values."""
    operators = [embedding("model.embed_tokens")]
    for layer in range(layers):
        block = f"model.layers.{layer}"
        operators += [linear(f"{block}.self_attn.{n}_proj") for n in ("q", "o")]
        operators += [linear(f"{block}.self_attn.{n}_proj", 512, 128) for n in ("k", "v")]
        operators += [linear(f"{block}.mlp.{n}_proj", 512, 1024) for n in ("gate", "up", "down")]
        operators.append(plain("silu", f"{block}.mlp"))
    head = linear("lm_head", 512, 1000, weight="model.embed_tokens.weight")
    return [*operators, head]


def _operator(op: str, path: str, attributes: dict[str, Any], given: dict[str, Any]) -> Operator:
    return Operator(
        name=given.get("name", path.replace(".", "_")),
        op=op,
        path=path,
        scope=given.get("scope", path.rpartition(".")[0]),
        attributes={**attributes, **given.get("attributes", {})},
        inputs=(),
        users=(),
        shape=None,
        weight=given.get("weight", f"{path}.weight"),
        module=True,
    )
