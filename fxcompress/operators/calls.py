"""Calls of torch functions, and what they apply to what."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fxcompress.operators.shape import Shape


def function_name(function: Any) -> str:
    """Name of a torch function; of the attribute for ``Tensor.T.__get__``.

    >>> from torch import ops
    >>> [function_name(each) for each in (Tensor.relu, ops.aten.relu, ops.quantized.linear)]
    ['relu', 'relu', 'quantized_linear']
    """
    packet = getattr(function, "overloadpacket", function)
    name = getattr(packet, "__name__", str(function)).split(".")[0]
    # An operator that some library registered has its own meaning, whatever its name.
    library = getattr(packet, "_qualified_op_name", "aten::").partition("::")[0]
    if library != "aten":
        return f"{library}_{name}"
    if name in ("__get__", "__set__"):
        descriptor = getattr(function, "__self__", None)
        return getattr(getattr(descriptor, "fget", descriptor), "__name__", "attribute")
    return name


# torch.compile need not look into it.
function_name._dynamo_marked_constant = True  # type: ignore[attr-defined]


def same(value: Tensor) -> Tensor:
    """The value itself."""
    return value


@dataclass(frozen=True, eq=False)
class Call:
    """A call of a torch function.

    Attributes:
        name: of the function (``"__matmul__"``), without a library.
        args, kwargs: what it is given: tensors, or what stands for them.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Application:
    """A call as the application of a weight to a value: ``after(operator(before(data)))``.

    Attributes:
        shape: of the operator, without a bias, whose weight is stored as the call has it.
        weight: that is applied.
        data: the value that it is applied to.
        before: brings the value into the order that the operator takes.
        after: brings the operator's output into the order of the call's, and adds what it adds.
        bias: what ``after`` adds; None for nothing.
    """

    shape: Shape
    weight: Any
    data: Any
    before: Callable[[Tensor], Tensor] = same
    after: Callable[[Tensor], Tensor] = same
    bias: Any = None
