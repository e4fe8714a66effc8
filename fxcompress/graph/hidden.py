"""Hidden values: what goes from its producers through entrywise operators into one consumer.

::

    gate = linear(x);  up = linear(x)        # producers (n channels each)
    h = mul(silu(gate), up)                  # every channel for itself
    y = linear(h)                            # the consumer

Such a value can do with fewer channels: rows of the producers and columns of the consumer go, and
what is between is not touched.  That holds only if nothing else reads any of these values.
"""

from __future__ import annotations

from dataclasses import dataclass

from fxcompress.graph.operator import Operator
from fxcompress.graph.recorder import Recording
from fxcompress.operators.words import OPERATORS

_NAMES = (
    "abs add celu clamp clone contiguous cos detach div dropout elu exp float gelu "
    "hardsigmoid hardswish hardtanh identity leaky_relu log logsigmoid mish mul neg pow "
    "quick_gelu relu relu6 relu_squared rrelu rsqrt selu sigmoid silu sin softplus softsign "
    "sqrt sub tanh to "
)

ENTRYWISE = frozenset(_NAMES.split())
"""Operators whose output in a channel depends on that channel of their operands only."""


@dataclass(frozen=True)
class HiddenValue:
    """A value that may have fewer channels.

    Attributes:
        producers: names of the operators with a weight that it comes from, in graph order.
        between: names of the entrywise operators on the way.
        consumer: name of the operator that reads it.
    """

    producers: tuple[str, ...]
    between: tuple[str, ...]
    consumer: str


def hidden_value(recording: Recording, consumer: Operator) -> HiddenValue | str:
    """The hidden value that an operator reads, or why it can have no fewer channels.

    Args:
        recording: of the model.
        consumer: a linear operator of it.
    """

    def named(name: str) -> Operator:
        return recording.operators[recording.places[name]]

    channels = consumer.attributes["in_features"]
    inside: dict[str, Operator] = {}
    waiting = [*consumer.inputs]
    while waiting:
        found = named(waiting.pop())
        if found.name in inside:
            continue
        inside[found.name] = found
        if found.op in OPERATORS:
            if reason := _no_producer(recording, found, channels):
                return reason
        elif found.op not in ENTRYWISE:
            return f"its input comes from {_named(found)}, which is not entrywise"
        elif found.shape is None or not found.shape or found.shape[-1] != channels:
            return f"{_named(found)} on the way to it changes the shape"
        else:
            waiting += found.inputs
    readers = {*inside, consumer.name}
    for found in inside.values():
        if others := [named(name) for name in found.users if name not in readers]:
            return f"{_named(others[0])} reads the value of {_named(found)}, too"
        if found.op not in OPERATORS and any(
            named(name).shape != found.shape for name in found.inputs
        ):
            return f"{_named(found)} on the way to it joins values of several shapes"
    for each in (*(found for found in inside.values() if found.weight), consumer):
        facts = recording.weights[str(each.weight)]
        if len(facts.calls) > 1:
            return f"{_named(each)} is called several times"
        if len(facts.aliases) > 1:
            return f"the weight of {_named(each)} is tied"
        own = recording.weights[str(consumer.weight)]
        if (facts.dtype, facts.device) != (own.dtype, own.device):
            return f"the weight of {_named(each)} has another type or is on another device"
    order = sorted(inside, key=recording.places.__getitem__)
    return HiddenValue(
        tuple(name for name in order if inside[name].op in OPERATORS),
        tuple(name for name in order if inside[name].op not in OPERATORS),
        consumer.name,
    )


def _no_producer(recording: Recording, found: Operator, channels: object) -> str | None:
    if found.op != "linear":
        return f"its input comes from {_named(found)}, a {found.op}"
    if found.attributes["out_features"] != channels or found.weight not in recording.weights:
        return f"the channels of {_named(found)} are not those of its input"
    return None


def _named(operator: Operator) -> str:
    """An operator in messages: ``model.layers.0.mlp.act (silu)``."""
    return f"{operator.path} ({operator.op})" if operator.path else operator.op
