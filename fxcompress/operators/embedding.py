"""Look-ups in a table: ``nn.Embedding`` and ``F.embedding``."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fxcompress.operators import rows
from fxcompress.operators.calls import Application, Call
from fxcompress.operators.kind import Kind
from fxcompress.operators.shape import CPU, Shape, Sizes
from fxcompress.operators.words import AttributeValue, Takes


@dataclass(frozen=True)
class EmbeddingShape(Shape):
    """A look-up in a table of ``in_features`` rows (V) and ``out_features`` columns (d).

    Attributes:
        padding_idx: the row that gets no gradient, None if there is none.
        sparse, scale_grad_by_freq: as of ``nn.Embedding``.
        max_norm: rows are renormalized in place when they are read; None if not.
        rows: look-ups that multiply-accumulates are counted for.
    """

    in_features: int
    out_features: int
    dtype: torch.dtype = torch.float32
    device: torch.device = CPU
    padding_idx: int | None = None
    sparse: bool = False
    scale_grad_by_freq: bool = False
    max_norm: float | None = None
    rows: int = 1

    @property
    def op(self) -> str:
        """The canonical operator of the shape."""
        return "embedding"

    @property
    def bias(self) -> bool:
        """An embedding has none."""
        return False

    @property
    def takes(self) -> Takes:
        return "indices"

    @property
    def kernel_size(self) -> Sizes:
        return ()

    @property
    def matrix(self) -> tuple[int, int, int]:
        return 1, self.out_features, self.in_features

    @property
    def counted(self) -> Sequence[Sizes]:
        return [(self.rows,)]

    @property
    def pooled(self) -> bool:
        return False

    @property
    def informative_rows(self) -> int:
        return self.out_features

    @property
    def attributes(self) -> dict[str, AttributeValue]:
        """What rules know of it."""
        return {"num_embeddings": self.in_features, "embedding_dim": self.out_features}

    @property
    def full_rank(self) -> int:
        return min(self.in_features, self.out_features)

    @property
    def weights(self) -> int:
        """Entries of the table."""
        return self.in_features * self.out_features

    @property
    def macs(self) -> int:
        """A look-up multiplies nothing."""
        return 0

    @property
    def reading(self) -> tuple[Any, ...]:
        """How the operator reads its input: by index."""
        return (self.op, self.in_features)

    def canonical(self, weight: Tensor) -> Tensor:
        """The canonical layout (d x V) of the table (V x d)."""
        return weight.T

    def stored(self, canonical: Tensor) -> Tensor:
        """The inverse of :meth:`canonical`."""
        return canonical.T

    def same_product(self, other: Shape) -> bool:
        sizes = (other.in_features, other.out_features)
        return other.takes == self.takes and sizes == (self.in_features, self.out_features)

    def resized(self, inputs: int, outputs: int) -> EmbeddingShape:
        return replace(self, in_features=inputs, out_features=outputs)

    @property
    def module_sizes(self) -> dict[str, int]:
        return {"num_embeddings": self.in_features, "embedding_dim": self.out_features}

    def bare(self) -> nn.Embedding:
        """An uninitialized ``nn.Embedding``."""
        return self.table(self.out_features)

    def table(self, width: int) -> nn.Embedding:
        """An uninitialized table of another width."""
        layer: nn.Embedding = nn.utils.skip_init(  # type: ignore[no-untyped-call]
            nn.Embedding,
            self.in_features,
            width,
            padding_idx=self.padding_idx,
            scale_grad_by_freq=self.scale_grad_by_freq,
            sparse=self.sparse,
            dtype=self.dtype,
            device=self.device,
        )
        return layer

    def counted_on(self, rows: int, inputs: tuple[Sizes, ...]) -> EmbeddingShape:
        return replace(self, rows=rows)

    def examples(self, numbers: torch.Generator) -> list[Tensor]:
        size, device = (self.rows,), numbers.device
        return [torch.randint(self.in_features, size, device=device, generator=numbers)]

    def example(self) -> Tensor:
        numbers = torch.Generator().manual_seed(0)
        return torch.randint(self.in_features, (16,), generator=numbers).to(self.device)

    def input_rows(self, data: Tensor, mask: Tensor | None) -> Iterator[Tensor]:
        yield data.reshape(-1) if mask is None else data[mask]

    def weight_gradients(self, data: Tensor, gradient: Tensor) -> Iterator[Tensor]:
        g = gradient.to(rows.wide(gradient)).reshape(len(gradient), -1, gradient.shape[-1])
        for indices, part in zip(data.reshape(len(data), -1), g, strict=True):
            table = part.new_zeros(self.in_features, self.out_features)
            yield table.index_add_(0, indices, part).T[None, None]

    def inner_products(self, data: Tensor, gradient: Tensor, left: Tensor, right: Tensor) -> Tensor:
        g = gradient.reshape(len(gradient), 1, -1, gradient.shape[-1])
        columns = [right[..., where].permute(0, 3, 1, 2) for where in data.reshape(len(data), -1)]
        pairs = zip(g, columns, strict=True)
        found = [rows.products(part[None], each[None], left, None) for part, each in pairs]
        return torch.cat(found)

    def __str__(self) -> str:
        return f"embedding {self.in_features}→{self.out_features}"


class _Embedding(Kind):
    name = "embedding"
    classes = (nn.Embedding,)

    def shape(self, module: Any) -> EmbeddingShape:
        entries, width = module.weight.shape
        return EmbeddingShape(
            entries,
            width,
            module.weight.dtype,
            module.weight.device,
            module.padding_idx,
            module.sparse,
            module.scale_grad_by_freq,
            module.max_norm,
        )

    def attributes(self, module: Any, args: Any, kwargs: Any) -> dict[str, AttributeValue]:
        return EmbeddingShape(module.num_embeddings, module.embedding_dim).attributes

    def parse(
        self, text: str, bias: bool, dtype: torch.dtype, device: torch.device = CPU
    ) -> EmbeddingShape | None:
        found = re.fullmatch(r"embedding ([0-9]{1,9})→([0-9]{1,9})", text)
        return EmbeddingShape(int(found[1]), int(found[2]), dtype, device) if found else None

    def application(self, call: Call, is_weight: Callable[[Any], bool]) -> Application | None:
        if call.name != "embedding":
            return None
        # F.embedding takes the table second, torch.embedding first.
        given = dict(zip(_FUNCTIONAL, call.args, strict=False)) | dict(call.kwargs)
        native = "indices" in given or is_weight(given.get("input"))
        if native or not (is_weight(given.get("weight")) or _is_index(given.get("input"))):
            given = dict(zip(_NATIVE, call.args, strict=False)) | dict(call.kwargs)
        data = given.get("input", given.get("indices"))
        weight: Any = given.get("weight")
        if getattr(weight, "ndim", 0) != 2 or given.get("max_norm") is not None:
            return None
        padding = given.get("padding_idx")
        if padding is not None:
            padding = None if padding == -1 and "indices" in given else padding % len(weight)
        entries, width = weight.shape
        shape = EmbeddingShape(
            entries,
            width,
            weight.dtype,
            weight.device,
            padding,
            bool(given.get("sparse", False)),
            bool(given.get("scale_grad_by_freq", False)),
        )
        return Application(shape, weight, data)


def _is_index(value: Any) -> bool:
    return not (value.dtype.is_floating_point or value.dtype.is_complex)


_FUNCTIONAL = (
    *("input", "weight", "padding_idx", "max_norm", "norm_type"),
    *("scale_grad_by_freq", "sparse"),
)
_NATIVE = ("weight", "indices", "padding_idx", "scale_grad_by_freq", "sparse")

KIND = _Embedding()
