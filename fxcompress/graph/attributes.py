"""Attributes of operators without a weight: ``gelu(x, approximate="tanh")`` has one.

Each is found by name in a leaf module, or among the arguments of a function, with torch's own
default where the call leaves it out.  Dimensions are counted from the end, so that ``dim=1`` and
``dim=-1`` of a matrix are one value.  What cannot be told (a tensor where a number might
stand) is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, cast

from torch import Tensor, nn

from fxcompress.graph.operator import AttributeValue

_NEEDED = object()


@dataclass(frozen=True)
class _Argument:
    """Where an attribute stands.

    Attributes:
        name: of the keyword.
        place: among the positional arguments; the operand is at 0.
        default: of torch; none if the argument is needed.
        alias: another name of it, of a keyword or of the module's field.
        dimension: whether it counts dimensions.
        types: of its value.
    """

    name: str
    place: int
    default: Any = _NEEDED
    alias: str = ""
    dimension: bool = False
    types: tuple[type, ...] = (int,)


def _dim(place: int = 1, default: Any = _NEEDED, name: str = "dim") -> _Argument:
    return _Argument(name, place, default, name.replace("dim", "axis"), dimension=True)


def _number(name: str, place: int, default: Any = _NEEDED, alias: str = "") -> _Argument:
    return _Argument(name, place, default, alias, types=(int, float))


_ARGUMENTS: Mapping[str, tuple[_Argument, ...]] = MappingProxyType(
    {
        "add": (_number("other", 1),),
        "sub": (_number("other", 1),),
        "mul": (_number("other", 1),),
        "div": (_number("other", 1),),
        "pow": (_number("exponent", 1),),
        # Place 9 is beyond a function's arguments: there the operand tells.
        "batch_norm": (_Argument("num_features", 9), _number("eps", 7, 1e-5)),
        "cat": (_dim(default=0),),
        "chunk": (_Argument("chunks", 1), _dim(2, 0)),
        "dropout": (_number("p", 1, 0.5),),
        "elu": (_number("alpha", 1, 1.0),),
        "flatten": (_dim(1, 0, "start_dim"), _dim(2, -1, "end_dim")),
        "gelu": (_Argument("approximate", 1, "none", types=(str,)),),
        "getitem": (_Argument("index", 1),),
        "glu": (_dim(default=-1),),
        "group_norm": (_Argument("num_groups", 1), _number("eps", 4, 1e-5)),
        "layer_norm": (_number("eps", 4, 1e-5),),
        "leaky_relu": (_number("negative_slope", 1, 0.01),),
        "log_softmax": (_dim(),),
        "rms_norm": (_number("eps", 3, alias="variance_epsilon"),),
        "scaled_dot_product_attention": (
            _number("dropout_p", 4, 0.0),
            _Argument("is_causal", 5, False, types=(bool,)),
        ),
        "softmax": (_dim(),),
        "split": (_dim(2, 0),),
        "squeeze": (_dim(),),
        "stack": (_dim(default=0),),
        # Without them it is the transpose of a matrix, ``x.mT``.
        "transpose": (_dim(1, -2, "dim0"), _dim(2, -1, "dim1")),
        "unbind": (_dim(default=0),),
        "unsqueeze": (_dim(),),
    }
)


def plain_attributes(
    op: str, module: nn.Module | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, AttributeValue]:
    """The attributes of a call of an operator by its canonical name.

    Args:
        op: the operator.
        module: the leaf module that was called; None for a function.
        args: what it was called with.
        kwargs: likewise.
    """
    operand = _operand(args, kwargs)
    found: dict[str, AttributeValue] = {}
    for argument in _ARGUMENTS.get(op, ()):
        value = _given(argument, module, args, kwargs)
        # A bool is an int to Python, and no dimension.
        if type(value) not in argument.types:
            continue
        if argument.dimension and value >= 0:
            if operand is None:
                continue
            # These two make a new dimension, which counts.
            value -= operand.dim() + (op in ("unsqueeze", "stack"))
        found[argument.name] = value
    if op in ("add", "mul") and "other" not in found and args and _is_number(args[0]):
        found["other"] = args[0]  # 2 + x: the number may stand first
    if op == "batch_norm" and module is None and operand is not None:
        found["num_features"] = operand.shape[1]
    if op == "transpose" and len(found) == 2:
        # Either order is the same.
        found["dim0"], found["dim1"] = sorted(cast("list[int]", [*found.values()]))
    return found


def _given(
    argument: _Argument, module: nn.Module | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """The value of an argument, or of a module's field; ``_NEEDED`` if it has none."""
    for name in (argument.name, argument.alias):
        if module is not None and hasattr(module, name):
            return getattr(module, name)
        if module is None and name in kwargs:
            return kwargs[name]
    if module is not None:
        return _NEEDED
    return args[argument.place] if argument.place < len(args) else argument.default


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _operand(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The tensor that an operator was given; of a list, one of most dimensions.

    Not the first one: torch lets an empty vector stand among the matrices that it concatenates.
    """
    for operand in (*args[:1], *kwargs.values()):
        several = operand if isinstance(operand, tuple | list) else (operand,)
        tensors = [each for each in several if isinstance(each, Tensor)]
        if tensors:
            return max(tensors, key=Tensor.dim)
    return None
