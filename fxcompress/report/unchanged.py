"""What stays as it was, and why: operators no rule rewrites, and sites left dense."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from fxcompress.plans.plan import Plan
from fxcompress.rules.matching.folding import Literals, fold, split_indices

# A number that stands alone: not part of a path, a name or a version.
_NUMBER = re.compile(r"(?<![\w.])[0-9][0-9,]*(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?(?![\w]|\.\w)")


@dataclass(frozen=True)
class Unchanged:
    """Alike operators that stay as they were for the same reason.

    Attributes:
        patterns: folded paths.
        names: the paths, in graph order.
        what: operator and shape, ``"linear 576→49152"``.
        parameters: of all of them.
        reason: why; numbers in which the reasons differ are ranges.
    """

    patterns: tuple[str, ...]
    names: tuple[str, ...]
    what: str
    parameters: int
    reason: str


def unchanged(plan: Plan) -> tuple[Unchanged, ...]:
    """Everything with a weight that is not rewritten, folded, in graph order."""
    dense = [site for site in plan.sites if site.form is None]
    items = [
        *((u.name, _shape_text(u.op, u.shape), u.parameters, u.reason) for u in plan.unmatched),
        *((site.name, site.operator, site.before.parameters, site.reason) for site in dense),
    ]
    # The two lists have an order each; only the recorded graph knows their common one.
    order: dict[str, int] = {}
    for position, node in enumerate(plan.before):
        order.setdefault(node.path, position)
    items.sort(key=lambda item: order.get(item[0], len(plan.before)))
    alike: dict[tuple[Literals, str, tuple[str, ...]], list[tuple[str, int, str]]] = {}
    for name, what, parameters, reason in items:
        literals, _ = split_indices(name)
        key = (literals, what, tuple(_NUMBER.split(reason)))
        alike.setdefault(key, []).append((name, parameters, reason))
    return tuple(
        Unchanged(
            patterns=fold(name for name, *_ in those),
            names=tuple(name for name, *_ in those),
            what=what,
            parameters=sum(parameters for _, parameters, _ in those),
            reason=fold_reasons([reason for *_, reason in those]),
        )
        for (_, what, _), those in alike.items()
    )


def fold_reasons(reasons: Sequence[str]) -> str:
    """Reasons that differ in numbers only, as one.

    >>> fold_reasons(["no saving: rank 448 ≥ 418", "no saving: rank 512 ≥ 418"])
    'no saving: rank 448..512 ≥ 418'
    """
    literals = _NUMBER.split(reasons[0])
    columns = zip(*(_NUMBER.findall(reason) for reason in reasons), strict=True)
    numbers = [sorted(set(column), key=_value) for column in columns]
    texts = [one[0] if len(one) == 1 else f"{one[0]}..{one[-1]}" for one in numbers]
    return literals[0] + "".join(
        text + literal for text, literal in zip(texts, literals[1:], strict=True)
    )


def _shape_text(op: str, shape: tuple[int, ...]) -> str:
    """A linear weight is stored (out x in); everything else is shown as stored."""
    if op == "linear" and len(shape) == 2:
        return f"{op} {shape[1]}→{shape[0]}"
    return f"{op} {'×'.join(map(str, shape))}".rstrip()


def _value(number: str) -> float:
    return float(number.replace(",", ""))
