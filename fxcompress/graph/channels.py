"""How the channels of a value go through an operator: one line of a table for each.

A value has n channels along one axis.  An operator that leaves them apart makes each channel of its
output of the channels of that number of what it reads: so if some channels go, they go from all
these values, and the operator stays what it is, but for what it holds of every channel::

    relu, mul, dropout, ...       entrywise            nothing is held
    max_pool2d, pad, ...          over positions       nothing is held
    batch_norm, prelu, ...        entrywise            one entry a channel, of a module
    parameter                     a scale or a shift   one entry a channel, itself
    conv2d of n groups            over positions       one kernel a channel
    transpose, view, ...          other places         nothing is held
    chunk, glu                    p blocks of channels of a value with p times as many

:data:`RULES` has them all.  A rule tells which values an operator reads, with the axis of the
channels in each, or the reason why channels do not stay apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_leaves

from fxcompress.graph.operator import Operator
from fxcompress.graph.recorder import Recording
from fxcompress.operators.per_channel import PerChannel, per_channel
from fxcompress.operators.words import OPERATORS


@dataclass(frozen=True)
class Through:
    """An operator that leaves channels apart.

    Attributes:
        inputs: names of the values whose channels it reads, each with the axis that counts them,
            from 0; none for an operator that makes channels anew, or holds them.
        held: what it has of every channel.
        parts: of how many blocks of such channels, one after the other, these values consist.
        sized: whether it may have been given the number of channels, and insist on it.
    """

    inputs: tuple[tuple[str, int], ...]
    held: tuple[PerChannel, ...] = ()
    parts: int = 1
    sized: bool = False


@dataclass(frozen=True)
class Question:
    """An operator whose output has channels along an axis.

    Attributes:
        model: that was recorded.
        recording: of it.
        operator: of the recording.
        axis: of its output, from 0.
        channels: along it, n for each part.
        parts: blocks of n channels that the output consists of.
    """

    model: nn.Module
    recording: Recording
    operator: Operator
    axis: int
    channels: int
    parts: int = 1

    def read(self, place: int = 0) -> Operator:
        """What produces an operand."""
        return self.recording.operators[self.recording.places[self.operator.inputs[place]]]

    @property
    def named(self) -> str:
        """The operator in messages."""
        return named(self.operator)

    def held(self, name: str, inputs: tuple[tuple[str, int], ...]) -> Through | str:
        """An operator with one entry a channel.

        Args:
            name: of the module or of the parameter that has them.
            inputs: as of :class:`Through`.
        """
        if self.parts > 1:
            return f"{self.named} on the way to it has entries of {self.parts} parts"
        found = per_channel(self.model, name, self.channels)
        if isinstance(found, str):
            return f"{self.named} on the way to it does not stay apart by channels: {found}"
        return Through(inputs, (found,) if found.bytes else ())


Rule = Callable[[Question], Through | str]


def through(asked: Question) -> Through | str:
    """How channels go through an operator, or why they do not."""
    rule = RULES.get(asked.operator.op)
    if asked.operator.op == "input":
        return "it reads what the model is given"
    if rule is None:
        return f"its input comes from {asked.named}, which is not entrywise"
    shape = asked.operator.shape
    if rule is not _parted and (
        shape is None or asked.axis >= len(shape) or shape[asked.axis] != asked.channels
    ):
        return f"{asked.named} on the way to it has other channels"
    return rule(asked)


def named(operator: Operator) -> str:
    """An operator in messages: ``model.layers.0.mlp.act (silu)``."""
    return f"{operator.path} ({operator.op})" if operator.path else operator.op


# ---- rules ------------------------------------------------------------------------------


def _entrywise(asked: Question) -> Through | str:
    """Operands are aligned from the right, as broadcasting has it."""
    dims = len(asked.operator.shape or ())
    inputs = []
    for place, name in enumerate(asked.operator.inputs):
        found = asked.read(place)
        if found.shape is None:
            return f"{named(found)} on the way to it is no single value"
        axis = asked.axis - (dims - len(found.shape))
        if axis >= 0 and found.shape[axis] == asked.channels:
            inputs.append((name, axis))
        elif found.op != "parameter":  # a parameter without channels is one number for all of them
            if RULES.get(found.op) is not _entrywise:
                return f"its input comes from {named(found)}, which is not entrywise"
            return f"{named(found)} on the way to it has other channels"
    return Through(tuple(inputs))


def _over_positions(asked: Question) -> Through | str:
    """Over the last d dimensions, each channel by itself."""
    source = asked.read()
    dims = len(asked.operator.shape or ())
    if source.shape is None or len(source.shape) != dims:
        return f"{asked.named} on the way to it changes the shape"
    if asked.axis >= dims - _extents(asked):
        return f"{asked.named} on the way to it goes over channels"
    return Through(((source.name, asked.axis),))


def _extents(asked: Question) -> int:
    """Dimensions that an operator goes over: ``max_pool2d`` says it; else all but two."""
    op = asked.operator.op
    if op[-2:-1].isdigit():
        return int(op[-2])
    return len(asked.operator.shape or ()) - 2


def _pad(asked: Question) -> Through | str:
    """``F.pad`` names the last dimensions, two numbers each."""
    widths = _argument(asked, 1, "pad")
    if not isinstance(widths, list | tuple):
        return f"{asked.named} on the way to it pads unknown dimensions"
    source, dims = asked.read(), len(asked.operator.shape or ())
    if asked.axis >= dims - len(widths) // 2:
        return f"{asked.named} on the way to it pads channels"
    return Through(((source.name, asked.axis),))


def _norm_of_channels(asked: Question) -> Through | str:
    """Batch norms and instance norms, called as modules or in the forward of one."""
    module = asked.model.get_submodule(asked.operator.path)
    if not isinstance(module, _NormBase):
        return f"{asked.named} on the way to it is no module of torch"
    if asked.axis != 1:
        return f"{asked.named} on the way to it normalizes other channels"
    return asked.held(asked.operator.path, ((asked.operator.inputs[0], 1),))


def _prelu(asked: Question) -> Through | str:
    module = asked.model.get_submodule(asked.operator.path)
    inputs = ((asked.operator.inputs[0], asked.axis),)
    if not isinstance(module, nn.PReLU):
        return f"{asked.named} on the way to it is no module"
    if module.num_parameters > 1 and asked.axis != 1:
        return f"{asked.named} on the way to it has slopes of other channels"
    return asked.held(asked.operator.path, inputs)


def _layer_scale(asked: Question) -> Through | str:
    """A module that multiplies by one parameter: along the last dimension, or after the first."""
    module = asked.model.get_submodule(asked.operator.path)
    dims = len(asked.operator.shape or ())
    held = [*module.parameters()]
    if len(held) != 1 or [*module.buffers()]:
        return f"{asked.named} on the way to it holds more than a scale"
    flat = held[0].dim() == 1
    along = 1 if flat and asked.operator.op.endswith("2d") else dims - held[0].dim()
    if asked.channels not in held[0].shape or asked.axis != along + (
        0 if flat else tuple(held[0].shape).index(asked.channels)
    ):
        return f"{asked.named} on the way to it scales other channels"
    return asked.held(asked.operator.path, ((asked.operator.inputs[0], asked.axis),))


def _parameter(asked: Question) -> Through | str:
    return asked.held(asked.operator.path, ())


def _view(asked: Question) -> Through | str:
    """Another shape in which the channels are one axis still, or a parameter for what it meets."""
    source, shape = asked.read(), asked.operator.shape or ()
    before = source.shape or ()
    if source.op in PARTED and asked.operator.op == "getitem":
        return Through(((source.name, asked.axis),))
    if source.op == "parameter" and asked.channels in before:
        axis = tuple(before).index(asked.channels)
    else:
        ends = math.prod(shape[: asked.axis]), math.prod(shape[asked.axis + 1 :])
        axis = next(
            (
                axis
                for axis, size in enumerate(before)
                if size == asked.channels
                and (math.prod(before[:axis]), math.prod(before[axis + 1 :])) == ends
            ),
            -1,
        )
    node = _node(asked)
    numbers = [] if node is None else tree_leaves([node.args[1:], node.kwargs])
    whole = all(each in (None, ..., slice(None)) or type(each) is int for each in numbers)
    if asked.operator.op == "getitem" and not whole:
        return _block(asked)
    if axis < 0:
        return f"its input comes from {asked.named}, which is not entrywise"
    if node is None:
        return f"{asked.named} on the way to it is not in every example"
    # Where there are several positions, what comes after may need their shape again.
    one = math.prod((*before[axis + 1 :], *shape[asked.axis + 1 :])) == 1
    known = source.op == "parameter" or (one and before[:axis] == shape[: asked.axis])
    return Through(((source.name, axis),), sized=asked.channels in numbers or not known)


def _block(asked: Question) -> Through | str:
    """One of several equal parts: ``x[..., :n]``."""
    source, node = asked.read(), _node(asked)
    before = source.shape or ()
    index: Any = () if node is None else node.args[1]
    entries = [*index] if isinstance(index, tuple) else [index]
    if entries.count(...) == 1:
        at = entries.index(...)
        entries[at : at + 1] = [slice(None)] * (len(before) - len(entries) + 1)
    entries += [slice(None)] * (len(before) - len(entries))
    aligned = None not in entries and len(entries) == len(before) > asked.axis
    size, n = before[asked.axis] if aligned else 0, asked.channels
    if aligned and size % n == 0:
        own = entries[asked.axis]
        others = [each for axis, each in enumerate(entries) if axis != asked.axis]
        blocks = [range(size)[at : at + n] for at in range(0, size, n)]
        known = isinstance(own, slice) and all(
            type(each) in (int, type(None)) for each in (own.start, own.stop, own.step)
        )
        if known and range(size)[own] in blocks and all(each == slice(None) for each in others):
            return Through(((source.name, asked.axis),), parts=size // n, sized=True)
    return f"its input comes from {asked.named}, which is not entrywise"


def _parted(asked: Question) -> Through | str:
    """Equal parts of a value along its channels; they are read one by one."""
    source = asked.read()
    shape = source.shape or ()
    dim = asked.operator.attributes.get("dim")
    if not isinstance(dim, int) or not shape or dim % len(shape) != asked.axis:
        return f"its input comes from {asked.named}, which is along another dimension"
    parts, rest = divmod(shape[asked.axis], asked.channels)
    if rest:
        return f"the parts of {asked.named} differ in size"
    if asked.operator.op == "chunk" and asked.operator.attributes.get("chunks") != parts:
        return f"{asked.named} makes {parts} parts, and not of every width"
    sized = asked.operator.op == "split"
    return Through(((source.name, asked.axis),), parts=parts, sized=sized)


def _glu(asked: Question) -> Through | str:
    """One half of the channels times the sigmoid of the other."""
    return _parted(asked)


def _moved(asked: Question) -> Through | str:
    """Dimensions in another order."""
    source, dims = asked.read(), len(asked.operator.shape or ())
    order = [*range(dims)]
    if asked.operator.op == "transpose":
        one, other = (int(asked.operator.attributes[name]) for name in ("dim0", "dim1"))  # type: ignore[arg-type]
        order[one], order[other] = order[other], order[one]
    else:
        node = _node(asked)
        given = [] if node is None else tree_leaves([node.args[1:], node.kwargs])
        order = [dim % dims for dim in given if type(dim) is int]
    if sorted(order) != [*range(dims)] or len(source.shape or ()) != dims:
        return f"{asked.named} on the way to it moves unknown dimensions"
    return Through(((source.name, order[asked.axis]),))


def _reduced(asked: Question) -> Through | str:
    """A mean over positions, behind the channels: these keep their place."""
    source, dims = asked.read(), _argument(asked, 1, "dim")
    total = len(source.shape or ())
    given = [dims] if isinstance(dims, int) else dims if isinstance(dims, list | tuple) else []
    if not given or any(dim % total <= asked.axis for dim in given):
        return f"its input comes from {asked.named}, which is not entrywise"
    return Through(((source.name, asked.axis),))


def _weighted(asked: Question) -> Through | str:
    """An operator with a weight makes channels anew, unless each has a kernel of its own."""
    operator = asked.operator
    words = OPERATORS[operator.op]
    groups, n, m = words.channels(operator.attributes)
    if operator.weight not in asked.recording.weights or words.takes == "indices":
        return f"its input comes from {asked.named}, a {operator.op}"
    if m != asked.channels or asked.axis != channel_axis(operator):
        return f"the channels of {asked.named} are not those of its input"
    if groups == 1:
        return Through(())
    if groups == n == m and asked.parts > 1:
        return f"{asked.named} has kernels of {asked.parts} parts"
    if groups == n == m:
        return Through(((operator.inputs[0], asked.axis),))
    if groups == n:
        return f"{asked.named} makes {m // n} channels of each"
    return f"{asked.named} has {groups} groups of channels"


def channel_axis(operator: Operator) -> int:
    """The axis of the output of an operator with a weight that counts its channels, from 0."""
    return len(operator.shape or ()) - 1 - OPERATORS[operator.op].ops[operator.op]


def _node(asked: Question) -> Any:
    """The node of an operator, with its arguments; None if only a later example has it."""
    name = asked.operator.name
    return next((node for node in asked.recording.graph.nodes if node.name == name), None)


def _argument(asked: Question, place: int, keyword: str) -> object:
    node = _node(asked)
    if node is None:
        return None
    return node.args[place] if len(node.args) > place else node.kwargs.get(keyword)


VIEWS = ("reshape", "view", "unsqueeze", "getitem", "flatten", "unflatten", "squeeze")
"""Operators that give the same entries another shape, or some of them."""

PARTED = ("chunk", "split")
"""Operators that make several values of one."""


def _table() -> dict[str, Rule]:
    # A sequential that is one operator has nothing in it.
    entrywise = (
        "abs add bfloat16 celu clamp clone contiguous cos detach div double dropout "
        "dropout1d dropout2d dropout3d elu eq erf exp expm1 float ge gelu gt half hardshrink "
        "hardsigmoid hardswish hardtanh identity le leaky_relu log log1p logsigmoid lt "
        "maximum minimum mish mul ne neg pow quick_gelu reciprocal relu relu6 relu_squared "
        "rrelu rsqrt selu sequential sigmoid sign silu sin softplus softshrink softsign sqrt "
        "square sub tanh tanhshrink to where"
    )
    over_positions = (
        "max_pool avg_pool lp_pool adaptive_avg_pool adaptive_max_pool zero_pad constant_pad "
        "reflection_pad replication_pad circular_pad upsampling_nearest upsampling_bilinear"
    )
    over_all_positions = "interpolate upsample upsample_nearest upsample_bilinear"
    layer_scales = "layer_scale layer_scale2d dinov2_layer_scale"
    return {
        **dict.fromkeys(entrywise.split(), _entrywise),
        **{f"{op}{d}d": _over_positions for op in over_positions.split() for d in (1, 2, 3)},
        **dict.fromkeys(over_all_positions.split(), _over_positions),
        **dict.fromkeys(layer_scales.split(), _layer_scale),
        **dict.fromkeys(VIEWS, _view),
        **dict.fromkeys(["mean", "sum", "amax", "amin"], _reduced),
        **dict.fromkeys(["transpose", "permute"], _moved),
        **dict.fromkeys(PARTED, _parted),
        **dict.fromkeys(OPERATORS, _weighted),
        "batch_norm": _norm_of_channels,
        "instance_norm": _norm_of_channels,
        "sync_batch_norm": _norm_of_channels,
        "prelu": _prelu,
        "pad": _pad,
        "parameter": _parameter,
        "glu": _glu,
    }


RULES: Mapping[str, Rule] = _table()
"""How channels go through each operator."""
