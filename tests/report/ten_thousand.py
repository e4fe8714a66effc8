"""A plan of very many sites, to see that its page stays quick.

    python tests/report/ten_thousand.py

Every site has a rank and a loss of its own, a spectrum, and a curve in the trade-off.
"""

from __future__ import annotations

import math
import random
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

from fxcompress.plans.plan import Plan
from fxcompress.plans.tradeoff import Curve, Offer, Tradeoff
from fxcompress.report import diff_plan
from tests.report.plans import plan, site

CHILDREN = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (4096, 1024),
    "self_attn.v_proj": (4096, 1024),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (4096, 11008),
    "mlp.up_proj": (4096, 11008),
    "mlp.down_proj": (11008, 4096),
    "mlp.gate": (4096, 64),
}


def large(sites: int = 10_000) -> Plan:
    """A plan of that many sites; the same every time."""
    draw = random.Random(0)
    made, curves = [], []
    for at in range(sites):
        layer, child = divmod(at, len(CHILDREN))
        name, (n, m) = [*CHILDREN.items()][child]
        path = f"model.layers.{layer}.{name}"
        rank = None if draw.random() < 0.1 else draw.randint(1, min(n, m) // 2)
        decay = draw.uniform(0.5, 2)
        spectrum = tuple(100 * draw.uniform(0.9, 1) / (1 + i) ** decay for i in range(64))
        lost = 0.0 if rank is None else draw.uniform(1e-6, 1e-3)
        reason = "" if rank else f"left dense by the budget: it would lose {draw.uniform(0, 1):.4f}"
        one = site(
            *(path, n, m, rank),
            predicted=lost,
            reason=reason,
            spectrum=spectrum,
            rule=f"rule-{child}",
        )
        made.append(one)
        text = "dense" if rank is None else f"pivoted {rank}"
        cost = float(one.after.parameters)
        more = Offer(text=f"{text} + 1", cost=cost + 5000, loss=lost * 0.99)
        offers = (Offer(text=text, cost=cost, loss=lost), more)
        curves.append(Curve(sites=(path,), offers=offers, taken=(0, 1)))
    base = plan(made, rewritten=False)
    at_now, at_more = [[one.offers[at] for one in curves] for at in (0, 1)]
    trade = Tradeoff(
        costs=tuple(math.fsum(o.cost for o in those) for those in (at_now, at_more)),
        losses=tuple(math.fsum(o.loss for o in those) for those in (at_now, at_more)),
        now=0,
        more=1,
        less=0,
        curves=tuple(curves),
    )
    return base.model_copy(update={"tradeoff": trade})


if __name__ == "__main__":
    page = diff_plan(large()).to_html()
    Path("ten-thousand.html").write_text(page, encoding="utf-8")
    print(f"ten-thousand.html: {len(page.encode()) / 1e6:.1f} MB")
