"""Linear operators: ``nn.Linear``, Hugging Face's ``Conv1D``, and products with a matrix."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fxcompress.operators import rows
from fxcompress.operators.calls import Application, Call, same
from fxcompress.operators.kind import Kind
from fxcompress.operators.shape import CPU, Shape, Sizes
from fxcompress.operators.words import AttributeValue, Takes


@dataclass(frozen=True)
class LinearShape(Shape):
    """A linear operator: W is (m x n) = (out_features x in_features).

    Attributes:
        transposed: the weight is stored as (n x m), as Hugging Face's ``Conv1D`` has it.
        rows: positions that multiply-accumulates are counted for.
    """

    in_features: int
    out_features: int
    bias: bool
    dtype: torch.dtype = torch.float32
    device: torch.device = CPU
    transposed: bool = False
    rows: int = 1

    @property
    def op(self) -> str:
        """The canonical operator of the shape."""
        return "linear"

    @property
    def takes(self) -> Takes:
        return "rows"

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
        return True

    @property
    def informative_rows(self) -> int:
        return self.in_features

    @property
    def attributes(self) -> dict[str, AttributeValue]:
        """What rules know of it."""
        n, m = self.in_features, self.out_features
        return {"in_features": n, "out_features": m, "bias": self.bias}

    @property
    def full_rank(self) -> int:
        return min(self.in_features, self.out_features)

    @property
    def weights(self) -> int:
        """Entries of the dense weight."""
        return self.in_features * self.out_features

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the dense operator."""
        return self.rows * self.weights

    @property
    def reading(self) -> tuple[Any, ...]:
        """How the operator reads its input: equal for those that see the same rows of one value."""
        return ()

    def canonical(self, weight: Tensor) -> Tensor:
        """The canonical layout (m x n) of a stored weight."""
        return weight.T if self.transposed else weight

    def stored(self, canonical: Tensor) -> Tensor:
        """The inverse of :meth:`canonical`."""
        return canonical.T if self.transposed else canonical

    @property
    def is_mirrored(self) -> bool:
        return self.transposed

    def mirrored(self) -> LinearShape:
        return replace(self, transposed=not self.transposed)

    def resized(self, inputs: int, outputs: int) -> LinearShape:
        return replace(self, in_features=inputs, out_features=outputs)

    @property
    def module_sizes(self) -> dict[str, int]:
        n, m = self.in_features, self.out_features
        return {"in_features": n, "out_features": m, "nx": n, "nf": m}

    def bare(self) -> nn.Linear:
        """An uninitialized ``nn.Linear``."""
        layer: nn.Linear = nn.utils.skip_init(  # type: ignore[no-untyped-call]
            nn.Linear,
            self.in_features,
            self.out_features,
            bias=self.bias,
            dtype=self.dtype,
            device=self.device,
        )
        return layer

    def applying(self, weight: nn.Parameter) -> nn.Module:
        return Product(weight) if self.transposed else super().applying(weight)

    def counted_on(self, rows: int, inputs: tuple[Sizes, ...]) -> LinearShape:
        return replace(self, rows=rows)

    def examples(self, numbers: torch.Generator) -> list[Tensor]:
        size = (self.rows, self.in_features)
        return [torch.randn(size, device=numbers.device, generator=numbers).to(self.dtype)]

    def example(self) -> Tensor:
        numbers = torch.Generator().manual_seed(0)
        return torch.randn((16, self.in_features), generator=numbers).to(self.device, self.dtype)

    def input_rows(self, data: Tensor, mask: Tensor | None) -> Iterator[Tensor]:
        yield rows.counted(data, mask)

    def weight_gradients(self, data: Tensor, gradient: Tensor) -> Iterator[Tensor]:
        wide = rows.wide(gradient)
        g = gradient.to(wide).reshape(len(gradient), -1, gradient.shape[-1])
        a = data.to(wide).reshape(len(data), -1, data.shape[-1])
        some = max(1, rows.BLOCK // self.weights)
        for part, inputs in zip(torch.split(g, some), torch.split(a, some), strict=True):
            yield (part.transpose(1, 2) @ inputs).unsqueeze(1)

    def squared_gradients(self, data: Tensor, gradient: Tensor, *, entries: bool) -> Tensor:
        if data.dim() > 2:
            return super().squared_gradients(data, gradient, entries=entries)
        # One position a sample: (g_i a_j)² = g_i² a_j².
        a, g = (each.to(torch.float64).square() for each in (data, gradient))
        a, g = a.reshape(-1, a.shape[-1]), g.reshape(-1, g.shape[-1])
        return (g.T @ a)[None] if entries else (g.T @ a.mean(1))[None]

    def inner_products(self, data: Tensor, gradient: Tensor, left: Tensor, right: Tensor) -> Tensor:
        g = gradient.reshape(len(gradient), 1, -1, gradient.shape[-1])
        a = data.to(gradient.dtype).reshape(len(data), 1, -1, data.shape[-1])
        some = max(1, rows.BLOCK // (g.shape[2] * left.shape[2]))
        pairs = zip(torch.split(g, some), torch.split(a, some), strict=True)
        return torch.cat([rows.products(part, inputs, left, right) for part, inputs in pairs])

    def __str__(self) -> str:
        return f"linear {self.in_features}→{self.out_features}"


def is_hf_conv1d(module: nn.Module) -> bool:
    """Hugging Face's ``Conv1D``: a linear layer with an (in, out) weight."""
    library = sys.modules.get("transformers.pytorch_utils")
    return library is not None and isinstance(module, library.Conv1D)


class Product(nn.Module):
    """``x @ weight``, of a weight (n x m)."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) to (..., m)."""
        return x @ self.weight


class _Linear(Kind):
    name = "linear"
    classes = (nn.Linear, Product)

    def owns(self, module: nn.Module) -> bool:
        return super().owns(module) or is_hf_conv1d(module)

    def is_plain(self, module: nn.Module) -> bool:
        if is_hf_conv1d(module):
            return type(module).__name__ == "Conv1D"
        return super().is_plain(module)

    def attributes(
        self, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> dict[str, AttributeValue]:
        # By the module's own words: a quantized weight is no matrix of that size.
        if is_hf_conv1d(module):
            return LinearShape(int(module.nx), int(module.nf), True).attributes
        if isinstance(module, nn.Linear):
            bias = module.bias is not None
            return LinearShape(module.in_features, module.out_features, bias).attributes
        return self.shape(module).attributes

    def shape(self, module: Any) -> LinearShape:
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() != 2:
            raise ValueError(f"{type(module).__name__} has no weight that is a matrix")
        transposed = is_hf_conv1d(module) or isinstance(module, Product)
        m, n = weight.shape[::-1] if transposed else weight.shape
        bias = getattr(module, "bias", None) is not None
        return LinearShape(n, m, bias, weight.dtype, weight.device, transposed)

    def parse(
        self, text: str, bias: bool, dtype: torch.dtype, device: torch.device = CPU
    ) -> LinearShape | None:
        found = re.fullmatch(r"linear ([0-9]{1,9})→([0-9]{1,9})", text)
        return LinearShape(int(found[1]), int(found[2]), bias, dtype, device) if found else None

    def application(self, call: Call, is_weight: Callable[[Any], bool]) -> Application | None:
        name, args = call.name, call.args
        if name == "linear":
            data, weight, bias = linear_arguments(args, call.kwargs)
            return _product(data, weight, bias, transposed=False)
        if name == "einsum":
            return _einsum(args, is_weight)
        place = _MATRIX.get(name)
        if place is None or len(args) <= place or not is_weight(args[place]):
            return None
        if name != "addmm":
            return _product(args[0], args[1], None, transposed=True) if not call.kwargs else None
        scaled = any(call.kwargs.get(word, 1) != 1 for word in ("alpha", "beta"))
        return None if scaled else _product(args[1], args[2], args[0], transposed=True)


# Functions that multiply by a matrix (n x m), and where it stands.
_MATRIX = {"matmul": 1, "__matmul__": 1, "mm": 1, "addmm": 2}


def _product(data: Any, weight: Any, bias: Any, *, transposed: bool) -> Application | None:
    if getattr(weight, "ndim", 0) != 2:
        return None
    n, m = weight.shape if transposed else weight.shape[::-1]
    shape = LinearShape(n, m, False, weight.dtype, weight.device, transposed)
    after = partial(torch.add, bias) if bias is not None else same
    return Application(shape, weight, data, after=after, bias=bias)


def _einsum(args: tuple[Any, ...], is_weight: Callable[[Any], bool]) -> Application | None:
    """A sum over one letter: ``bi,oi->bo``, ``...i,io->...o``, ``oi,bit->bot``."""
    if not args or not isinstance(args[0], str):
        return None
    operands = args[1] if len(args) == 2 and isinstance(args[1], list | tuple) else args[1:]
    letters = _letters(args[0])
    if letters is None or len(operands) != 2 or not any(map(is_weight, operands)):
        return None
    data, weight = operands
    of_data, of_weight, out = letters
    if not is_weight(weight):
        data, weight, of_data, of_weight = weight, data, of_weight, of_data
    if "." in of_weight or len(of_weight) != 2:
        return None
    first = of_weight[0] in of_data
    summed, free = of_weight[not first], of_weight[first]
    if summed not in of_data or of_data.replace(summed, "") != out.replace(free, ""):
        return None
    if summed in out or free not in out or free in of_data:
        return None
    made = _product(data, weight, None, transposed=of_weight[0] == summed)
    if made is None:
        return None
    before, after = _place(of_data, summed), _place(out, free)
    return replace(
        made,
        before=same if before == -1 else partial(torch.movedim, source=before, destination=-1),
        after=same if after == -1 else partial(torch.movedim, source=-1, destination=after),
    )


def _letters(equation: str) -> tuple[str, str, str] | None:
    """The letters of two operands and of what is made of them, ``.`` for an ellipsis.

    None if a letter stands twice in one of them.
    """
    found = _EINSUM.fullmatch(equation.replace(" ", "").replace("...", "."))
    if found is None or any(len({*each}) < len(each) for each in found.groups()):
        return None
    return found[1], found[2], found[3]


_EINSUM = re.compile(r"([A-Za-z.]+),([A-Za-z.]+)->([A-Za-z.]+)")
_letters._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _place(letters: str, letter: str) -> int:
    """The dimension of a letter, where ``.`` stands for any number of them."""
    at = letters.index(letter)
    return at if "." in letters[at:] else at - len(letters)


def linear_arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """Input, weight and bias (or None) of a call of ``F.linear``, however they were passed.

    >>> linear_arguments(("x",), {"bias": "b", "weight": "w"})
    ('x', 'w', 'b')
    """
    given = dict(zip(("input", "weight", "bias"), args, strict=False)) | dict(kwargs)
    return given["input"], given["weight"], given.get("bias")


KIND = _Linear()
