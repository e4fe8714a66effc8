"""What a model consists of, without its values: by this a change of it is noticed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, fx, nn


@dataclass(frozen=True)
class Structure:
    """Modules and tensors of a model by name.

    Attributes:
        classes: qualified class name of every module; of the model itself under ``""``.
        shapes: of every tensor in the state dict, shared ones under all their names.
        operations: of an ``fx.GraphModule``, kind and target of its nodes, in order.
    """

    classes: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    operations: tuple[str, ...] = ()


def structure_of(model: nn.Module) -> Structure:
    """The structure of a model as it is now."""
    modules = dict(model.named_modules(remove_duplicate=False))
    state = model.state_dict(keep_vars=True)
    return Structure(
        {path: _class(module) for path, module in modules.items()},
        {name: tuple(value.shape) for name, value in state.items() if isinstance(value, Tensor)},
        _operations(model),
    )


def _class(module: nn.Module) -> str:
    if isinstance(module, fx.GraphModule):  # every one of them has a class of its own
        return "torch.fx.GraphModule"
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _operations(model: nn.Module) -> tuple[str, ...]:
    if not isinstance(model, fx.GraphModule):
        return ()
    return tuple(
        f"{node.op} {getattr(node.target, '__name__', node.target)}"
        for node in model.graph.nodes
        if node.op.startswith("call")
    )


def changes(before: Structure, now: Structure) -> str:
    """What became different, in words; empty if nothing did."""
    found = [*_changes(before, now)]
    more = f" (and {len(found) - 5} more)" if len(found) > 5 else ""
    return "; ".join(found[:5]) + more


def _changes(before: Structure, now: Structure) -> Iterator[str]:
    told: list[str] = []  # what is below a module that changed is no news

    def news(path: str) -> bool:
        return not any(path == each or path.startswith(f"{each}.") for each in told)

    for path in sorted({*before.classes, *now.classes}):
        old, new = before.classes.get(path), now.classes.get(path)
        if old != new and news(path):
            told.append(path)
            shown = (_short(old), _short(new)) if _short(old) != _short(new) else (old, new)
            yield _difference(path or "the model itself", *shown)
            if not path:
                return
    for name in sorted({*before.shapes, *now.shapes}):
        was, is_now = before.shapes.get(name), now.shapes.get(name)
        if was != is_now and news(name):
            yield _difference(name, _text(was), _text(is_now))
    if before.operations != now.operations and not told:
        yield "its graph has other operations"


def _difference(what: str, old: str | None, new: str | None) -> str:
    if old is None:
        return f"{what} ({new}) was added"
    if new is None:
        return f"{what} ({old}) was removed"
    return f"{what} was {old} and is {new}"


def _short(qualified: str | None) -> str | None:
    return None if qualified is None else qualified.rpartition(".")[2]


def _text(shape: tuple[int, ...] | None) -> str | None:
    return None if shape is None else f"{shape}"
