"""``save_pretrained`` and ``from_pretrained`` of compressed Hugging Face models.

It uses the way in that transformers has for quantized models: a model that carries an
``hf_quantizer`` asks it what to save, and ``from_pretrained`` asks the quantizer that
``config.json`` names to prepare the model before weights are loaded.  What is written::

    config.json          quantization_config: {quant_method: fxcompress}
    model.safetensors    (or shards of it) the state, the plan in the metadata, and for every
                         rewritten layer a *marker* under the name of the dense weight

Where this package was imported, ``from_pretrained`` rewrites the empty model by the plan and loads
it.  Where it was not, transformers takes the model for a dense one with a warning, and meets the
markers: their shape is not that of a weight, so it raises, in place of filling the layers that it
cannot find with random numbers (unless told to, with ``ignore_mismatched_sizes``).

This module is imported as soon as transformers is (:mod:`fxcompress.late`), and registers itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from fxcompress.errors import LoadError, RewriteError, SaveError
from fxcompress.operators.stacked import Stack, parameter_of
from fxcompress.plans.plan import Plan, attach_plan, plan_of
from fxcompress.saved.load import METHOD, PLAN, parse_plan, rewrite_empty
from fxcompress.saved.pretrained import SAVE_ID
from fxcompress.saved.save import require_unchanged, save_id
from fxcompress.saved.tensors import storable

MARKER = 1
"""Entries of a marker: no weight of a layer has this shape, for all of them are matrices."""


@register_quantization_config(METHOD)
class CompressedConfig(QuantizationConfigMixin):
    """What ``config.json`` says of a compressed model: that it is one."""

    def __init__(self, **others: Any) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]


@register_quantizer(METHOD)
class CompressedQuantizer(HfQuantizer):
    """Saves and loads compressed models; quantizes nothing.

    Attributes:
        plan: of the model that is being loaded, None at any other time.
        other: method of a quantizer that the model had before.
    """

    def __init__(self, quantization_config: Any, other: str = "", **others: Any) -> None:
        super().__init__(quantization_config, **others)
        self.other = other
        self.plan: Plan | None = None

    # ---- saving ----

    def is_serializable(self) -> bool:
        """True: whatever is against it is told by :meth:`get_state_dict_and_metadata`."""
        return True

    def get_state_dict_and_metadata(
        self, model: nn.Module
    ) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """What ``save_pretrained`` writes: the state with markers, and the plan.

        Raises:
            SaveError: as of :func:`fxcompress.save`, or ``model`` is only a part of what was
                compressed.
        """
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}  # only adapters are saved, not the model
        if self.other:
            raise SaveError(
                f"this {type(model).__name__} is quantized ({self.other}) and compressed, which "
                "save_pretrained cannot write together: quantize it after loading"
            )
        try:
            plan = plan_of(model)
        except RewriteError as error:
            raise SaveError(
                f"this {type(model).__name__} is a part of a compressed model, and has no plan of "
                "its own: save the whole model"
            ) from error
        require_unchanged(model)
        own = save_id(plan, storable(model), {})
        state = dict(model.state_dict())
        for name in _markers(model, plan):
            state.setdefault(name, torch.zeros(MARKER))
        _keep_names(model)
        model.config.quantization_config = CompressedConfig()  # type: ignore[union-attr]
        text = plan.model_copy(update={"save_id": own}).model_dump_json()
        return state, {SAVE_ID: own, PLAN: text}

    # ---- loading ----

    def preprocess_model(
        self, model: Any, dtype: Any = None, checkpoint_files: Any = None, **others: Any
    ) -> None:
        """Rewrite an empty model as the plan in the weights says.

        Raises:
            LoadError: there is no plan, or it was made for another model.
        """
        self.plan = plan = _plan_in(checkpoint_files or ())
        rewrite_empty(model, plan)
        _ignore(model, _markers(model, plan))
        model._initialize_missing_keys = _Strict(model, plan)

    def postprocess_model(self, model: Any, **others: Any) -> None:
        """Let a loaded model carry its plan, as if :func:`fxcompress.load` had loaded it."""
        assert self.plan is not None
        del model._initialize_missing_keys
        model.__dict__.pop("_keys_to_ignore_on_load_unexpected", None)
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        attach_plan(model, self.plan.model_copy(update={"save_id": ""}))
        self.plan = None

    @property
    def is_trainable(self) -> bool:
        """Factors are ordinary parameters."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """So the whole model can be trained."""
        return True

    @property
    def is_compileable(self) -> bool:
        """By ``torch.compile``."""
        return True


class _Strict:
    """Stands for ``_initialize_missing_keys`` of a model, and lets no factor be initialized."""

    def __init__(self, model: Any, plan: Plan) -> None:
        self.model = model
        steps = (*plan.earlier, plan)
        self.within = tuple(f"{site.name}." for step in steps for site in step.rewritten)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        missing = [
            name
            for name, value in self.model.state_dict(keep_vars=True).items()
            if name.startswith(self.within) and not getattr(value, "_is_hf_initialized", False)
        ]
        if missing:
            raise LoadError(f"the weights have no {', '.join(missing[:5])}: they are incomplete")
        return type(self.model)._initialize_missing_keys(self.model, *args, **kwargs)


def _markers(model: nn.Module, plan: Plan) -> list[str]:
    """Names of the dense weights that a rewritten model has no more."""
    steps = (*plan.earlier, plan)
    weights = [site.weight for step in steps for site in step.rewritten]
    return [*dict.fromkeys(parameter_of(model, weight) for weight in weights)]


def _keep_names(model: Any) -> None:
    """Have experts saved under their own names.

    transformers saves a stack of experts as the checkpoints have it that models come from: cut into
    the parts of each expert, under other names.  It has no such way for experts of several sizes.
    """
    stacks = {path for path, module in model.named_modules() if isinstance(module, Stack)}
    if not stacks:
        return
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange, WeightConverter

    found = getattr(model, "_weight_conversions", None)
    if found is None:  # as transformers does for a model that was not loaded
        found = get_model_conversion_mapping(model, add_legacy=False)
        found = [each for each in found if not isinstance(each, PrefixChange)]
    model._weight_conversions = [
        each
        for each in found
        if not isinstance(each, WeightConverter)
        or all(each.reverse_transform().rename_source_key(name)[1] is None for name in stacks)
    ]


def _ignore(model: Any, names: Sequence[str]) -> None:
    known = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    model._keys_to_ignore_on_load_unexpected = {*known, *(f"^{re.escape(n)}$" for n in names)}


def _plan_in(files: Sequence[str]) -> Plan:
    """The plan in the metadata of a checkpoint, all of whose files have to be of one save."""
    found: dict[str, Mapping[str, str]] = {}
    for each in files:
        with safe_open(each, "pt") as file:
            found[each] = file.metadata() or {}
    without = [each for each, about in found.items() if PLAN not in about]
    if without or not found:
        raise LoadError(
            f"config.json says that this model was compressed by fxcompress, and its weights "
            f"({', '.join(without) or 'none'}) carry no plan. Of a dense model remove "
            "quantization_config from config.json; a compressed one has to be saved again"
        )
    if len({about.get(SAVE_ID) for about in found.values()}) > 1:
        raise LoadError(f"{', '.join(found)} are of different saves: save the model again")
    place, about = next(iter(found.items()))
    return parse_plan(about[PLAN], place)


def watch(model: nn.Module) -> None:
    """Let every Hugging Face model in a compressed one save itself as such, or refuse to."""
    from transformers import PreTrainedModel

    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            had: Any = getattr(module, "hf_quantizer", None)
            other = ""
            if had is not None and not isinstance(had, CompressedQuantizer):
                other = str(had.quantization_config.quant_method)
            own: Any = CompressedQuantizer(CompressedConfig(), other)
            module.hf_quantizer = own
