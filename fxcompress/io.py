"""Load: what :mod:`fxcompress.saving` wrote; nothing is unpickled."""

from __future__ import annotations

import importlib
import inspect
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fxcompress.errors import LoadError
from fxcompress.forms import form_words
from fxcompress.plan import FORMAT, Plan, attach_plan, history
from fxcompress.rewrite import apply_plan, empty_bodies, mismatches, skeleton
from fxcompress.wrappers import replaced_forward, unwrapped

WEIGHTS = "model.fxcompress.safetensors"
"""Its metadata have copies of the files below, under their names."""
PLAN = "plan.json"
CONFIGS = ("config.json", "generation_config.json")
"""Of Hugging Face models."""
SAVE_ID = "fxcompress_save"
"""In the metadata of the weights and in a saved ``config.json``: the id of the save."""
METHOD = "fxcompress"
"""``quant_method`` in a config that ``save_pretrained`` wrote (:mod:`fxcompress.hf`)."""


def load(
    directory: str | PathLike[str],
    model: nn.Module | None = None,
    *,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """Load a model saved by :func:`fxcompress.save`.

    Args:
        directory: as given to :func:`fxcompress.save`.
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
    if model is None and not (path / PLAN).exists() and by_save_pretrained(path):
        return _from_pretrained(path, device)
    plan = _read_plan_file(path)
    stored, about = _read_weights(path / WEIGHTS)
    plan = _owned_by(plan, about, path)
    if model is None:
        with _config_place(path, about) as place:
            model = _build_pretrained(place, plan)
    model = unwrapped(model)
    if history(model):
        raise LoadError(
            f"this {type(model).__name__} is compressed already: build one as it was before "
            "compression and pass that"
        )
    if problem := replaced_forward(model):
        raise LoadError(f"this {type(model).__name__} cannot be rewritten: {problem}")
    trial = skeleton(model)  # so that a model that does not fit is left as it was
    rewrite_empty(trial, plan)
    misfits = _misfits(trial.state_dict(), stored)
    if misfits:
        raise LoadError(f"{path / WEIGHTS} does not fit {plan.model_class}: {misfits}")
    rewrite_empty(model, plan)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in stored and tensor.dtype != stored[name].dtype:
            tensor.data = tensor.data.to(stored[name].dtype)  # as it was saved
    model.load_state_dict(stored, strict=False)  # it is: only names of tied weights may be missing
    attach_plan(model, plan.model_copy(update={"save_id": ""}))
    model.to(device)
    nn.Module.train(model, False)  # torch.export forbids .eval() on what it returns
    return model


def by_save_pretrained(path: Path) -> bool:
    """Whether ``save_pretrained`` of a compressed Hugging Face model wrote to a directory."""
    with suppress(OSError, ValueError, LookupError, TypeError):
        config = json.loads((path / CONFIGS[0]).read_text(encoding="utf-8"))
        return bool(config["quantization_config"]["quant_method"] == METHOD)
    return False


def _from_pretrained(path: Path, device: str | torch.device) -> nn.Module:
    """A compressed Hugging Face model from what its ``save_pretrained`` wrote."""
    transformers = _transformers()
    try:
        config = json.loads((path / CONFIGS[0]).read_text(encoding="utf-8"))
        cls = getattr(transformers, str(config["architectures"][0]))
        model, found = cls.from_pretrained(path, output_loading_info=True, local_files_only=True)
    except LoadError:
        raise
    except Exception as error:
        raise LoadError(f"{path} cannot be loaded: {type(error).__name__}: {error}") from error
    if wrong := [f"{len(names)} {kind}" for kind, names in found.items() if names]:
        raise LoadError(f"{path} does not fit {cls.__name__}: {', '.join(wrong)}")
    loaded: nn.Module = model.to(device)
    return loaded


def _owned_by(plan: Plan, about: Mapping[str, str], path: Path) -> Plan:
    """The plan that belongs to weights: the one beside them, or their copy of their own.

    A process that died while it saved may have left the plan of the save before.
    """
    if about.get(SAVE_ID, plan.save_id) == plan.save_id or PLAN not in about:
        return plan
    return parse_plan(about[PLAN], path / WEIGHTS)


def rebuilt(plan: Plan, config: Any) -> nn.Module:
    """A Hugging Face model as a plan makes it, from a config, without values (meta device).

    Raises:
        LoadError: the config does not build a model that the plan fits.
    """
    with torch.device("meta"):
        model = _from_config(_model_class(plan), config, plan)
        rewrite_empty(model, plan)
    return model


@contextmanager
def _config_place(path: Path, about: Mapping[str, str]) -> Iterator[Path]:
    """A directory with the configs that belong to weights, as :func:`_owned_by` has it of plans."""
    owner = None
    with suppress(OSError, ValueError, AttributeError):
        owner = json.loads((path / CONFIGS[0]).read_text(encoding="utf-8")).get(SAVE_ID)
    if owner is None or about.get(SAVE_ID, owner) == owner or CONFIGS[0] not in about:
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        for name in CONFIGS:
            if name in about:
                (Path(folder) / name).write_text(about[name], encoding="utf-8")
        yield Path(folder)


def _read_weights(path: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """Tensors and metadata of a weights file."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except FileNotFoundError as error:
        raise LoadError(f"{path} is missing: not a directory written by fxcompress.save") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise LoadError(f"{path} cannot be read: {error}; save the model again") from error


def rewrite_empty(model: nn.Module, plan: Plan) -> None:
    """Give a model the structure of the saved one; the factors have no values yet.

    Raises:
        LoadError: the plan was made for another model.
    """
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
    kept: dict[tuple[int, torch.Size], str] = {}
    for name, tensor in stored.items():
        if name in state and tensor.numel():
            twin = kept.setdefault(_memory(state[name]), name)
            if twin != name and not torch.equal(stored[twin], tensor):
                problems.append(
                    f"the model ties {name} to {twin}, and in the file they differ: build it "
                    "untied (tie_word_embeddings=False)"
                )
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
    path = Path(directory)
    plan = _read_plan_file(path)
    about: Mapping[str, str] = {}
    with suppress(SafetensorError, OSError, ValueError), safe_open(path / WEIGHTS, "pt") as file:
        about = file.metadata() or {}
    return _owned_by(plan, about, path)


def _read_plan_file(directory: Path) -> Plan:
    path = directory / PLAN
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise LoadError(f"{path} is missing: not a directory written by fxcompress.save") from error
    except (ValueError, OSError) as error:
        raise LoadError(f"{path} cannot be read: {error}") from error
    return parse_plan(text, path)


def parse_plan(text: str, path: str | Path) -> Plan:
    """A plan from the text of a file.

    Raises:
        LoadError: it is broken, or of another version.
    """
    try:
        version = json.loads(text).get("format")
    except (ValueError, AttributeError, RecursionError) as error:
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
    if not (path / CONFIGS[0]).exists():
        raise LoadError(_NO_CONFIG.format(plan.model_class))
    cls = _model_class(plan)
    try:
        config: Any = cls.config_class.from_pretrained(path)
    except Exception as error:
        raise _misdescribed(cls, path / CONFIGS[0], error) from error
    if hasattr(config, SAVE_ID):
        delattr(config, SAVE_ID)
    model = _from_config(cls, config, plan, path / CONFIGS[0])
    if (path / CONFIGS[1]).exists():
        model.generation_config = _transformers().GenerationConfig.from_pretrained(path)
    return model


_NO_CONFIG = (
    "{} is not a Hugging Face model: build one as it was before compression and pass it, "
    "load(directory, model)"
)


def _model_class(plan: Plan) -> Any:
    """The class of Hugging Face's that a plan names; no other is imported."""
    module_name, _, class_name = plan.model_class.rpartition(".")
    if not module_name.startswith("transformers.models."):
        raise LoadError(_NO_CONFIG.format(plan.model_class))
    transformers = _transformers()
    try:
        cls: Any = getattr(importlib.import_module(module_name), class_name, None)
    except ImportError:
        cls = None
    if not (inspect.isclass(cls) and issubclass(cls, transformers.PreTrainedModel)):
        raise LoadError(
            f"transformers {transformers.__version__} has no model class {plan.model_class}"
        )
    return cls


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise LoadError("loading this needs transformers: pip install 'fxcompress[hf]'") from error


def _from_config(cls: Any, config: Any, plan: Plan, source: object = "config.json") -> nn.Module:
    dtype = getattr(torch, plan.sites[0].dtype) if plan.sites else torch.float32
    try:
        model: nn.Module = cls._from_config(config, dtype=dtype)
    except Exception as error:
        raise _misdescribed(cls, source, error) from error
    return model


def _misdescribed(cls: Any, source: object, error: Exception) -> LoadError:
    return LoadError(f"{source} does not describe a {cls.__name__}: {error}")
