"""Load what :func:`fxcompress.save` wrote; nothing of it is executed.

A directory may come from a stranger.  So before any memory is taken or the given model touched:

1. ``plan.json`` is read, and compared with what it can be (:mod:`fxcompress.plan_checks`);
2. of the weights only names, types and shapes are read;
3. a Hugging Face model is built from its config on the meta device, no larger than those;
4. a copy of the model's structure is rewritten as the plan says, with bodies on the meta device,
   and compared with both.

Only then the same is done for good.  The words of a plan that reach source code, names of the
nodes of templates, are checked in :mod:`fxcompress.forms.template`.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from os import PathLike
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from fxcompress.errors import FxcompressError, LoadError
from fxcompress.forms import form_words
from fxcompress.parts import joint_layers, layers
from fxcompress.plan import FORMAT, Plan, attach_plan, history
from fxcompress.plan_checks import Problem, body_problems, plan_problems
from fxcompress.pretrained import build_pretrained
from fxcompress.rewrite import (
    Bodies,
    ProjectedAttention,
    apply_plan,
    empty_bodies,
    mismatches,
    skeleton,
)

WEIGHTS = "model.fxcompress.safetensors"
PLAN = "plan.json"

MOST_BYTES = 256 * 2**20
"""Of ``plan.json``; a plan of a thousand layers has a few millions."""

SHOWN = 5
"""Problems that one message tells."""

_TYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U8": torch.uint8, "BOOL": torch.bool},
}
"""Types of stored tensors by their names in the file; others are read to tell what they are."""


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
    plan = _read_plan(path / PLAN, parts=False)  # those of its bodies are compared below
    header = _read_header(path / WEIGHTS)
    if model is None:
        model = build_pretrained(path, plan, sum(t.numel() for t in header.values()))
    if history(model):
        raise LoadError(
            f"this {type(model).__name__} is compressed already: build one as it was before "
            "compression and pass that"
        )
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and tensor.is_meta:
            raise LoadError(f"the model's {name} is on the meta device: build it on the CPU")
    _try(path, model, plan, header)
    stored = _read_weights(path / WEIGHTS)
    for step in (*plan.earlier, plan):
        apply_plan(model, step, empty_bodies(step, model))
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in stored and tensor.dtype != stored[name].dtype:
            tensor.data = tensor.data.to(stored[name].dtype)  # as it was saved
    model.load_state_dict(stored, strict=False)  # it is: only names of tied weights may be missing
    attach_plan(model, plan)
    model.to(device)
    nn.Module.train(model, False)  # torch.export forbids .eval() on what it returns
    return model


def read_plan(directory: str | PathLike[str]) -> Plan:
    """The plan of a saved model, which is one that could have been made.

    Raises:
        LoadError: it is missing, broken, or of another version.
    """
    return _read_plan(Path(directory) / PLAN, parts=True)


def _try(path: Path, model: nn.Module, plan: Plan, header: Mapping[str, Tensor]) -> None:
    """Rewrite a copy of the structure of ``model`` without memory, and compare it with the file.

    Whatever goes wrong in it went wrong in the copy.

    Raises:
        LoadError: plan, weights and model do not fit together.
    """
    name = type(model).__name__
    try:
        trial = skeleton(model)
        for index, step in enumerate((*plan.earlier, plan)):
            place = f"earlier[{index}]." if index < len(plan.earlier) else ""
            if problems := mismatches(trial, step):
                raise LoadError(
                    f"this {name} is not what the plan was made for ({plan.model_class}): "
                    f"{problems}"
                )
            bodies = empty_bodies(step, trial, torch.device("meta"))
            found = [(f"{place}{at}", why) for at, why in _body_problems(step, bodies)]
            _refuse(path / PLAN, found)
            apply_plan(trial, step, bodies)
        expanded = {n for n, m in trial.named_modules() if isinstance(m, ProjectedAttention)}
        if expanded != {*plan.expanded}:
            _refuse(path / PLAN, [("expanded", "it does not name the attentions that are split")])
        misfits = _misfits(trial.state_dict(keep_vars=True), header)
    except FxcompressError as error:
        raise error if isinstance(error, LoadError) else LoadError(str(error)) from error
    except Exception as error:
        raise LoadError(
            f"this {name} cannot be rewritten as {path / PLAN} says: "
            f"{type(error).__name__}: {error}"
        ) from error
    if misfits:
        raise LoadError(f"{path / WEIGHTS} does not fit {plan.model_class}: {misfits}")


def _body_problems(plan: Plan, bodies: Bodies) -> Iterator[Problem]:
    return body_problems(
        plan,
        lambda name: (
            joint_layers(bodies.joint[name])
            if name in bodies.joint
            else [layers(bodies.single[name])]
        ),
    )


# ---- weights --------------------------------------------------------------------------


def _read_header(path: Path) -> dict[str, Tensor]:
    """The stored tensors without their values, on the meta device."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise OSError("it is no file")
        with safe_open(path, "pt") as file:
            found = {}
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                dtype = _TYPES.get(part.get_dtype())
                if dtype is None:
                    dtype = file.get_tensor(name).dtype
                found[name] = torch.empty(part.get_shape(), dtype=dtype, device="meta")
            return found
    except FileNotFoundError as error:
        raise LoadError(f"{path} is missing: not a directory written by fxcompress.save") from error
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise LoadError(f"{path} cannot be read: {error}; save the model again") from error


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise LoadError(f"{path} cannot be read: {error}; save the model again") from error


def _misfits(state: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> str:
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


# ---- the plan -------------------------------------------------------------------------


def _read_plan(path: Path, *, parts: bool) -> Plan:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise OSError("it is no file")
        if status.st_size > MOST_BYTES:
            raise LoadError(f"{path} cannot be read: it has more than {MOST_BYTES:,} bytes")
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
        _refuse(path, ((_place(each["loc"]), _said(each)) for each in _errors(error)))
        raise
    steps = (*plan.earlier, plan)
    used = {str(site.form) for step in steps for site in step.rewritten}
    if unknown := sorted(used - {*form_words(), *(name for s in steps for name in s.templates)}):
        raise LoadError(
            f"{path} uses forms that are not known here: {', '.join(unknown)}; install or import "
            "the package that registers them (fxcompress.register_form)"
        )
    _refuse(path, plan_problems(plan, parts=parts))
    return plan


def _errors(error: ValidationError) -> Iterable[Mapping[str, object]]:
    return error.errors(include_url=False, include_context=False, include_input=False)


def _said(error: Mapping[str, object]) -> str:
    return str(error["msg"]).removeprefix("Value error, ")


def _place(location: object) -> str:
    """``sites[3].rank``."""
    assert isinstance(location, tuple)
    text = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in location)
    return text.removeprefix(".") or "plan"


def _refuse(path: Path, problems: Iterable[tuple[str, object]]) -> None:
    """Tell of the first problems of a plan, if there are any."""
    found = [f"{place}: {message}" for place, message in islice(problems, SHOWN + 1)]
    if found:
        more = "; ..." if len(found) > SHOWN else ""
        raise LoadError(f"{path} is not a valid plan: {'; '.join(found[:SHOWN])}{more}")


def _told(problems: list[str]) -> str:
    more = f" (and {len(problems) - SHOWN} more)" if len(problems) > SHOWN else ""
    return "; ".join(problems[:SHOWN]) + more
