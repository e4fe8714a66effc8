"""Save and load: ``model.fxcompress.safetensors`` and ``plan.json``; nothing is pickled.

The weights do not lie under the name ``model.safetensors`` on purpose: Hugging Face's
``from_pretrained`` would take that file for the dense model, and fill what it cannot find with
random numbers.
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_model
from torch import Tensor, nn

from fxcompress.errors import LoadError
from fxcompress.forms import form_words
from fxcompress.plan import FORMAT, Plan, attach_plan, history, plan_of
from fxcompress.rewrite import apply_plan, empty_bodies, mismatches, skeleton

WEIGHTS = "model.fxcompress.safetensors"
PLAN = "plan.json"


def save(model: nn.Module, directory: str | PathLike[str]) -> Path:
    """Write a compressed model: weights, plan and, for a Hugging Face model, its config.

    Args:
        model: came from :func:`fxcompress.compile` or :func:`fxcompress.load`.
        directory: made if it is missing.

    Returns:
        The directory.

    Raises:
        RewriteError: the model carries no plan.
    """
    plan = plan_of(model)
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    save_model(model, str(path / WEIGHTS), metadata={"format": "pt", "fxcompress": str(FORMAT)})
    (path / PLAN).write_text(plan.model_dump_json(indent=1), encoding="utf-8")
    for name in ("config", "generation_config"):
        config: Any = getattr(model, name, None)
        if hasattr(config, "save_pretrained"):
            config.save_pretrained(path)
    return path


def load(
    directory: str | PathLike[str],
    model: nn.Module | None = None,
    *,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """Load a model saved by :func:`save`.

    Args:
        directory: as given to :func:`save`.
        model: a freshly built model of the original architecture (its weights do not matter;
            it is rewritten in place).  Not needed for a Hugging Face model.
        device: where to put it.

    Returns:
        The compressed model, in eval mode, on ``device``.

    Raises:
        LoadError: files are missing or broken, ``model`` is not what the plan was made for, or
            the weights do not fit it exactly.
    """
    path = Path(directory)
    plan = read_plan(path)
    stored = _read_weights(path / WEIGHTS)
    if model is None:
        model = _build_pretrained(path, plan)
    if history(model):
        raise LoadError(
            f"this {type(model).__name__} is compressed already: build one as it was before "
            "compression and pass that"
        )
    trial = skeleton(model)  # so that a model that does not fit is left as it was
    _rewrite_empty(trial, plan)
    misfits = _misfits(trial.state_dict(), stored)
    if misfits:
        raise LoadError(f"{path / WEIGHTS} does not fit {plan.model_class}: {misfits}")
    _rewrite_empty(model, plan)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in stored and tensor.dtype != stored[name].dtype:
            tensor.data = tensor.data.to(stored[name].dtype)  # as it was saved
    model.load_state_dict(stored, strict=False)  # it is: only names of tied weights may be missing
    attach_plan(model, plan)
    model.to(device)
    nn.Module.train(model, False)  # torch.export forbids .eval() on what it returns
    return model


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise LoadError(f"{path} is missing: not a directory written by fxcompress.save") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise LoadError(f"{path} cannot be read: {error}; save the model again") from error


def _rewrite_empty(model: nn.Module, plan: Plan) -> None:
    """Give a model the structure of the saved one; the factors have no values yet."""
    for step in (*plan.earlier, plan):
        problems = mismatches(model, step)
        if problems:
            raise LoadError(
                f"this {type(model).__name__} is not what the plan was made for "
                f"({plan.model_class}): {problems}"
            )
        apply_plan(model, step, empty_bodies(step, model))


def _misfits(state: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> str:
    """What keeps ``stored`` from being the whole content of ``state``; empty if nothing does."""
    given = {_memory(state[name]) for name in stored if name in state}
    missing = [n for n, t in state.items() if n not in stored and _memory(t) not in given]
    problems = [f"the file has no {name}" for name in missing]
    for name, tensor in stored.items():
        place = state.get(name)
        if place is None:
            problems.append(f"the model has no {name}")
        elif place.is_meta:
            problems.append(f"the model's {name} is on the meta device: build it on the CPU")
        elif place.shape != tensor.shape:
            shapes = f"{tuple(tensor.shape)} in the file, {tuple(place.shape)} in the model"
            problems.append(f"{name} is {shapes}")
        elif place.is_floating_point() != tensor.is_floating_point():
            problems.append(f"{name} is {tensor.dtype} in the file, {place.dtype} in the model")
    more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
    return "; ".join(problems[:5]) + more


def _memory(tensor: Tensor) -> tuple[int, torch.Size]:
    """Equal for the names of one tied weight."""
    return tensor.data_ptr() or id(tensor), tensor.shape


def read_plan(directory: str | PathLike[str]) -> Plan:
    """The plan of a saved model.

    Raises:
        LoadError: it is missing, broken, or of another version.
    """
    path = Path(directory) / PLAN
    try:
        text = path.read_text(encoding="utf-8")
        version = json.loads(text).get("format")
    except FileNotFoundError as error:
        raise LoadError(f"{path} is missing: not a directory written by fxcompress.save") from error
    except (ValueError, AttributeError, OSError, RecursionError) as error:
        raise LoadError(f"{path} cannot be read: {error}") from error
    if version != FORMAT:
        raise LoadError(
            f"{path} has format {version}, and this version of fxcompress reads {FORMAT}"
        )
    try:
        plan = Plan.model_validate_json(text)
    except ValidationError as error:
        raise LoadError(f"{path} is not a valid plan: {error}") from error
    steps = (*plan.earlier, plan)
    used = {str(site.form) for step in steps for site in step.rewritten}
    if unknown := sorted(used - {*form_words(), *(name for s in steps for name in s.templates)}):
        raise LoadError(
            f"{path} uses forms that are not known here: {', '.join(unknown)}; install or import "
            "the package that registers them (fxcompress.register_form)"
        )
    return plan


def _build_pretrained(path: Path, plan: Plan) -> nn.Module:
    """An uninitialized Hugging Face model of the class that the plan names."""
    module_name, _, class_name = plan.model_class.rpartition(".")
    if not module_name.startswith("transformers.models.") or not (path / "config.json").exists():
        raise LoadError(
            f"{plan.model_class} is not a Hugging Face model: build one as it was before "
            "compression and pass it, load(directory, model)"
        )
    try:
        import transformers
    except ImportError as error:
        raise LoadError("loading this needs transformers: pip install 'fxcompress[hf]'") from error
    try:
        cls: Any = getattr(importlib.import_module(module_name), class_name, None)
    except ImportError:
        cls = None
    if not (inspect.isclass(cls) and issubclass(cls, transformers.PreTrainedModel)):
        raise LoadError(
            f"transformers {transformers.__version__} has no model class {plan.model_class}"
        )
    dtype = getattr(torch, plan.sites[0].dtype) if plan.sites else torch.float32
    try:
        built: Any = cls
        config: Any = built.config_class.from_pretrained(path)
        model: nn.Module = built._from_config(config, dtype=dtype)
    except Exception as error:
        raise LoadError(
            f"{path / 'config.json'} does not describe a {class_name}: {error}"
        ) from error
    if (path / "generation_config.json").exists():
        generation = transformers.GenerationConfig.from_pretrained(path)
        model.generation_config = generation  # type: ignore[assignment]
    return model
