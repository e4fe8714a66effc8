"""The texts, exactly.  To accept a change: ``pytest --write-golden``, and read the difference."""

from collections.abc import Callable

import pytest

from fxcompress.forms.pivoted import PIVOTED
from fxcompress.plans.plan import Batch, Plan
from fxcompress.report import diff_plan
from tests.report.plans import llama, measured, parts, plan, shared, site, unmatched

Golden = Callable[[str, str], None]


def a_site_left_dense() -> Plan:
    return llama(
        dense=["model.layers.3.self_attn.k_proj", "model.layers.7.self_attn.k_proj"], rewritten=True
    )


def gpt2() -> Plan:
    """Two blocks with biases, ``low_rank``, uniform ranks, and a loss that is not in nats."""
    reason = "no rule is about operator embedding"
    wte = unmatched("transformer.wte", 768, 50257, reason, op="embedding")
    sites = []
    for layer in range(2):
        for child, n, m in [("attn.c_attn", 768, 2304), ("mlp.c_fc", 768, 3072)]:
            sites.append(
                site(
                    f"transformer.h.{layer}.{child}",
                    n,
                    m,
                    256,
                    form="low_rank",
                    bias=True,
                    predicted=0.25,
                )
            )
    return plan(
        sites,
        [wte],
        model_class="transformers.models.gpt2.modeling_gpt2.GPT2LMHeadModel",
        loss_unit="squared error per output",
        uniform=True,
        warnings=("rule down matches nothing",),
        batch=Batch(shapes=((2, 16), (3, 5, 7), (), (4,))),
    )


def no_layers() -> Plan:
    """Operators at the root, numbered ones, one that is called twice, a form without a picture."""
    sites = [
        site("fc1", 100, 200, 20, predicted=0.01),
        site("fc2", 200, 10, 4, predicted=2e-6, calls=2, rule="last", location="decoder.yaml:30"),
        site("net.0", 64, 64, 8, predicted=0.01),
        site("net.2", 64, 64, 16, predicted=0.02),
        site("odd", 64, 64, 16, form="odd_form", predicted=0.03),
    ]
    return plan(sites, model_class="Net", expanded=("encoder.0.self_attn", "encoder.1.self_attn"))


def nothing_rewritten() -> Plan:
    reasons = [f"no saving: rank {rank} ≥ break-even 418" for rank in (448, 512)]
    sites = [
        site(f"h.{layer}.fc", 576, 1536, None, reason=reason)
        for layer, reason in enumerate(reasons)
    ]
    return plan(sites, model_class="Net", keep=1.0)


def all_unmatched() -> Plan:
    others = [
        unmatched(f"h.{layer}.fc", 64, 128, 'name does not match "*.mlp.*"') for layer in (0, 1)
    ]
    return plan([], others, model_class="Net")


def measured_llama() -> Plan:
    return measured(a_site_left_dense())


def measured_shared() -> Plan:
    """Together with warnings: the whole loses more than its sites."""
    made = measured(shared())
    assert made.fidelity is not None
    notes = ("the sites interact", "predicted losses are too low")
    return made.model_copy(
        update={"fidelity": made.fidelity.model_copy(update={"warnings": notes})}
    )


CASES = [
    *(llama, a_site_left_dense, gpt2, no_layers, nothing_rewritten, all_unmatched, shared),
    *(measured_llama, measured_shared),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_diff(case: Callable[[], Plan], golden: Golden) -> None:
    golden(f"{case.__name__}.diff.txt", f"{diff_plan(case())}\n")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_table(case: Callable[[], Plan], golden: Golden) -> None:
    golden(f"{case.__name__}.table.txt", f"{case()}\n")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_texts_hold_no_timings(case: Callable[[], Plan]) -> None:
    slow = case().model_copy(update={"seconds": {"calibrate": 1234.5, "record": 6.7}})
    assert str(diff_plan(slow)) == str(diff_plan(case()))
    assert str(slow) == str(case())


def test_one_rank_that_changes_leaves_other_lines_as_they_are() -> None:
    """What makes a diff of diffs readable."""
    before = llama()
    sites = list(before.sites)
    changed = sites[4]
    assert changed.rank is not None
    built = parts("pivoted", changed.in_features, changed.out_features, 7)
    sites[4] = changed.model_copy(update={"rank": 7, "parts": built})
    after = before.model_copy(update={"sites": tuple(sites)})
    texts = [str(diff_plan(one)).splitlines() for one in (before, after)]
    differing = [old for old, new in zip(*texts, strict=True) if old != new]
    assert len(differing) == 1
    assert differing[0].startswith("+ gate_proj.combine")


def test_what_a_function_is_for_is_what_its_form_says(monkeypatch: pytest.MonkeyPatch) -> None:
    line = "+ up_proj             add_"
    assert f"{line} (the pivots, as they are)" in str(diff_plan(llama()))
    monkeypatch.setattr(type(PIVOTED), "remarks", {"add_": "both together"})
    assert f"{line} (both together)" in str(diff_plan(llama()))


def test_orders_of_inputs_are_told() -> None:
    plan = llama()
    wide = [site for site in plan.sites if site.name.endswith("up_proj")]
    orders = {site.name: order for site, order in zip(wide, (36, 576), strict=False)}
    sites = tuple(
        site.model_copy(update={"order": orders.get(site.name, 0)}) for site in plan.sites
    )
    text = str(diff_plan(plan.model_copy(update={"sites": sites})))
    said = f"+ up_proj             channels in order, in 36..576 blocks (2 of {len(wide)})\n"
    assert f"{said}+ up_proj.combine " in text
    assert text.count("channels in order") == 1
