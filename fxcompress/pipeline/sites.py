"""Sites and groups of them: matched weights, with what the recording knows of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fxcompress.budget import permitted_ranks
from fxcompress.forms import (
    Body,
    Fitted,
    Rank,
    Shape,
    Template,
    find_form,
    fit,
)
from fxcompress.forms.narrow import narrowed
from fxcompress.forms.target import Ranks, Target
from fxcompress.forms.words import forms_for, hidden_forms
from fxcompress.graph.hidden import hidden_value, reader_of
from fxcompress.graph.operator import Operator
from fxcompress.graph.recorder import Recording
from fxcompress.operators.applied import operator_at, operator_path
from fxcompress.operators.modules import canonical_weight, shape_of
from fxcompress.operators.per_channel import PerChannel
from fxcompress.operators.resize import resize_obstacle
from fxcompress.pipeline.equal import HiddenSites, all_rigid, equal_widths, listed
from fxcompress.plans.plan import AND_INPUT, Size, total_size
from fxcompress.rules import Bundle, Match, MatchResult


@dataclass(frozen=True)
class Site:
    """One weight parameter with all its uses, and the rule that claimed it.

    Attributes:
        name: path of the module that owns the weight.
        shape: of the operator, with the sizes of what it is applied to in the recorded example.
        source: key of the value it is applied to; equal for sites with the same input.
        match: rule id, location and bounds on the rank.
    """

    name: str
    weight: str
    op: str
    shape: Shape
    calls: int
    source: str
    match: Match

    @property
    def in_features(self) -> int:
        return self.shape.in_features

    @property
    def out_features(self) -> int:
        return self.shape.out_features

    def dense_size(self) -> Size:
        """Size of the operator as it is."""
        return _operator_size(self.shape)

    def weight_in(self, model: nn.Module) -> Tensor:
        """The weight (canonical layout) as a model has it, detached."""
        return canonical_weight(operator_at(model, self.name)).detach()


@dataclass(frozen=True)
class Narrowing:
    """Where an operator stands that a narrowed hidden value leaves.

    Attributes:
        hidden: name of the group that is narrowed.
        form: by which.
        width: channels that are kept.
        member: place in that group.
    """

    hidden: str
    form: str
    width: int
    member: int


@dataclass(frozen=True)
class Group:
    """Sites that forms rewrite together: a single one, or several on one input.

    Attributes:
        name: that of the site if it is a single one.
        sites: in the order of the rule's pattern.
        forms: to choose from, by name.
        match: rule id, location and bounds on the rank.
        hidden: whether the last site reads what the others produce.
        narrowed: of a hidden value, what is left of its sites at several widths: of each site a
            group of one, with forms to choose from beside the narrowing.
        narrowing: of such a group of one, what it is left of.
        held: of a hidden value, what else has entries of its channels.
    """

    name: str
    sites: tuple[Site, ...]
    forms: Mapping[str, Fitted]
    match: Match | Bundle
    hidden: bool = False
    narrowed: tuple[tuple[Group, ...], ...] = ()
    narrowing: Narrowing | None = None
    held: tuple[PerChannel, ...] = ()

    def left_of(self, form: str, width: int, member: int) -> Group:
        """What a hidden value with fewer channels leaves of one of the sites."""
        place = Narrowing(self.name, form, width, member)
        return next(each for left in self.narrowed for each in left if each.narrowing == place)

    @property
    def equal(self) -> str | None:
        """The name that a rule gives to groups of one form and one rank; None without one."""
        return self.match.group if isinstance(self.match, Match) else None

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Of the operators."""
        return tuple(site.shape for site in self.sites)

    @property
    def rows(self) -> list[int]:
        """Output features of every operator."""
        return [site.out_features for site in self.sites]

    def ranks(self, form: str) -> Ranks:
        """The ranks of a form that the rule permits; none if it does not fit the shapes."""
        chosen = self.forms[form]
        permitted = _permitted(chosen.full_rank(), self.match)
        if self.held:  # of few channels less may be left than what goes beside the operators
            permitted = permitted[
                np.minimum(chosen.parameters(permitted), chosen.bytes(permitted)) >= 0
            ]
        return permitted if chosen.misfit() is None else permitted[:0]

    def sizes(
        self, form: str, rank: Rank, body: Body, order: int | None = None
    ) -> tuple[Size, ...]:
        """Size of every operator at a rank of a form; what is shared counts for the first.

        Args:
            form: its name.
            rank: of ``body``.
            body: of the form, with or without values.
            order: in how many blocks it puts channels in order; None to count the most.
        """
        ranks = np.array([rank], dtype=np.int64)
        chosen = fit(self.forms[form].form, self.shapes, self.held, order=order)
        whole = Size.of(lambda unit: unit.of_form(chosen, ranks)[0])
        if self.hidden:
            assert isinstance(rank, int)
            rest = [*map(_operator_size, narrowed(self.shapes, rank)[1:])]
        else:
            rest = [*map(_head_size, body.heads[1:], self.shapes[1:])]
        return (whole - total_size(rest), *rest)

    def approximated(self, form: str, target: Target, rank: Rank) -> tuple[Tensor | None, ...]:
        """The dense weights (canonical layout, float64) that a form stands for at a rank.

        None for an operator whose weight stays as it is.

        Args:
            form: its name.
            target: the weights, stacked if they are several.
            rank: of the form.
        """
        chosen = self.forms[form]
        exact = [
            factor.to(torch.float64) if factor.is_floating_point() else factor
            for factor in chosen.factors(target, rank)
        ]
        return chosen.products(exact)


