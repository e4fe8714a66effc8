"""The kinds of operators with a weight, in words: known without torch.

A new kind is a file of this folder, with a ``KIND`` in it, and a line of :data:`KINDS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Type = Literal["int", "float", "bool", "str", "ints", "ints|str"]
Takes = Literal["rows", "indices", "patches"]
AttributeValue = bool | int | float | str | None | tuple["AttributeValue", ...]


@dataclass(frozen=True)
class KindWords:
    """One kind as the rule language knows it.

    Attributes:
        name: of its file.
        takes: what its operators are given: rows along the last dimension; indices of rows of the
            weight; or values with spatial dimensions, of which every group sees patches.
        ops: canonical operators, each with its number of spatial dimensions.
        attributes: name -> type, of each of them (see
            :class:`fxcompress.rules.language.vocabulary.AttributeType`); the first two count input
            and output channels.
    """

    name: str
    takes: Takes
    ops: Mapping[str, int]
    attributes: Mapping[str, Type]

    def channels(self, attributes: Mapping[str, AttributeValue]) -> tuple[int, int, int]:
        """Groups, and input and output channels of all of them together.

        >>> OPERATORS["linear"].channels({"in_features": 3, "out_features": 5})
        (1, 3, 5)

        Args:
            attributes: of one operator.
        """
        n, m, *_ = (attributes[name] for name in self.attributes)
        groups = attributes.get("groups", 1)
        assert isinstance(n, int)
        assert isinstance(m, int)
        assert isinstance(groups, int)
        return groups, n, m


def _kind(name: str, takes: Takes, ops: str, **attributes: Type) -> KindWords:
    dims = {op: int(op[-2]) if op[-2:-1].isdigit() else 0 for op in ops.split()}
    return KindWords(name, takes, dims, {**attributes, "dtype": "str"})


# fmt: off
KINDS: tuple[KindWords, ...] = (
    _kind("linear", "rows", "linear", in_features="int", out_features="int", bias="bool"),
    _kind("convolution", "patches",
          "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d",
          in_channels="int", out_channels="int", kernel_size="ints", stride="ints",
          padding="ints|str", dilation="ints", groups="int", bias="bool", padding_mode="str"),
    _kind("embedding", "indices", "embedding", num_embeddings="int", embedding_dim="int"),
)
"""All kinds. Attributes of a convolution are one number a dimension (``ints``)."""
# fmt: on

OPERATORS: Mapping[str, KindWords] = {op: kind for kind in KINDS for op in kind.ops}
"""The kind of each canonical operator."""


def operators_of(kind: str) -> frozenset[str]:
    """The canonical operators of a kind.

    >>> sorted(operators_of("convolution"))[:3]
    ['conv1d', 'conv2d', 'conv3d']
    """
    return frozenset(op for op, words in OPERATORS.items() if words.name == kind)


TRANSPOSED = frozenset(op for op in operators_of("convolution") if "transpose" in op)
"""The convolutions that spread their input out."""
