"""Save: ``model.fxcompress.safetensors`` and ``plan.json``; nothing is pickled.

The weights file (of several, the first: :mod:`fxcompress.saved.weights`) has all that makes a save,
plan and configs included, so a save counts from the one moment on that this file is renamed into
its place.  What lies beside it for programs and people
(``plan.json``, ``config.json``) has the id of the save that it belongs to; where that is not the id
of the weights, since a process was killed between two renames, readers take the copy in the
weights file.  So there is the save of before or the new one, at any moment.

The weights do not lie under the name ``model.safetensors`` on purpose: Hugging Face's
``from_pretrained`` would take that file for the dense model.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from torch import Tensor, nn

from fxcompress.errors import LoadError, SaveError
from fxcompress.files import one_at_a_time, replace_files, try_directory
from fxcompress.graph.wrappers import unwrapped
from fxcompress.plans.plan import FORMAT, Plan, plan_of, rewritten_structure
from fxcompress.plans.structure import changes, structure_of
from fxcompress.rewrite import resident
from fxcompress.rules.language.fields import Bytes
from fxcompress.saved.load import FOREIGN, METHOD, PLAN, rebuilt
from fxcompress.saved.plain import save_plain
from fxcompress.saved.pretrained import CONFIGS, SAVE_ID
from fxcompress.saved.tensors import storable, stored
from fxcompress.saved.weights import remove_others, writers


def save(
    model: nn.Module,
    directory: str | PathLike[str],
    *,
    plain: bool = False,
    max_shard_size: int | str = "5GB",
) -> Path:
    """Write a compressed model: weights, plan and, for a Hugging Face model, its config.

    A save that is in the directory already stays loadable until the new one is complete.  Files are
    written one after the other, so that weights which are mapped or offloaded are never in memory
    all at once.

    Args:
        model: came from :func:`fxcompress.compile` or :func:`fxcompress.load`; may be wrapped by
            ``torch.compile`` or for data parallelism, or offloaded by accelerate.
        directory: made if it is missing.
        plain: write what ``save_pretrained`` writes of a dense model of that size, without a plan:
            other programs load it, and ``from_pretrained`` where this package is not installed.
            For Hugging Face models whose layers have sizes that some config gives: those that are
            narrowed only, to equal widths.
        max_shard_size: bytes, or text as ``"5GB"``, of weights in one file; more are written to
            several with an index beside them.  A single weight is never divided.

    Returns:
        The directory.

    Raises:
        RewriteError: the model carries no plan.
        SaveError: it was changed since, or holds something that cannot be stored, so that it could
            not be loaded again; or the files cannot be written.  Or it is to be a plain checkpoint,
            and no config of its class gives its sizes.
    """
    plan = plan_of(model)
    most = _bytes(max_shard_size)
    model = resident(unwrapped(model))
    if plain:
        return save_plain(model, plan, Path(directory), most)
    tensors = storable(model)
    require_unchanged(model)
    path = Path(directory)
    check_directory(path)
    configs = _configs(model)
    own = save_id(plan, tensors, configs)
    text = plan.model_copy(update={"save_id": own}).model_dump_json(indent=1)
    configs = {n: _owned(t, own) if n == CONFIGS[0] else t for n, t in configs.items()}
    kept = {name: configs[name] for name in CONFIGS if name in configs}
    about = {"format": "pt", "fxcompress": str(FORMAT), SAVE_ID: own, PLAN: text, **kept}
    try:
        path.mkdir(parents=True, exist_ok=True)
        with one_at_a_time(path):
            files = {
                **writers(tensors, own, about, most),
                **{name: _text(content) for name, content in configs.items()},
                PLAN: _text(text),
            }
            replace_files(path, files)
            remove_others(path, files)
    except (OSError, SafetensorError) as error:
        raise SaveError(
            f"the model cannot be saved to {path}: {error}; what was saved there before is whole"
        ) from error
    return path


def check_directory(path: Path) -> None:
    """Find out whether a model can be saved to a directory, and leave no trace.

    Raises:
        SaveError: it cannot be made or written to, or holds weights of another model.
    """
    foreign = [name for name in FOREIGN if (path / name).exists()]
    if foreign:
        raise SaveError(
            f"{path} holds {foreign[0]}, the weights of another model, which from_pretrained would "
            "load in the place of this one: save to another directory, or remove that file"
        )
    try_directory(path)


def require_unchanged(model: nn.Module) -> None:
    """Check that what is saved of a model can be loaded again.

    It can if the model consists of what it did when it was rewritten, since then a freshly built
    one fits; or, of a Hugging Face model, if its config builds one that fits (so its embeddings may
    have been resized).

    Raises:
        SaveError: it was changed, with what was changed.
    """
    before, now = rewritten_structure(model), structure_of(model)
    changed = "" if before is None else changes(before, now)
    if not changed:
        return
    config = getattr(model, "config", None)
    try:
        again = structure_of(rebuilt(plan_of(model), config)) if config is not None else None
    except LoadError:
        again = None
    if again is None or changes(again, now):
        raise SaveError(
            f"this {type(model).__name__} was changed after it was rewritten, so what is saved "
            f"could not be loaded: {changed}. Save it without these changes and make them anew "
            "after loading (merge or unload adapters, unwrap layers), or change the model before "
            "it is compressed"
        )


def _configs(model: nn.Module) -> dict[str, str]:
    """What a Hugging Face model's configs write about themselves, by file name."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("config", "generation_config"):
            config: Any = getattr(model, name, None)
            if hasattr(config, "save_pretrained"):
                config.save_pretrained(folder)
        files = sorted(Path(folder).iterdir())
        texts = {each.name: each.read_text(encoding="utf-8") for each in files}
    return {name: _without_quantizer(text) for name, text in texts.items()}


def _without_quantizer(text: str) -> str:
    """A config without what only holds for a directory of ``save_pretrained``."""
    content = json.loads(text)
    method = content.get("quantization_config") or {}
    if isinstance(method, dict) and method.get("quant_method") == METHOD:
        del content["quantization_config"]
        return json.dumps(content, indent=2, sort_keys=True) + "\n"
    return text


def _owned(config: str, save_id: str) -> str:
    """A config that says which save it belongs to."""
    return json.dumps({**json.loads(config), SAVE_ID: save_id}, indent=2, sort_keys=True) + "\n"


def save_id(plan: Plan, tensors: Mapping[str, Tensor], configs: Mapping[str, str]) -> str:
    """The id of a save: equal for equal content only."""
    digest = hashlib.sha256(json.dumps(dict(configs), sort_keys=True).encode())
    digest.update(plan.model_dump_json().encode())
    for name in sorted(tensors):
        tensor = stored(tensors[name])
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _bytes(size: int | str) -> int:
    try:
        return TypeAdapter(Bytes).validate_python(size)
    except ValidationError as error:
        raise SaveError(
            f"max_shard_size is a number of bytes, or one with a unit, as in '5GB', not {size!r}"
        ) from error


def _text(content: str) -> Callable[[Path], int]:
    return lambda path: path.write_text(content, encoding="utf-8")
