"""Which parameters a model has, who owns them, and whose memory a tensor reads."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from fxcompress.graph.versions import storage


class Ownership:
    """The parameters and buffers of a model, each once, by memory.

    Two parameters with the same memory and shape are one, under two names: they are tied.
    """

    def __init__(self, model: nn.Module) -> None:
        self._keys: dict[int, int] = {}
        self._tensors: dict[int, Tensor] = {}
        self._owners: dict[int, list[tuple[str, str]]] = defaultdict(list)
        self._by_storage: dict[int, int | None] = {}
        self._learnt: set[int] = set()
        known: dict[Any, int] = {}
        for prefix, module in model.named_modules():
            parameters = [*module._parameters.items()]
            for index, (name, tensor) in enumerate([*parameters, *module._buffers.items()]):
                if tensor is None:
                    continue
                key = known.setdefault(_memory(tensor), id(tensor))
                self._keys[id(tensor)] = key
                self._tensors.setdefault(key, tensor)
                self._owners[key].append((prefix, name))
                if index < len(parameters):  # those of TorchScript are of no class of their own
                    self._learnt.add(key)
                    # Where several parameters are slices of one buffer, memory tells nothing.
                    address = storage(tensor)
                    same = self._by_storage.setdefault(address, key) == key
                    self._by_storage[address] = key if address and same else None

    def key(self, tensor: Tensor) -> int | None:
        """Identifies the parameter or buffer that a tensor is; None if it is none."""
        return self._keys.get(id(tensor))

    def parameter(self, tensor: Tensor) -> int | None:
        """The key of a parameter, given that or a view of it (transposed, a slice, ``.data``)."""
        key = self._keys.get(id(tensor))
        key = self._by_storage.get(storage(tensor)) if key is None else key
        return key if key in self._learnt else None

    def owners(self, key: int) -> set[str]:
        """Paths of the modules that hold a tensor."""
        return {prefix for prefix, _ in self._owners[key]}

    def tensor(self, key: int) -> Tensor:
        """The parameter or buffer itself."""
        return self._tensors[key]

    def names(self, key: int) -> tuple[str, ...]:
        """The names of a tensor in the state dict."""
        return tuple(".".join(filter(None, owner)) for owner in self._owners[key])

    def parameters(self) -> Iterator[tuple[int, Tensor]]:
        """All parameters with their keys."""
        return ((key, tensor) for key, tensor in self._tensors.items() if key in self._learnt)


def _memory(tensor: Tensor) -> Any:
    address = storage(tensor)
    if not address:
        return id(tensor)
    return address, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype
