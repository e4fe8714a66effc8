"""Load what :mod:`fxcompress.saving` wrote; nothing of it is executed.

A directory may come from a stranger.  So before any memory is taken or the given model touched:

1. ``plan.json`` is read, and compared with what it can be (:mod:`fxcompress.plan_checks`);
2. of the weights, in all of their files, only names, types and shapes are read;
3. a Hugging Face model is built from its config on the meta device, no larger than those;
4. a copy of the model's structure is rewritten as the plan says, with bodies on the meta device,
   and compared with both.

Only then the same is done for good.  The words of a plan that reach source code, names of the
nodes of templates, are checked in :mod:`fxcompress.forms.template`.
"""

from __future__ import annotations

import json
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fxcompress.errors import FxcompressError, LoadError
from fxcompress.forms import form_words
from fxcompress.graph.wrappers import replaced_forward, unwrapped
from fxcompress.operators.stacked import release_memory
from fxcompress.plans.checks import Flaw, body_problems, plan_problems
from fxcompress.plans.layers import site_layers
from fxcompress.plans.plan import FORMAT, Plan, attach_plan, history
from fxcompress.rewrite import (
    Bodies,
    ProjectedAttention,
    apply_plan,
    empty_bodies,
    mismatches,
    skeleton,
)
from fxcompress.saved.fill import SHOWN, fill, misfits, require_untied, require_values
from fxcompress.saved.pretrained import (
    CONFIGS,
    SAVE_ID,
    build_pretrained,
    from_config,
    model_class,
    require_harmless,
)
from fxcompress.saved.weights import WEIGHTS, Weights, read_header

PLAN = "plan.json"
METHOD = "fxcompress"
"""``quant_method`` in a config that ``save_pretrained`` wrote (:mod:`fxcompress.saved.hf`)."""

