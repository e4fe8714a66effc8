"""Plain checkpoints: a narrowed Hugging Face model, saved as a dense one of another size.

Where nothing but smaller layers is left, and their sizes are those that some config gives, nobody
who loads the model has to know how it was made::

    config.json          intermediate_size: 1152    (it was 1536)
    model.safetensors    names and shapes as of every model with that config

Which entries of a config these are (``intermediate_size``, ``ffn_dim``, ``n_inner``, ``d_ff``, ...)
is found by trying.  The model is built from its config without memory, once as it is and once with
one number doubled: where shapes differ between the two is what this number determines, and it has
to be the multiple of itself that the wanted shape is of the one there is.
"""

from __future__ import annotations

import copy
import math
import os
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxcompress.errors import SaveError
from fxcompress.files import one_at_a_time, replace_files, try_directory
from fxcompress.plans.plan import Plan
from fxcompress.rules.matching.folding import fold_paths
from fxcompress.saved.load import METHOD, PLAN
from fxcompress.saved.tensors import storable
from fxcompress.saved.weights import WEIGHTS

Shapes = Mapping[str, tuple[int, ...]]
Place = tuple[str, ...]
"""Keys from a config down to one of its entries."""

SHOWN = 3
"""Names that a message tells of each kind."""


def save_plain(model: nn.Module, plan: Plan, path: Path, most: int) -> Path:
    """Write a compressed model as an ordinary one: config, weights and generation config.

    Args:
        model: not wrapped.
        plan: of it.
        path: of the directory, made if it is missing.
        most: bytes of weights in one file.

    Raises:
        SaveError: it is no Hugging Face model, no config gives its sizes, or the files cannot be
            written.
    """
    check_plain_directory(path)
    plain = ordinary(model, plan)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with one_at_a_time(path), tempfile.TemporaryDirectory(dir=path, prefix=".plain-") as folder:
            plain.save_pretrained(folder, max_shard_size=most)
            files = sorted(Path(folder).iterdir(), key=lambda file: file.suffix != ".safetensors")
            replace_files(path, {file.name: partial(os.replace, file) for file in files})
            for pattern in ("model*.safetensors", "model.safetensors.index.json"):
                for old in path.glob(pattern):  # of a save before, in other pieces
                    if old.name not in {file.name for file in files}:
                        old.unlink()
    except (OSError, ValueError, RuntimeError) as error:
        raise SaveError(f"the model cannot be saved to {path}: {error}") from error
    return path


def check_plain_directory(path: Path) -> None:
    """Find out whether a plain checkpoint can be saved to a directory, and leave no trace.

    Raises:
        SaveError: it cannot be made or written to, or holds a save with a plan.
    """
    for name in (PLAN, WEIGHTS):
        if (path / name).exists():
            raise SaveError(
                f"{path} holds {name} of a compressed model, which a plain checkpoint does not "
                "belong to: save to another directory, or remove that save"
            )
    try_directory(path)


def ordinary(model: nn.Module, plan: Plan) -> Any:
    """The model that ``from_pretrained`` makes of a plain checkpoint; it shares its tensors.

    Args:
        model: a compressed one; stays as it is.
        plan: of it.

    Raises:
        SaveError: it is no Hugging Face model, or no config gives its sizes.
    """
    given: Any = model
    name = type(model).__name__
    if not _of_transformers(model):
        raise SaveError(
            f"this {name} is no Hugging Face model, and a plain checkpoint is one: narrowed layers "
            "are ordinary ones, so save its state_dict() and load it into a model that is built "
            "with these sizes"
        )
    other = getattr(getattr(model, "hf_quantizer", None), "other", "")
    if other or getattr(given, "_hf_peft_config_loaded", False):
        what = f"is quantized ({other})" if other else "has adapters"
        raise SaveError(f"this {name} {what}, which a plain checkpoint does not hold")
    storable(model)  # or why not
    state: dict[str, Tensor] = model.state_dict()
    wanted = {key: tuple(tensor.shape) for key, tensor in state.items()}
    _require_layers(name, plan, wanted)
    content = _fitted(type(model), given.config, wanted)
    plain = _built(type(model), given.config, content)
    plain.load_state_dict(state, assign=True)
    plain.tie_weights()
    apart = [n for n, t in plain.state_dict().items() if not torch.equal(t, state[n])]
    if apart:
        raise SaveError(
            f"this {name} is saved with {apart[0]} tied to another weight, from which it differs: "
            "set config.tie_word_embeddings = False"
        )
    for attribute in ("generation_config", "_weight_conversions"):
        if hasattr(model, attribute):
            setattr(plain, attribute, getattr(given, attribute))
    return plain


