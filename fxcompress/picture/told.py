"""What is told of the operators that one box stands for: form, ranks and loss, as ranges."""

from __future__ import annotations

from collections.abc import Sequence

from fxcompress.picture.boxes import DENSE, DROPPED, Box
from fxcompress.plans.plan import SitePlan


def site_text(sites: Sequence[SitePlan]) -> str:
    """``"pivoted, r 16..48 of 64, loss 0.0004..0.0031"``; empty if they stay dense.

    Args:
        sites: alike ones that are rewritten in one way.
    """
    first = sites[0]
    if first.form is None:
        return ""
    letters = ["k"] if first.reader else ["r"] * len(first.ranks)
    axes = [(at, False) for at in range(len(first.ranks))]
    if first.then is not None:
        letters += ["r"] * len(first.then.ranks)
        axes += [(at, True) for at in range(len(first.then.ranks))]
    words = [first.form_text]
    for letter, (at, then) in zip(letters, axes, strict=True):
        held = [site.then if then and site.then else site for site in sites]
        ranks = _span([each.ranks[at] for each in held])
        words.append(f"{letter} {ranks} of {held[0].full_ranks[at]:,}")
    if all(site.reader in ("", site.name) for site in sites):
        losses = [site.predicted for site in sites]
        low, high = (f"{value:.2g}" for value in (min(losses), max(losses)))
        words.append(f"loss {low if low == high else f'{low}..{high}'}")
    return ", ".join(words)


def status_text(box: Box, sites: Sequence[SitePlan]) -> str:
    """What happened to an operator, in words; empty if nothing did."""
    if box.status == DENSE:
        return "left dense"
    if sites:
        return site_text(sites)
    if box.status == DROPPED:
        return "dropped" if box.after is None else f"dropped: {box.after.op}"
    return "added" if box.before is None else ""


def _span(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,}..{high:,}"
