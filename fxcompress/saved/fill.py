"""Stored weights and the model they belong to: whether they fit, and putting them there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from fxcompress.errors import LoadError
from fxcompress.saved.weights import Weights

SHOWN = 5
"""Problems that one message tells."""


def fill(model: nn.Module, weights: Weights, *, mapped: bool) -> None:
    """Give a rewritten model the stored values, one after the other.

    Args:
        model: fits; what it has on the meta device is replaced, all else is written to.
        weights: of the save.
        mapped: whether to leave them in their files.
    """
    places = model.state_dict(keep_vars=True)
    homes = _homes(model)
    for name, value in weights.tensors():
        place = places[name]
        if place.is_meta:
            own = value if mapped else value.clone()
            made = (
                nn.Parameter(own, place.requires_grad) if isinstance(place, nn.Parameter) else own
            )
            for module, key in homes[id(place)]:
                setattr(module, key, made)
        elif mapped:
            place.data = value
        elif place.dtype != value.dtype:
            place.data = value.to(place.device, copy=True)  # as it was saved
        else:
            with torch.no_grad():
                place.copy_(value)


def _homes(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Where tensors are held, by their identity; tied ones in several places."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            found.setdefault(id(tensor), []).append((module, name))
    return found


def require_values(model: nn.Module, state: Iterable[Tensor]) -> None:
    """What is not in the state has to have values."""
    given = {id(tensor) for tensor in state}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta and id(tensor) not in given:
            raise LoadError(
                f"the model's {name} is on the meta device, and no save holds it (it is not in "
                "state_dict()): build the model on the CPU"
            )


def misfits(state: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> str:
    """What keeps ``stored`` from being the whole content of ``state``; empty if nothing does."""
    given = {_memory(state[name]) for name in stored if name in state}
    missing = [n for n, t in state.items() if n not in stored and _memory(t) not in given]
    problems = [f"the file has no {name}" for name in missing]
    for name, tensor in stored.items():
        place = state.get(name)
        if place is None:
            problems.append(f"the model has no {name}")
        elif place.shape != tensor.shape:
            shapes = f"{tuple(tensor.shape)} in the file, {tuple(place.shape)} in the model"
            problems.append(f"{name} is {shapes}")
        elif place.is_floating_point() != tensor.is_floating_point():
            problems.append(f"{name} is {tensor.dtype} in the file, {place.dtype} in the model")
    return _told(problems)


def _memory(tensor: Tensor) -> tuple[int, torch.Size]:
    """Equal for the names of one tied weight."""
    return tensor.data_ptr() or id(tensor), tensor.shape


def require_untied(model: nn.Module, weights: Weights) -> None:
    """Two stored tensors cannot be one of the model."""
    kept: dict[tuple[int, torch.Size], str] = {}
    for name, place in model.state_dict(keep_vars=True).items():
        if name in weights.header and isinstance(place, Tensor) and place.numel():
            twin = kept.setdefault(_memory(place), name)
            if twin != name and not torch.equal(weights.tensor(twin), weights.tensor(name)):
                raise LoadError(
                    f"{weights.path} does not fit: the model ties {name} to {twin}, and in the "
                    "file they differ: build it untied (tie_word_embeddings=False)"
                )


def _told(problems: list[str]) -> str:
    more = f" (and {len(problems) - SHOWN} more)" if len(problems) > SHOWN else ""
    return "; ".join(problems[:SHOWN]) + more