def _of_transformers(model: nn.Module) -> bool:
    try:
        from transformers import PreTrainedModel
    except ImportError:
        return False
    return isinstance(model, PreTrainedModel)


def _require_layers(name: str, plan: Plan, wanted: Shapes) -> None:
    """Refuse a model of which some layers became others than smaller ones."""
    steps = (*plan.earlier, plan)
    by_form: dict[str, list[str]] = {}
    for site in (site for step in steps for site in step.rewritten):
        if site.weight not in wanted:
            by_form.setdefault(str(site.form), []).append(site.name)
    if by_form:
        told = "; ".join(f"{form}: {_listed(paths)}" for form, paths in by_form.items())
        raise SaveError(
            f"this {name} has layers that no config of its class has ({told}): a plain checkpoint "
            "has narrowed layers only. Let the rules have no other form than narrow, and give all "
            "blocks one width: rewrite: {form: narrow, group: widths}; or save it without plain"
        )


# ---- the config -----------------------------------------------------------------------


Needed = dict[int, dict[Fraction, list[str]]]
"""What the elements of an entry have to be, by their index, and of whose shapes that follows."""


@dataclass(frozen=True)
class _Entry:
    """A number in a config, or a list of numbers, one for each layer.

    Attributes:
        place: of it.
        value: None where a config leaves it to the code.
    """

    place: Place
    value: Any

    def likely(self, sizes: Collection[int]) -> int:
        """The less, the likelier it is one that counts these channels."""
        if isinstance(self.value, list):
            return int(not any(each in sizes for each in self.value))
        return 0 if self.value in sizes else 1 if self.value is None else 2

    def probe(self, size: int) -> Any:
        """Other numbers: twice as much, of a list 2, 3, 4, ... times as much."""
        if isinstance(self.value, list):
            return [each * times for times, each in enumerate(self.value, 2)]
        return 2 * size if self.value is None else 2 * self.value

    def needed(self, shapes: Shapes, probed: Shapes, wanted: Shapes, size: int) -> Needed:
        """What gives the wanted shapes; empty if it has to do with none that is wrong.

        Args:
            shapes: with the value that it has.
            probed: with :meth:`probe`.
            wanted: what is to be reached.
            size: as given to :meth:`probe`.
        """
        found: Needed = {}
        wrong = False
        for name in _wrong(shapes, probed):
            if not len(shapes[name]) == len(probed[name]) == len(wanted[name]):
                return {}
            for now, then, goal in zip(shapes[name], probed[name], wanted[name], strict=True):
                if now == then or not now:
                    continue
                wrong |= now != goal
                at, probe = 0, self.probe(size)
                if isinstance(self.value, list):
                    at, rest = divmod(then - 2 * now, now)
                    if rest or not 0 <= at < len(self.value):
                        return {}
                    probe = probe[at]
                value = Fraction(probe) * goal / then
                found.setdefault(at, {}).setdefault(value, []).append(name)
        return found if wrong else {}

    def choices(self, found: Needed) -> list[Any]:
        """Values to try, if all that is needed of every element is one number."""
        if not found or any(len(values) > 1 for values in found.values()):
            return []
        exact = {at: next(iter(values)) for at, values in found.items()}
        if isinstance(self.value, list):
            each = enumerate(self.value)
            return [[_number(exact[at], old) if at in exact else old for at, old in each]]
        first = _number(exact[0], self.value)
        # a ratio is multiplied and rounded down
        return [first, math.nextafter(first, math.inf)] if isinstance(first, float) else [first]


def _number(value: Fraction, old: object) -> float:
    whole = value.denominator == 1 and not isinstance(old, float)
    return int(value) if whole else float(value)


