"""The words of the rule language: operators with their attributes, and words to come.

Everything a rule file may name is listed here once; the schema, the checks and the
suggestions in error messages all read these tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

from fxcompress.operators.words import OPERATORS as WEIGHTED
from fxcompress.operators.words import Type


@dataclass(frozen=True)
class AttributeType:
    """What an operator attribute holds.

    Attributes:
        kind: ``"int"``, ``"float"``, ``"bool"``, ``"str"``, ``"ints"`` (one integer per
            dimension), or ``"ints|str"`` (the same, or a word such as ``same``).
        length: number of integers of an ``"ints"`` attribute (2 for ``conv2d``).
    """

    kind: Type
    length: int = 1


_INT = AttributeType("int")
_BOOL = AttributeType("bool")
_STR = AttributeType("str")
_FLOAT = AttributeType("float")


def _attributes(op: str) -> Mapping[str, AttributeType]:
    words = WEIGHTED[op]
    return MappingProxyType(
        {
            name: AttributeType(kind, words.ops[op] if kind.startswith("ints") else 1)
            for name, kind in words.attributes.items()
        }
    )


OPERATORS: Mapping[str, Mapping[str, AttributeType]] = MappingProxyType(
    {op: _attributes(op) for op in WEIGHTED}
)
"""Operators that read a weight: name -> attribute -> type. Only these can be rewritten."""

_PLAIN = """
    abs adaptive_avg_pool1d adaptive_avg_pool2d add addmm arange argmax avg_pool1d avg_pool2d
    avg_pool3d baddbmm batch_norm bmm cat celu chunk clamp clone contiguous cos cumsum detach
    div dropout einsum elu exp expand flatten float floor_divide gather gelu getattr getitem glu
    group_norm gru hardsigmoid hardswish hardtanh identity index_add index_select instance_norm
    interpolate layer_norm leaky_relu log log_softmax logsigmoid lstm masked_fill matmul max
    max_pool1d max_pool2d max_pool3d mean min mish mul multi_head_attention_forward neg one_hot
    ones outer pad permute pow prelu quick_gelu relu relu6 relu_squared repeat repeat_interleave
    reshape rms_norm roll rrelu rsqrt scaled_dot_product_attention selu sigmoid silu sin size
    softmax softplus softsign split sqrt squeeze stack sub sum tanh to transpose tril triu
    unbind unfold unsqueeze upsample view where zeros
"""
_ATTRIBUTES: Mapping[str, Mapping[str, AttributeType]] = {
    **{op: {"dim": _INT} for op in ("cat", "glu", "log_softmax", "softmax", "split", "stack")},
    **{op: {"dim": _INT} for op in ("unbind", "squeeze", "unsqueeze")},
    **{op: {"other": _FLOAT} for op in ("add", "sub", "mul", "div")},
    "batch_norm": {"num_features": _INT, "eps": _FLOAT},
    "chunk": {"chunks": _INT, "dim": _INT},
    "dropout": {"p": _FLOAT},
    "elu": {"alpha": _FLOAT},
    "flatten": {"start_dim": _INT, "end_dim": _INT},
    "gelu": {"approximate": _STR},
    "getitem": {"index": _INT},
    "group_norm": {"num_groups": _INT, "eps": _FLOAT},
    "layer_norm": {"eps": _FLOAT},
    "leaky_relu": {"negative_slope": _FLOAT},
    "pow": {"exponent": _FLOAT},
    "rms_norm": {"eps": _FLOAT},
    "scaled_dot_product_attention": {"is_causal": _BOOL, "dropout_p": _FLOAT},
    "transpose": {"dim0": _INT, "dim1": _INT},
}
PLAIN_OPERATORS: Mapping[str, Mapping[str, AttributeType]] = MappingProxyType(
    {op: MappingProxyType(dict(_ATTRIBUTES.get(op, {}))) for op in _PLAIN.split()}
)
"""Operators without a weight to rewrite, with their attributes: what else a pattern may name.

Dimensions are counted from the end: ``softmax`` over the last one has ``dim: -1``.  ``other``
and ``exponent`` are numbers; they are absent where the operand is a tensor.
"""

ALL_OPERATORS: Mapping[str, Mapping[str, AttributeType]] = MappingProxyType(
    {**OPERATORS, **PLAIN_OPERATORS}
)
"""What a pattern over several operators may name."""

COMMUTATIVE: frozenset[str] = frozenset({"add", "mul"})
"""Operators whose two operands may stand either way round."""

LATER_KEYS: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "rewrite": frozenset({"permutation"}),
        "budget": frozenset({"device", "batch"}),
        "metric": frozenset({"loss"}),
    }
)
"""Keys that the language will have and this version does not: parent key -> keys."""

LATER_VALUES: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "output": frozenset({"loss"}),
        "tied": frozenset({"share", "untie", "once", "joint"}),
    }
)
"""Values that the language will have and this version does not: key -> values."""

INPUT = "input"
"""The operator of a test's graph that makes a value from outside; it may also go without one."""

Step = Literal[
    "name", "attribute", "pattern", "scope", "unless", "where", "legal", "overlap", "protected"
]
STEPS: tuple[Step, ...] = get_args(Step)
"""The steps at which a site can be lost, in the order in which they are taken."""
