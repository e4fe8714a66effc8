"""The words of the rule language: operators with their attributes, forms, and words to come.

Everything a rule file may name is listed here once; the schema, the checks and the
suggestions in error messages all read these tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal


@dataclass(frozen=True)
class AttributeType:
    """What an operator attribute holds.

    Attributes:
        kind: ``"int"``, ``"bool"``, ``"str"``, ``"ints"`` (one integer per dimension), or
            ``"ints|str"`` (the same, or a word such as ``same``).
        length: number of integers of an ``"ints"`` attribute (2 for ``conv2d``).
    """

    kind: Literal["int", "bool", "str", "ints", "ints|str"]
    length: int = 1


_INT = AttributeType("int")
_BOOL = AttributeType("bool")
_STR = AttributeType("str")


def _convolution(dimensions: int) -> Mapping[str, AttributeType]:
    ints = AttributeType("ints", dimensions)
    return MappingProxyType(
        {
            "in_channels": _INT,
            "out_channels": _INT,
            "kernel_size": ints,
            "stride": ints,
            "padding": AttributeType("ints|str", dimensions),
            "dilation": ints,
            "groups": _INT,
            "bias": _BOOL,
            "padding_mode": _STR,
            "dtype": _STR,
        }
    )


OPERATORS: Mapping[str, Mapping[str, AttributeType]] = MappingProxyType(
    {
        "linear": MappingProxyType(
            {"in_features": _INT, "out_features": _INT, "bias": _BOOL, "dtype": _STR}
        ),
        "conv1d": _convolution(1),
        "conv2d": _convolution(2),
        "conv3d": _convolution(3),
        "conv_transpose1d": _convolution(1),
        "conv_transpose2d": _convolution(2),
        "conv_transpose3d": _convolution(3),
        "embedding": MappingProxyType(
            {"num_embeddings": _INT, "embedding_dim": _INT, "dtype": _STR}
        ),
    }
)
"""Operators that read a weight: name -> attribute -> type. Only these can be rewritten."""

_PLAIN = """
    abs add addmm arange argmax avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d
    adaptive_avg_pool2d baddbmm batch_norm bmm cat chunk clamp clone contiguous cos cumsum
    detach div dropout einsum elu exp expand flatten float gelu getattr getitem glu group_norm
    hardswish index_select instance_norm interpolate layer_norm leaky_relu log log_softmax
    masked_fill matmul max max_pool1d max_pool2d max_pool3d mean min mish mul neg ones outer pad
    permute pow prelu relu relu6 repeat repeat_interleave reshape rms_norm roll rsqrt
    scaled_dot_product_attention sigmoid silu sin size softmax softplus split sqrt squeeze stack
    sub sum tanh to transpose triu tril unbind unfold unsqueeze upsample view where zeros
"""
PLAIN_OPERATORS: frozenset[str] = frozenset(_PLAIN.split())
"""Operators without a weight: known by name, so that a rule on one of them gets a clear error."""

FORMS: Mapping[str, frozenset[str]] = MappingProxyType(
    {"low_rank": frozenset({"linear"}), "pivoted": frozenset({"linear"})}
)
"""Forms of a factorization: name -> operators that it applies to."""

LATER_KEYS: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "rules": frozenset({"tests", "tags", "enabled"}),
        "match": frozenset({"nodes", "inputs", "outputs", "scope", "group"}),
        "any_of": frozenset({"nodes", "inputs", "outputs", "scope"}),
        "node": frozenset({"input", "inputs", "users", "only_used_by", "scope", "weight"}),
        "rewrite": frozenset({"graph", "outputs", "cost", "permutation"}),
        "budget": frozenset({"device", "batch"}),
        "metric": frozenset({"loss", "empirical"}),
        "solver": frozenset({"rounds", "schedule", "steps", "learning_rate"}),
        "": frozenset({"include", "forms", "functions", "extends"}),
    }
)
"""Keys that the language will have and this version does not: parent key -> keys."""

LATER_VALUES: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "unit": frozenset({"latency"}),
        "kind": frozenset({"elementwise", "ekfac"}),
        "output": frozenset({"loss"}),
        "form": frozenset({"joint", "channel", "spatial", "tucker2", "embedding", "graph"}),
        "tied": frozenset({"share", "untie", "once", "joint"}),
    }
)
"""Values that the language will have and this version does not: key -> values."""


def forms_for(op: str, forms: tuple[str, ...]) -> tuple[str, ...]:
    """Those of ``forms`` that apply to the operator ``op``, in the order given.

    >>> forms_for("linear", ("pivoted", "low_rank"))
    ('pivoted', 'low_rank')
    >>> forms_for("conv2d", ("pivoted",))
    ()
    """
    return tuple(form for form in forms if op in FORMS[form])