def _fitted(cls: Any, config: Any, wanted: Shapes) -> dict[str, Any]:
    """The content of a config that gives the wanted shapes.

    Args:
        cls: of the model.
        config: of the dense model.
        wanted: shapes of the state, by name.

    Raises:
        SaveError: there is none.
    """
    content: dict[str, Any] = config.to_dict()
    method = content.pop("quantization_config", None)
    if method is not None and dict(method).get("quant_method") != METHOD:
        raise SaveError(f"this {cls.__name__} is quantized: a plain checkpoint does not hold that")
    shapes = _shapes(cls, config, content)
    if shapes is None or shapes.keys() != wanted.keys():
        odd = ", ".join(sorted({*(shapes or ())} ^ wanted.keys())[:SHOWN])
        raise SaveError(f"this {cls.__name__} is not what its config builds: {odd}")
    wrong = _wrong(shapes, wanted)
    if any(len(shapes[name]) != len(wanted[name]) for name in wrong):
        raise SaveError(_misfit(config, shapes, wanted, None))
    pairs = (pair for name in wrong for pair in zip(shapes[name], wanted[name], strict=True))
    sizes = {now for now, goal in pairs if now != goal}
    conflict: tuple[_Entry, Needed] | None = None
    for entry in sorted(_entries(content), key=lambda entry: entry.likely(sizes)):
        if not wrong:
            break
        size = max(sizes)
        probed = _shapes(cls, config, _with(content, entry.place, entry.probe(size)))
        if probed is None or probed.keys() != wanted.keys():
            continue
        found = entry.needed(shapes, probed, wanted, size)
        if found and (conflict is None or _reach(found) < _reach(conflict[1])):
            conflict = entry, found
        for choice in entry.choices(found):
            tried = _with(content, entry.place, choice)
            now = _shapes(cls, config, tried)
            if now is not None and _wrong(now, wanted) < wrong:
                content, shapes, wrong = tried, now, _wrong(now, wanted)
                break
    if wrong:
        raise SaveError(_misfit(config, shapes, wanted, conflict))
    return content


def _reach(found: Needed) -> int:
    """Of how many shapes it decides."""
    return sum(len(names) for values in found.values() for names in values.values())


def _entries(content: Any, place: Place = ()) -> Iterator[_Entry]:
    """What there is to try in a config and in the configs within it."""
    for key, value in content.items():
        here = (*place, key)
        if isinstance(value, dict):
            yield from _entries(value, here)
        elif value is None or _numeric(value):
            yield _Entry(here, value)
        elif isinstance(value, (list, tuple)) and value and all(map(_numeric, value)):
            yield _Entry(here, list(value))


def _numeric(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


def _with(content: Mapping[str, Any], place: Place, value: Any) -> dict[str, Any]:
    """A config with another value in one place."""
    changed = copy.deepcopy(dict(content))
    within = changed
    for key in place[:-1]:
        within = within[key]
    within[place[-1]] = value
    return changed


def _shapes(cls: Any, config: Any, content: Mapping[str, Any]) -> Shapes | None:
    """Shapes of the state of a model with such a config; None if there is no such model."""
    with suppress(Exception):  # whatever the code of a model does with an odd number
        state = _built(cls, config, content).state_dict()
        return {name: tuple(tensor.shape) for name, tensor in state.items()}
    return None


def _built(cls: Any, config: Any, content: Mapping[str, Any]) -> Any:
    """A model without memory."""
    made = type(config).from_dict(copy.deepcopy(dict(content)))
    with torch.device("meta"):
        return cls._from_config(made)


def _wrong(shapes: Shapes, wanted: Shapes) -> set[str]:
    return {name for name, shape in shapes.items() if shape != wanted[name]}


def _misfit(
    config: Any, shapes: Shapes, wanted: Shapes, conflict: tuple[_Entry, Needed] | None
) -> str:
    """Why no config gives the wanted shapes, and what to do."""
    kind = type(config).__name__
    told = "; ".join(
        f"{name} is {wanted[name]}, and {shapes[name]} in a {kind}"
        for name in sorted(_wrong(shapes, wanted))[:SHOWN]
    )
    if conflict is not None:
        entry, found = conflict
        field = ".".join(entry.place)
        by_value: dict[Fraction, list[str]] = {}
        for values in found.values():
            for value, names in values.items():
                by_value.setdefault(value, []).extend(names)
        sizes = "; ".join(
            f"{float(value):g} ({_listed(dict.fromkeys(names))})"
            for value, names in sorted(by_value.items(), reverse=True)
        )
        told = f"a {kind} has one {field} for layers that have several: {sizes}"
        if len(by_value) == 1:
            told = f"a {kind} takes no {field} of {sizes}; multiple_of gives other widths"
    return (
        f"this is no plain checkpoint: {told}. Give all blocks one width, in a rule for the layers "
        "that read hidden values: rewrite: {form: narrow, group: widths}; or save it without plain"
    )


def _listed(paths: Iterable[str]) -> str:
    """``model.layers.{0..29}.mlp.up_proj and 2 more``."""
    shown = fold_paths(path.removesuffix(".weight") for path in paths)
    more = f" and {len(shown) - SHOWN} more" if len(shown) > SHOWN else ""
    return ", ".join(pattern for pattern, _ in shown[:SHOWN]) + more
