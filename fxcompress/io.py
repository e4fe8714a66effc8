"""Save and load: ``model.fxcompress.safetensors`` and ``plan.json``; nothing is pickled.

The weights do not lie under the name ``model.safetensors`` on purpose: Hugging Face's
``from_pretrained`` would take that file for the dense model, and fill what it cannot find with
random numbers.
"""

from __future__ import annotations

import importlib
import inspect
import json
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import fx, nn

from fxcompress.errors import LoadError
from fxcompress.forms import FORMS, LinearShape
from fxcompress.plan import FORMAT, Plan, SitePlan, attach_plan, plan_of
from fxcompress.rewrite import apply_plan, mismatches

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
    if model is None:
        model = _build_pretrained(path, plan)
    problems = mismatches(model, plan)
    if problems:
        raise LoadError(
            f"this {type(model).__name__} is not what the plan was made for "
            f"({plan.model_class}): {problems}"
        )
    bodies = {site.name: _empty_body(model, site) for site in plan.rewritten}
    apply_plan(model, plan, bodies)
    try:
        load_model(model, str(path / WEIGHTS), strict=True)
    except FileNotFoundError as error:
        raise LoadError(f"{path / WEIGHTS} is missing") from error
    except (RuntimeError, SafetensorError, KeyError, ValueError) as error:
        raise LoadError(f"{path / WEIGHTS} does not fit {plan.model_class}: {error}") from error
    attach_plan(model, plan)
    return model.to(device).eval()


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
    except (ValueError, AttributeError, OSError) as error:
        raise LoadError(f"{path} cannot be read: {error}") from error
    if version != FORMAT:
        raise LoadError(
            f"{path} has format {version}, and this version of fxcompress reads {FORMAT}"
        )
    try:
        return Plan.model_validate_json(text)
    except ValidationError as error:
        raise LoadError(f"{path} is not a valid plan: {error}") from error


def _build_pretrained(path: Path, plan: Plan) -> nn.Module:
    """An uninitialized Hugging Face model of the class that the plan names."""
    module_name, _, class_name = plan.model_class.rpartition(".")
    if not module_name.startswith("transformers.") or not (path / "config.json").exists():
        raise LoadError(
            f"{plan.model_class} is not a Hugging Face model: build one as it was before "
            "compression and pass it, load(directory, model)"
        )
    try:
        import transformers
    except ImportError as error:
        raise LoadError("loading this needs transformers: pip install 'fxcompress[hf]'") from error
    cls: Any = getattr(importlib.import_module(module_name), class_name, None)
    known = inspect.isclass(cls) and issubclass(cls, transformers.PreTrainedModel)
    if not known:
        raise LoadError(f"transformers has no model class {plan.model_class}")
    config: Any = cls.config_class.from_pretrained(path)
    dtype = getattr(torch, plan.sites[0].dtype) if plan.sites else torch.float32
    model: nn.Module = cls._from_config(config, dtype=dtype)
    if (path / "generation_config.json").exists():
        generation = transformers.GenerationConfig.from_pretrained(path)
        model.generation_config = generation  # type: ignore[assignment]
    return model


def _empty_body(model: nn.Module, site: SitePlan) -> fx.GraphModule:
    assert site.form is not None
    assert site.rank is not None
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    shape = LinearShape(
        site.in_features, site.out_features, site.bias, getattr(torch, site.dtype), device
    )
    return FORMS[site.form].empty(shape, site.rank)