def _operator_size(shape: Shape) -> Size:
    return Size.of(lambda unit: unit.of_operator(shape))


def _head_size(head: nn.Module, shape: Any) -> Size:
    """Size of what one of several operators has for itself."""
    return Size.of(lambda unit: unit.of_head(head, shape))


def on_meta(chosen: Fitted) -> Fitted:
    """The form for the same operators without memory: for bodies that are only looked at."""
    meta = torch.device("meta")
    return fit(chosen.form, [replace(s, device=meta) for s in chosen.shapes], chosen.held)


PAIRS = 16
"""Values of each of two ranks that are offered: with all of them there would be millions."""


def _permitted(full_rank: Rank, match: Match | Bundle) -> Ranks:
    """Ranks within the bounds of a rule (k), or pairs of them (k x 2)."""

    def within(full: int) -> Ranks:
        return permitted_ranks(
            full,
            minimum=match.limits.min_rank,
            maximum=match.limits.max_rank,
            multiple_of=match.limits.multiple_of,
        )

    if isinstance(full_rank, int):
        return within(full_rank)
    first, second = (_thinned(within(full)) for full in full_rank)
    pairs = np.meshgrid(first, second, indexing="ij")
    return np.stack(pairs, axis=-1).reshape(-1, 2)


def _thinned(ranks: Ranks) -> Ranks:
    """At most :data:`PAIRS` of them, evenly spaced, the last one among them."""
    if len(ranks) <= PAIRS:
        return ranks
    return ranks[np.linspace(0, len(ranks) - 1, PAIRS).round().astype(np.int64)]


_SHIFT = 20


def encoded(ranks: Ranks) -> Ranks:
    """One number for each rank or pair of ranks, as the solver has them; it keeps their order."""
    return ranks if ranks.ndim == 1 else (ranks[:, 0] << _SHIFT) + ranks[:, 1]


def decoded(full_rank: Rank, code: int) -> Rank:
    """The rank, or the pair, that a number stands for."""
    return code if isinstance(full_rank, int) else (code >> _SHIFT, code & ((1 << _SHIFT) - 1))


def gather_sites(
    model: nn.Module,
    recording: Recording,
    matched: MatchResult,
    templates: Mapping[str, Template] = MappingProxyType({}),
    legality: Callable[[Operator], str | None] = lambda operator: None,
    rigid: Callable[[Sequence[HiddenSites]], Iterable[tuple[HiddenSites, str]]] = all_rigid,
) -> tuple[tuple[Site, ...], tuple[Group, ...], dict[str, str]]:
    """The matched weights of a recording in graph order, their groups, and what cannot be one.

    Every site is a group of one; groups of several come after these.  The last value says of
    weights that a rule would narrow the input of why that cannot be done.

    Args:
        model: the working copy.
        recording: of ``model``.
        matched: what the rules match in it.
        templates: of the rules, by the names of the forms that they stand for.
        legality: why an operator cannot be rewritten; None if it can.
        rigid: which hidden values cannot have fewer channels, though by the graph they can.
    """
    operators = {operator.name: operator for operator in recording.operators}
    by_weight: dict[str, Site] = {}
    hidden: list[HiddenSites] = []
    refused: dict[str, str] = {}
    protected = {match.weight: match.rule_id for match in matched.protected}
    matches = {match.weight: match for match in matched.matches}
    for match in matched.matches:
        consumer = operators[match.operators[0]]
        _add_site(by_weight, model, recording, consumer, match)
        if hidden_forms(match.forms):
            found = hidden_value(model, recording, consumer)
            makers = [] if isinstance(found, str) else [operators[n] for n in found.weighted]
            reason = found if isinstance(found, str) else None
            for each in (*makers, consumer):
                own = matches.get(str(each.weight))
                if each.weight in protected:
                    reason = f"{each.path} is kept dense by rule {protected[str(each.weight)]}"
                elif own is None and (illegal := legality(each)):
                    reason = reason or f"{each.path} cannot be rewritten: {illegal}"
                elif own is not None and own is not match and own.group is not None:
                    reason = reason or f"{each.path} is in a group of equal ranks"
                elif obstacle := resize_obstacle(model, each.path):
                    reason = reason or obstacle
            if isinstance(found, str) or reason is not None:
                refused[match.weight] = f"{listed(match)}: {reason}"
                continue
            weights = (*(str(each.weight) for each in makers), match.weight)
            name = f"{consumer.path}{AND_INPUT}"
            paths = (*(each.path for each in makers), consumer.path)
            if any(operator_path(model, path) != path for path in paths):
                match = replace(match, then=())  # a forward of its own wants a layer of its class
            hidden.append(HiddenSites(name, weights, match, found.held, paths, found.sized))
    for value, why in rigid(hidden):
        refused[value.match.weight] = f"{listed(value.match)}: {why}"
    hidden = [value for value in hidden if value.match.weight not in refused]
    equal, unequal = equal_widths(hidden, matched, refused)
    refused |= unequal
    hidden = [value for value in hidden if value.match.weight not in refused]
    first = {str(operator.weight): operator for operator in reversed(recording.operators)}
    for value in hidden:
        for weight in value.weights[:-1]:
            alone = replace(value.match, weight=weight, forms=(), group=None)
            _add_site(by_weight, model, recording, first[weight], matches.get(weight, alone))
    order = [operator.weight for operator in recording.operators if operator.weight in by_weight]
    sites = tuple(by_weight[str(weight)] for weight in dict.fromkeys(order))
    groups = [
        *(_group(site.name, (site,), site.match, templates) for site in sites),
        *(
            _group(b.name, tuple(by_weight[weight] for weight in b.members), b, templates)
            for b in matched.bundles
            if equal.isdisjoint(b.members)
        ),
        *(
            _group(h.name, tuple(map(by_weight.__getitem__, h.weights)), h.match, templates, h.held)
            for h in hidden
        ),
    ]
    inside = {weight for value in hidden for weight in value.weights}
    for weight in refused.keys() - inside:
        if reader := reader_of(model, recording, operators[matches[weight].operators[0]]):
            refused[weight] += f"; its output can be narrowed: match {reader}, which reads it"
    return sites, tuple(groups), refused


