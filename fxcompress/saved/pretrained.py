"""An uninitialized Hugging Face model from a config that may come from a stranger.

Its class is one of transformers' own, so no code comes with it; what a config can do is name code
elsewhere, ask for a download, or be of any size.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fxcompress.errors import LoadError
from fxcompress.plans.plan import Plan

CONFIGS = ("config.json", "generation_config.json")
"""Of Hugging Face models."""
SAVE_ID = "fxcompress_save"
"""In the metadata of the weights and in a saved ``config.json``: the id of the save."""

_MODULE = re.compile(r"transformers\.models(\.[a-z0-9_]+)+")
_SPACES = {*" \n\r\t"}

SLACK = 2**20
"""Entries of buffers that are not stored, such as tables of positions."""


def build_pretrained(path: Path, plan: Plan, stored: int) -> nn.Module:
    """An uninitialized Hugging Face model of the class that the plan names.

    Args:
        path: of the directory, with ``config.json``.
        plan: says the class, and how large the model was.
        stored: entries of all tensors in the file.

    Raises:
        LoadError: the class is none of transformers, or the config is not one of such a model.
    """
    if not (path / CONFIGS[0]).exists():
        raise LoadError(_NO_CONFIG.format(plan.model_class))
    cls = model_class(plan)
    require_harmless(path)
    largest = 2 * max(plan.model_before.parameters, stored) + SLACK
    try:
        config: Any = cls.config_class.from_pretrained(path)
    except Exception as error:
        raise _misdescribed(cls, path / CONFIGS[0], error) from error
    if hasattr(config, SAVE_ID):
        delattr(config, SAVE_ID)
    with torch.device("meta"), _Bounded(largest):
        from_config(cls, config, plan, path / CONFIGS[0])
    with _Unfilled():
        model: Any = from_config(cls, config, plan, path / CONFIGS[0])
    try:
        if (path / "generation_config.json").exists():
            generation = importlib.import_module("transformers").GenerationConfig
            model.generation_config = generation.from_pretrained(path)
    except Exception as error:
        raise _misdescribed(cls, path / CONFIGS[1], error) from error
    built: nn.Module = model
    return built


def from_config(cls: Any, config: Any, plan: Plan, source: object = "config.json") -> nn.Module:
    """A model of a class of transformers from its config, in the type that the plan says.

    Args:
        cls: from :func:`model_class`.
        config: of it.
        plan: says the type.
        source: of the config, for messages.

    Raises:
        LoadError: the config does not describe such a model.
    """
    dtype = getattr(torch, plan.sites[0].dtype) if plan.sites else torch.float32
    try:
        model: nn.Module = cls._from_config(config, dtype=dtype)
    except Exception as error:
        raise _misdescribed(cls, source, error) from error
    return model


def _misdescribed(cls: Any, source: object, error: Exception) -> LoadError:
    return LoadError(f"{source} does not describe a {cls.__name__}: {error}")


class _TooLargeError(Exception):
    """A model that has more parameters than the plan and the weights say."""


class _Bounded(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what is made on the meta device, and stops where it is too much.

    Only large tensors count: a model on the meta device takes as many small operations as it
    likes.
    """

    def __init__(self, most: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = most
        self.made = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        if function in _MAKERS and isinstance(out, torch.Tensor):
            self.made += out.numel()
            if self.made > self.most:
                raise _TooLargeError(
                    "it would be of more than twice the size that the plan and the weights have"
                )
        return out


class _Unfilled(TorchFunctionMode):
    """Leaves the memory of parameters as it is: their values follow.

    The system gives no memory before somebody writes to it.  Buffers that are not stored get their
    values while a model is built.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        place = args[0] if args else next(iter((kwargs or {}).values()), None)
        if isinstance(place, nn.Parameter) and getattr(function, "__name__", "") in _FILLERS:
            return place
        return function(*args, **(kwargs or {}))


_FILLERS = {
    *("normal_", "uniform_", "trunc_normal_", "constant_", "ones_", "zeros_", "zero_", "fill_"),
    *("copy_", "add_", "mul_", "clamp_", "erfinv_", "bernoulli_"),
    *("xavier_uniform_", "xavier_normal_", "kaiming_uniform_", "kaiming_normal_"),
}
"""What fills a tensor, of torch and of :mod:`torch.nn.init`."""

_MAKERS = {torch.ops.aten.empty.memory_format, torch.ops.aten.empty_strided.default}


_NO_CONFIG = (
    "{} is not a Hugging Face model: build one as it was before compression and pass it, "
    "load(directory, model)"
)


def model_class(plan: Plan) -> Any:
    """The class that a plan names, if it is a model of transformers; no other is imported.

    Raises:
        LoadError: it is none.
    """
    module_name, _, class_name = plan.model_class.rpartition(".")
    if not _MODULE.fullmatch(module_name):
        raise LoadError(_NO_CONFIG.format(plan.model_class))
    try:
        import transformers
    except ImportError as error:
        raise LoadError("loading this needs transformers: pip install 'fxcompress[hf]'") from error
    cls: Any = None
    # Other modules of transformers are scripts, and imported by nobody.
    if module_name.rpartition(".")[2].startswith("modeling_"):
        try:
            cls = getattr(importlib.import_module(module_name), class_name, None)
        except ImportError:
            cls = None
    if not (inspect.isclass(cls) and issubclass(cls, transformers.PreTrainedModel)):
        raise LoadError(
            f"transformers {transformers.__version__} has no model class {plan.model_class}"
        )
    return cls


def require_harmless(directory: Path) -> None:
    """Refuse configs that would fetch something, or write control characters into a message.

    Raises:
        LoadError: with the place.
    """
    for name in CONFIGS:
        _require_harmless(directory / name)


def _require_harmless(path: Path) -> None:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    except (OSError, ValueError, RecursionError) as error:
        raise LoadError(f"{path} cannot be read: {error}") from error
    for key, value in _entries(data):
        if isinstance(value, str):
            for text in (key, value):
                if any(not c.isprintable() and c not in _SPACES for c in text):
                    raise LoadError(f"{path}: {key}: it holds control characters: {value}")
            # transformers takes "owner/name" for code on the network
            if "_implementation" in key and re.search("[/:@]", value):
                raise LoadError(f"{path}: {key}: it would load code from elsewhere: {value}")
        if key == "use_pretrained_backbone" and value:
            raise LoadError(f"{path}: {key}: it would load a model from elsewhere")


def _entries(data: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """All values with the nearest key."""
    if isinstance(data, dict):
        for name, value in data.items():
            yield name, ""  # a key counts as text, too
            yield from _entries(value, name)
    elif isinstance(data, list):
        for value in data:
            yield from _entries(value, key)
    else:
        yield key, data