FOREIGN = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Weights that ``from_pretrained`` takes for those of the config that is saved beside them."""

MOST_BYTES = 256 * 2**20
"""Of ``plan.json``; a plan of a thousand layers has a few millions."""


def load(
    directory: str | PathLike[str],
    model: nn.Module | None = None,
    *,
    device: str | torch.device = "cpu",
    mapped: bool = False,
) -> nn.Module:
    """Load a model saved by :func:`save`.

    Args:
        directory: as given to :func:`save`.
        model: a freshly built model of the original architecture (its weights do not matter;
            it is rewritten in place); may be built on the meta device, where it takes no memory.
            Not needed for a Hugging Face model.
        device: where to put it.
        mapped: leave the weights in the files, of which the system reads what is touched, and may
            forget it again; only on the CPU.  What is written to them stays in memory.  The files
            may be saved over or removed, but not written to by others.

    Returns:
        The compressed model, in eval mode, on ``device``.

    Raises:
        LoadError: files are missing or broken, ``model`` is not what the plan was made for, or
            the weights do not fit it exactly.
    """
    path = Path(directory)
    if mapped and torch.device(device).type != "cpu":
        raise LoadError(f"mapped weights stay in their files: they cannot be on {device}")
    if model is None and not (path / PLAN).exists() and by_save_pretrained(path):
        return _from_pretrained(path, device)
    plan = _read_plan_file(path, parts=False)  # those of its bodies are compared below
    weights = Weights.at(path / WEIGHTS)
    header = weights.header
    plan = _owned_by(plan, weights.about, path, parts=False)
    if model is None:
        with _config_place(path, weights.about) as place:
            model = build_pretrained(place, plan, sum(t.numel() for t in header.values()))
    model = unwrapped(model)
    if problem := replaced_forward(model):
        raise LoadError(f"this {type(model).__name__} cannot be rewritten: {problem}")
    if history(model):
        raise LoadError(
            f"this {type(model).__name__} is compressed already: build one as it was before "
            "compression and pass that"
        )
    _try(path, model, plan, header)
    require_untied(model, weights)
    for step in (*plan.earlier, plan):
        apply_plan(model, step, empty_bodies(step, model))
    release_memory(model)
    fill(model, weights, mapped=mapped)
    attach_plan(model, plan.model_copy(update={"save_id": ""}))
    model.to(device)
    nn.Module.train(model, False)  # torch.export forbids .eval() on what it returns
    return model


def read_plan(directory: str | PathLike[str]) -> Plan:
    """The plan of a saved model, which is one that could have been made.

    Raises:
        LoadError: it is missing, broken, or of another version.
    """
    path = Path(directory)
    plan = _read_plan_file(path, parts=True)
    about: Mapping[str, str] = {}
    with suppress(SafetensorError, OSError, ValueError), safe_open(path / WEIGHTS, "pt") as file:
        about = file.metadata() or {}
    return _owned_by(plan, about, path, parts=True)


def rewrite_empty(model: nn.Module, plan: Plan) -> None:
    """Give a model the structure of the saved one; the factors have no values yet.

    Raises:
        LoadError: the plan was made for another model.
    """
    for step in (*plan.earlier, plan):
        _require_fitting(model, step, plan)
        apply_plan(model, step, empty_bodies(step, model))


def rebuilt(plan: Plan, config: Any) -> nn.Module:
    """A Hugging Face model as a plan makes it, from a config, without values (meta device).

    Raises:
        LoadError: the config does not build a model that the plan fits.
    """
    with torch.device("meta"):
        model = from_config(model_class(plan), config, plan)
        rewrite_empty(model, plan)
    return model


def by_save_pretrained(path: Path) -> bool:
    """Whether ``save_pretrained`` of a compressed Hugging Face model wrote to a directory."""
    with suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
        config = json.loads((path / CONFIGS[0]).read_text(encoding="utf-8"))
        return bool(config["quantization_config"]["quant_method"] == METHOD)
    return False


def _from_pretrained(path: Path, device: str | torch.device) -> nn.Module:
    """A compressed Hugging Face model from what its ``save_pretrained`` wrote."""
    require_harmless(path)
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise LoadError(f"{path} has no weights: not a directory written by save_pretrained")
    _, about = read_header(files[0])
    if PLAN not in about:
        raise LoadError(f"{files[0]} carries no plan: save the model again")
    cls = model_class(parse_plan(about[PLAN], files[0]))
    try:
        model, found = cls.from_pretrained(
            path, output_loading_info=True, local_files_only=True, trust_remote_code=False
        )
    except LoadError:
        raise
    except Exception as error:
        raise LoadError(f"{path} cannot be loaded: {type(error).__name__}: {error}") from error
    if wrong := [f"{len(names)} {kind}" for kind, names in found.items() if names]:
        raise LoadError(f"{path} does not fit {cls.__name__}: {', '.join(wrong)}")
    loaded: nn.Module = model.to(device)
    return loaded


def _owned_by(plan: Plan, about: Mapping[str, str], path: Path, *, parts: bool) -> Plan:
    """The plan that belongs to weights: the one beside them, or their copy of their own.

    A process that died while it saved may have left the plan of the save before.
    """
    if about.get(SAVE_ID, plan.save_id) == plan.save_id or PLAN not in about:
        return plan
    return parse_plan(about[PLAN], path / WEIGHTS, parts=parts)


@contextmanager
def _config_place(path: Path, about: Mapping[str, str]) -> Iterator[Path]:
    """A directory with the configs that belong to weights, as :func:`_owned_by` has it of plans."""
    owner = None
    with suppress(OSError, ValueError, AttributeError, RecursionError):
        owner = json.loads((path / CONFIGS[0]).read_text(encoding="utf-8")).get(SAVE_ID)
    if owner is None or about.get(SAVE_ID, owner) == owner or CONFIGS[0] not in about:
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        for name in CONFIGS:
            if name in about:
                (Path(folder) / name).write_text(about[name], encoding="utf-8")
        yield Path(folder)


def _require_fitting(model: nn.Module, step: Plan, plan: Plan) -> None:
    if problems := mismatches(model, step):
        raise LoadError(
            f"this {type(model).__name__} is not what the plan was made for "
            f"({plan.model_class}): {problems}"
        )


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
            _require_fitting(trial, step, plan)
            bodies = empty_bodies(step, trial, torch.device("meta"))
            found = [(f"{place}{at}", why) for at, why in _body_problems(step, bodies)]
            _refuse(path / PLAN, found)
            apply_plan(trial, step, bodies)
        expanded = {n for n, m in trial.named_modules() if isinstance(m, ProjectedAttention)}
        if expanded != {*plan.expanded}:
            _refuse(path / PLAN, [("expanded", "it does not name the attentions that are split")])
        state = trial.state_dict(keep_vars=True)
        require_values(trial, [t for t in state.values() if isinstance(t, Tensor)])
        wrong = misfits(state, header)
    except FxcompressError as error:
        raise error if isinstance(error, LoadError) else LoadError(str(error)) from error
    except Exception as error:
        raise LoadError(
            f"this {name} cannot be rewritten as {path / PLAN} says: "
            f"{type(error).__name__}: {error}"
        ) from error
    if wrong:
        raise LoadError(f"{path / WEIGHTS} does not fit {plan.model_class}: {wrong}")


def _body_problems(plan: Plan, bodies: Bodies) -> Iterator[Flaw]:
    return body_problems(plan, lambda sites: site_layers(sites, bodies))


# ---- the plan -------------------------------------------------------------------------


def _read_plan_file(directory: Path, *, parts: bool) -> Plan:
    path = directory / PLAN
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise OSError("it is no file")
        if status.st_size > MOST_BYTES:
            raise LoadError(f"{path} cannot be read: it has more than {MOST_BYTES:,} bytes")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        why = "not a directory written by fxcompress.save"
        if (directory / CONFIGS[0]).exists() and any((directory / n).exists() for n in FOREIGN):
            why = (
                f"{directory} holds an ordinary Hugging Face model (a plain checkpoint is one, "
                "too), which from_pretrained loads; it has no plan"
            )
        raise LoadError(f"{path} is missing: {why}") from error
    except (ValueError, OSError) as error:
        raise LoadError(f"{path} cannot be read: {error}") from error
    return parse_plan(text, path, parts=parts)


def parse_plan(text: str, path: str | Path, *, parts: bool = True) -> Plan:
    """A plan from the text of a file, which is one that could have been made.

    Args:
        text: of the file.
        path: of it, for messages.
        parts: whether bodies are built, without memory, and compared with what it says of them.

    Raises:
        LoadError: it is broken, or of another version.
    """
    path = Path(path)
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
        _refuse(path, ((_place(each["loc"]), _said(each)) for each in _errors(error)))
        raise
    steps = (*plan.earlier, plan)
    used = {str(site.form) for step in steps for site in step.rewritten}
    used |= {site.then.form for step in steps for site in step.sites if site.then is not None}
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
