"""Models that accelerate offloads: a copy without its hooks, with weights where these read them.

before::

    model.fc.weight            # on the meta device; a hook loads it while fc runs
    model.fc._hf_hook          # AlignDevicesHook(offload=True, weights_map=...)

after::

    copy.fc.weight             # the tensor in weights_map, or the file on the disk, mapped

The copy takes no memory either: what ``cpu_offload`` keeps is shared with it, and of what
``disk_offload`` wrote the system reads what is touched, and may forget it again.  But it is a model
like any other, which nothing has to know about.  It runs on the processor.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor, nn

from fxcompress.errors import RecordError
from fxcompress.mapped import map_tensor
from fxcompress.parking import Parking
from fxcompress.rewrite.skeleton import copied

M = TypeVar("M", bound=nn.Module)

CPU = torch.device("cpu")

_ADDED = ("_hf_hook", "_old_forward", "hf_device_map")
_WRAPPED = ("to", "cuda", "npu", "xpu", "mlu", "sdaa", "musa", "neuron")
"""Methods that dispatch_model sets on a model, to warn who calls them."""


def is_offloaded(model: nn.Module) -> bool:
    """Whether hooks of accelerate load some of the weights of a model while it runs."""
    return any(hook.offload for _, hook in _aligning(model))


def resident(model: M) -> M:
    """A model whose weights have values; the model itself if accelerate has put no hooks on it.

    Args:
        model: stays as it is.

    Returns:
        A copy that shares all weights which are in memory, on the processor if some are not there.

    Raises:
        RecordError: its hooks do something else than to place weights, or have no value for one.
    """
    modules = model.modules() if isinstance(model, nn.Module) else ()  # or told later what it is
    if not any("_hf_hook" in vars(module) for module in modules):
        return model
    _require_known(model)
    memo: dict[int, Any] = {id(each): each for each in model.parameters()}
    hooks = [vars(module).get("_hf_hook") for module in model.modules()]
    memo |= {id(hook): hook for hook in hooks}
    copy: M = copied(model, memo)
    values = _Values(model)
    for (path, module), own in zip(model.named_modules(), copy.modules(), strict=True):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                own._parameters[name] = values.parameter(_joined(path, name), parameter)
        for name, buffer in own._buffers.items():
            if buffer is not None:
                own._buffers[name] = values.of(_joined(path, name), buffer)
        _unhook(own)
    transformers: Any = sys.modules.get("transformers")
    if transformers is not None and isinstance(copy, transformers.PreTrainedModel):
        copy.tie_weights()  # disk_offload writes what is tied once for each of its names
    return copy


class _Values:
    """What the hooks of a model load.

    Args:
        model: with the hooks.
    """

    def __init__(self, model: nn.Module) -> None:
        tensors = [*model.parameters(), *model.buffers()]
        devices = {CPU if tensor.is_meta else tensor.device for tensor in tensors}
        self._gathered = len(devices) > 1
        self._parking = Parking()
        self._known: dict[Any, nn.Parameter] = {}
        self._maps: dict[str, tuple[Mapping[str, Tensor], str]] = {}
        for path, hook in _aligning(model):
            if not hook.offload:
                continue
            for name, _ in model.get_submodule(path).named_parameters():
                if hook.place_submodules or "." not in name:
                    self._maps[_joined(path, name)] = hook.weights_map, name
            for name, _ in model.get_submodule(path).named_buffers():
                if hook.offload_buffers and (hook.place_submodules or "." not in name):
                    self._maps[_joined(path, name)] = hook.weights_map, name

    def parameter(self, name: str, given: nn.Parameter) -> nn.Parameter:
        """What stands for a parameter; one for all names of a tied one."""
        if id(given) not in self._known:
            value = self.of(name, given)
            if value is given:
                return given
            place = value.data_ptr(), value.dtype, value.shape, value.stride()
            made = nn.Parameter(value, requires_grad=given.requires_grad)
            # Parameters with one memory are tied; those of empty ones have none.
            self._known[id(given)] = self._known.setdefault(place if value.numel() else name, made)
        return self._known[id(given)]

    def of(self, name: str, given: Tensor) -> Tensor:
        """A tensor by its name in the model, with its values: itself if that has them here."""
        if not given.is_meta:
            return given.detach().cpu() if self._gathered and given.device != CPU else given
        if name not in self._maps:
            raise RecordError(
                f"{name} is on the meta device, where tensors have no values, and no hook of "
                "accelerate loads it"
            )
        try:
            value = self._read(*self._maps[name])
        except (KeyError, OSError, RuntimeError) as error:
            raise RecordError(
                f"{name} is offloaded, and cannot be read: {type(error).__name__}: {error}"
            ) from error
        if value.shape != given.shape:
            raise RecordError(
                f"{name} is offloaded, and what was is of another shape: {tuple(value.shape)} in "
                f"place of {tuple(given.shape)}"
            )
        return self._as(value, given.dtype)

    def _as(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        """A value in a type, where it takes no memory."""
        return value if value.dtype == dtype else self._parking.park(value.to(dtype))

    def _read(self, weights: Any, name: str) -> Tensor:
        from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset

        while isinstance(weights, PrefixedDataset):
            weights, name = weights.dataset, f"{weights.prefix}{name}"
        if not isinstance(weights, OffloadedWeightsLoader) or name in weights.state_dict:
            found: Tensor = weights[name]
            return found.detach()
        about = weights.index[name]
        file = about.get("safetensors_file")
        if file is None:
            path = Path(weights.save_folder) / f"{name}.dat"
            return map_tensor(path, getattr(torch, about["dtype"]), about["shape"])
        with safe_open(file, "pt") as opened:
            value: Tensor = opened.get_tensor(about.get("weight_name", name))
        return self._as(value, getattr(torch, about["dtype"])) if "dtype" in about else value


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _hooks(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The hooks of every module with its path, those of a sequence one by one."""
    for path, module in model.named_modules():
        hook: Any = vars(module).get("_hf_hook")
        for each in getattr(hook, "hooks", (hook,)) if hook is not None else ():
            yield path, each


def _aligning(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The hooks that place weights, with the paths of their modules."""
    library: Any = sys.modules.get("accelerate.hooks")  # whoever put one there has imported it
    for path, hook in _hooks(model) if library is not None else ():
        if isinstance(hook, library.AlignDevicesHook):
            yield path, hook


def _require_known(model: nn.Module) -> None:
    known = {id(hook) for _, hook in _aligning(model)}
    for path, hook in _hooks(model):
        if id(hook) not in known:
            raise RecordError(
                f"accelerate put a {type(hook).__name__} on {path or 'the model'}, which does more "
                "than to place weights: take it off (accelerate.hooks.remove_hook_from_module("
                "model, recurse=True))"
            )


def _unhook(module: nn.Module) -> None:
    """Take what accelerate has set off a module of a copy."""
    own = vars(module)
    forward = own.pop("_old_forward", None)
    if forward is not None:
        del own["forward"]
        if getattr(forward, "__func__", None) is not type(module).forward:
            own["forward"] = forward  # it was replaced before
    for name in _ADDED:
        own.pop(name, None)
    for name in _WRAPPED:
        if hasattr(own.get(name), "__wrapped__"):
            del own[name]
