"""Hand-made operators to match rules against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fxcompress.graph.operator import Operator


def linear(path: str, inputs: int = 512, outputs: int = 512, **given: Any) -> Operator:
    """A linear module at ``path``; ``weight=`` ties it, ``name=`` tells repeated calls apart.

    ``inputs_from=`` names the operators that it reads.
    """
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


def plain(op: str, scope: str, inputs_from: Sequence[str] = ()) -> Operator:
    """A function called in the forward of ``scope``."""
    name = f"{scope.replace('.', '_')}_{op}"
    return Operator(name, op, scope, scope, {}, tuple(inputs_from), (), (1, 512))


def siblings(count: int) -> list[Operator]:
    """Linears on one input."""
    start = plain("relu", "m")
    return [start, *(linear(f"m.n{i}", inputs_from=[start.name]) for i in range(count))]


def blocks(count: int) -> list[Operator]:
    """Transformer blocks of ten operators: q, k, v, attention, o, add, up, gelu, down, add."""
    operators = [embedding("embed")]
    value = operators[0].name

    def call(operator: Operator) -> str:
        operators.append(operator)
        return operator.name

    for block in range(count):
        at = f"h.{block}"
        q, k, v = (call(linear(f"{at}.attn.{n}", inputs_from=[value])) for n in "qkv")
        mixed = call(plain("scaled_dot_product_attention", f"{at}.attn", [q, k, v]))
        o = call(linear(f"{at}.attn.o", inputs_from=[mixed]))
        value = call(plain("add", f"{at}.attn", [value, o]))
        up = call(linear(f"{at}.mlp.up", 512, 2048, inputs_from=[value]))
        act = call(plain("gelu", f"{at}.mlp", [up]))
        down = call(linear(f"{at}.mlp.down", 2048, 512, inputs_from=[act]))
        value = call(plain("add", f"{at}.mlp", [value, down]))
    return operators


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
        inputs=tuple(given.get("inputs_from", ())),
        users=(),
        shape=None,
        weight=given.get("weight", f"{path}.weight"),
        module=True,
    )