def _add_site(
    sites: dict[str, Site], model: nn.Module, recording: Recording, operator: Operator, match: Match
) -> None:
    """Add the site of an operator, unless its weight has one already."""
    if match.weight not in sites:
        facts = recording.weights[match.weight]
        shape = shape_of(operator_at(model, operator.path))
        sites[match.weight] = Site(
            name=operator.path,
            weight=match.weight,
            op=operator.op,
            shape=shape.counted_on(facts.rows, facts.inputs),
            calls=len(facts.calls),
            source=facts.source,
            match=match,
        )


def _group(
    name: str,
    sites: tuple[Site, ...],
    match: Match | Bundle,
    templates: Mapping[str, Template],
    held: tuple[PerChannel, ...] | None = None,
) -> Group:
    """Sites with the forms that a match offers them.

    Args:
        name: of the group.
        sites: of it.
        match: offers forms.
        templates: by the names of the forms that they stand for.
        held: of a hidden value, as of :class:`Group`; None for any other sites.
    """
    shapes, hidden = [site.shape for site in sites], held is not None
    channels = hidden_forms(match.forms)
    names = channels if hidden else [each for each in match.forms if each not in channels]
    op = sites[0].op
    forms = {each: fit(find_form(each, op, templates), shapes, held or ()) for each in names}
    group = Group(name, sites, forms, match, hidden, held=held or ())
    if not hidden or isinstance(match, Bundle) or not match.then:
        return group
    return replace(group, narrowed=tuple(_narrowed(group, match, templates)))


WIDTHS = 8
"""Widths of a hidden value at which other forms are offered for what is left."""


def _narrowed(
    group: Group, match: Match, templates: Mapping[str, Template]
) -> Iterator[tuple[Group, ...]]:
    """What is left of the operators around a hidden value, at some widths."""
    for name, form in group.forms.items():
        permitted, full = group.ranks(name), form.full_rank()
        assert isinstance(full, int)
        grid = np.linspace(0, full, WIDTHS + 2)[1:-1] if len(permitted) else ()
        for width in sorted({int(permitted[np.abs(permitted - at).argmin()]) for at in grid}):
            left = []
            shapes = narrowed(group.shapes, width)
            for member, (site, shape) in enumerate(zip(group.sites, shapes, strict=True)):
                offered = forms_for(site.op, match.then)
                forms = {
                    each: fit(find_form(each, site.op, templates), [shape]) for each in offered
                }
                place = Narrowing(group.name, name, width, member)
                own = replace(site, shape=shape)
                left.append(
                    Group(
                        f"{site.name} of {group.name}, {name} {width}",
                        (own,),
                        forms,
                        match,
                        narrowing=place,
                    )
                )
            yield tuple(left)


def with_narrowed(groups: Iterable[Group]) -> Iterator[Group]:
    """Groups, each followed by what is left of it where it is a hidden value that is narrowed."""
    for group in groups:
        yield group
        for left in group.narrowed:
            yield from left
