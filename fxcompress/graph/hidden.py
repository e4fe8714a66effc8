"""Hidden values: what goes from its producers, channel by channel, into one consumer.

::

    gate = linear(x);  up = linear(x)        # producers (n channels each)
    h = mul(silu(gate), up)                  # every channel for itself
    y = linear(h)                            # the consumer

    h = conv2d(x)                            # a producer
    h = relu(batch_norm(h))                  # every channel for itself, with entries of its own
    y = conv2d(h)                            # the consumer

    gate, up = linear(x).chunk(2, -1)        # a producer of two parts: 2n channels
    y = linear(mul(silu(gate), up))          # the consumer

Such a value can do with fewer channels: rows of the producers and columns of the consumer go, and
what is between stays, but for what it has of each channel (:mod:`fxcompress.graph.channels`).  That
holds only if nothing else reads any of these values.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import nn

from fxcompress.graph.channels import Question, channel_axis, named, through
from fxcompress.graph.operator import Operator
from fxcompress.graph.recorder import Recording
from fxcompress.operators.per_channel import PerChannel
from fxcompress.operators.words import OPERATORS


@dataclass(frozen=True)
class HiddenValue:
    """A value that may have fewer channels.

    Attributes:
        producers: names of the operators with a weight that it comes from, in graph order.
        kernels: names of those on the way that have a kernel for every channel.
        between: names of the other operators on the way.
        held: what these have of every channel.
        consumer: name of the operator that reads it.
        sized: whether something on the way was given the number of channels, and may insist on it.
    """

    producers: tuple[str, ...]
    kernels: tuple[str, ...]
    between: tuple[str, ...]
    held: tuple[PerChannel, ...]
    consumer: str
    sized: bool = False

    @property
    def weighted(self) -> tuple[str, ...]:
        """Names of the operators with a weight before the consumer."""
        return (*self.producers, *self.kernels)


def hidden_value(model: nn.Module, recording: Recording, consumer: Operator) -> HiddenValue | str:
    """The hidden value that an operator reads, or why it can have no fewer channels.

    Args:
        model: that was recorded.
        recording: of it.
        consumer: an operator of it with a weight.
    """

    def at(name: str) -> Operator:
        return recording.operators[recording.places[name]]

    words = OPERATORS[consumer.op]
    groups, channels, _ = words.channels(consumer.attributes)
    if groups > 1:
        return f"{named(consumer)} has {groups} groups of channels"
    if words.takes == "indices" or not consumer.inputs:
        return f"{named(consumer)} reads no channels"
    inside: dict[str, Operator] = {}
    places: dict[str, tuple[int, int]] = {}
    reads: dict[str, tuple[str, ...]] = {}
    held: dict[PerChannel, Operator] = {}
    sized = False
    waiting = [(consumer.inputs[0], channel_axis(consumer), 1)]
    while waiting:
        name, axis, parts = waiting.pop()
        found = at(name)
        if places.setdefault(name, (axis, parts)) != (axis, parts):
            return f"the channels of {named(found)} are read in two ways"
        if name in inside:
            continue
        passed = through(Question(model, recording, found, axis, channels * parts, parts))
        if isinstance(passed, str):
            return passed
        inside[name] = found
        sized |= passed.sized
        reads[name] = tuple(read for read, _ in passed.inputs)
        held.update(dict.fromkeys(passed.held, found))
        waiting += [(read, place, parts * passed.parts) for read, place in passed.inputs]
    if reason := _read_elsewhere(recording, inside, consumer):
        return reason
    if reason := _shared(recording, inside, held, consumer):
        return reason
    order = sorted(inside, key=recording.places.__getitem__)
    weighted = [name for name in order if inside[name].op in OPERATORS]
    producers = tuple(name for name in weighted if not reads[name])
    if not producers:
        return "its input comes from no operator with a weight"
    return HiddenValue(
        producers,
        tuple(name for name in weighted if reads[name]),
        tuple(name for name in order if inside[name].op not in OPERATORS),
        tuple(sorted(held, key=lambda each: recording.places[held[each].name])),
        consumer.name,
        sized,
    )


def _read_elsewhere(
    recording: Recording, inside: Mapping[str, Operator], consumer: Operator
) -> str | None:
    """Who else reads a value on the way."""
    for found in inside.values():
        others = [user for user in found.users if user not in inside and user != consumer.name]
        if not others:
            continue
        other = recording.operators[recording.places[others[0]]]
        if other.op == "output":
            return f"the model returns the value of {named(found)}"
        why = f"{named(other)} reads the value of {named(found)}, too, and needs its channels"
        gates = {user for user in found.users if user in inside and inside[user].op == "mul"}
        if gates and _leads_to(recording, others[0], gates, recording.places[consumer.name]):
            why += ": each is weighted by all of them (squeeze and excitation)"
        return why
    return None


def reader_of(model: nn.Module, recording: Recording, maker: Operator) -> str | None:
    """Path of the operator that reads the hidden value that one makes; None if it makes none."""
    waiting, seen = [*maker.users], {maker.name}
    while waiting:
        found = recording.operators[recording.places[waiting.pop()]]
        if found.name in seen:
            continue
        seen.add(found.name)
        if found.op in OPERATORS:
            value = hidden_value(model, recording, found)
            made = not isinstance(value, str) and maker.name in value.weighted
            return found.path if made else None
        waiting += found.users
    return None


def _leads_to(recording: Recording, start: str, goals: Collection[str], end: int) -> bool:
    """Whether a value goes into one of some others, before a place in the graph."""
    seen, waiting = {start}, [start]
    while waiting:
        for user in recording.operators[recording.places[waiting.pop()]].users:
            if user in goals:
                return True
            if user not in seen and recording.places[user] < end:
                seen.add(user)
                waiting.append(user)
    return False


def _shared(
    recording: Recording,
    inside: Mapping[str, Operator],
    held: Mapping[PerChannel, Operator],
    consumer: Operator,
) -> str | None:
    """What is used more than once, or not of the consumer's type."""
    own = recording.weights[str(consumer.weight)]
    for each in (*(found for found in inside.values() if found.op in OPERATORS), consumer):
        facts = recording.weights[str(each.weight)]
        if len(facts.aliases) > 1:
            others = [name for name in facts.aliases if not name.startswith(f"{each.path}.")]
            return f"the weight of {named(each)} is tied to {', '.join(others)}"
        if len(facts.calls) > 1:
            return f"{named(each)} is called several times, on values of its own each time"
        for what, its, wanted in (
            ("type", facts.dtype, own.dtype),
            ("device", facts.device, own.device),
        ):
            if its != wanted:
                return (
                    f"the {what} of {named(each)} is {its}, that of {named(consumer)} is {wanted}"
                )
    for entries, holder in held.items():
        name = entries.name
        if sum((o.path, o.op) == (name, holder.op) for o in recording.operators) > 1:
            return f"{named(holder)} is called several times"
        readers = {recording.operators[recording.places[user]].scope for user in holder.users}
        for facts in recording.weights.values():
            if name not in (facts.name, facts.name.rpartition(".")[0]):
                continue
            if len(facts.aliases) > 1:
                return f"the parameter {facts.name} is tied"
            strangers = {*facts.strangers} - (readers if facts.name == name else set())
            if strangers:
                return f"the parameter {facts.name} is also read elsewhere"
    return None
