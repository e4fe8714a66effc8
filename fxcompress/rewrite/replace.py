"""Exchange modules of a tree for others."""

from __future__ import annotations

from torch import nn


class Places:
    """Where the modules of a tree hang; a shared module has several parents.

    The tree is walked once, however many of its modules are replaced.  In between nothing else
    may move them.
    """

    def __init__(self, model: nn.Module) -> None:
        # With the module itself, so that no other one can get its id.
        self._held: dict[int, tuple[nn.Module, list[tuple[nn.Module, str]]]] = {}
        for parent in model.modules():
            for key, child in parent._modules.items():
                if child is not None:
                    self._held.setdefault(id(child), (child, []))[1].append((parent, key))

    def replace(self, old: nn.Module, new: nn.Module) -> None:
        """Put ``new`` wherever ``old`` hangs in the tree."""
        _, places = self._held.pop(id(old), (old, []))
        for parent, key in places:
            parent._modules[key] = new
        self._held[id(new)] = (new, places)


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` wherever ``old`` hangs in the tree of ``model``."""
    Places(model).replace(old, new)
