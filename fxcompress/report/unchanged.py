"""What stays as it was, and why: operators no rule rewrites, and sites left dense."""

from __future__ import annotations

from dataclasses import dataclass

from fxcompress.plans.plan import Plan
from fxcompress.rules.matching.folding import Literals, fold, fold_numbers, split_indices, words_of


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
        key = (literals, what, words_of(reason))
        alike.setdefault(key, []).append((name, parameters, reason))
    return tuple(
        Unchanged(
            patterns=fold(name for name, *_ in those),
            names=tuple(name for name, *_ in those),
            what=what,
            parameters=sum(parameters for _, parameters, _ in those),
            reason=fold_numbers([reason for *_, reason in those]),
        )
        for (_, what, _), those in alike.items()
    )


def _shape_text(op: str, shape: tuple[int, ...]) -> str:
    """A linear weight is stored (out x in); everything else is shown as stored."""
    if op == "linear" and len(shape) == 2:
        return f"{op} {shape[1]}→{shape[0]}"
    return f"{op} {'×'.join(map(str, shape))}".rstrip()
