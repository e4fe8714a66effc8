"""Plans made by hand: the reports need no model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fxcompress.pipeline.agreement import assess, units
from fxcompress.plans.plan import (
    Batch,
    BudgetOutcome,
    HeldBack,
    NodeSummary,
    Part,
    Plan,
    SitePlan,
    Size,
    Speed,
    Unmatched,
)

TWO = Batch(samples=2, shapes=((2, 50),))


def site(
    name: str,
    n: int,
    m: int,
    rank: int | None,
    *,
    form: str = "pivoted",
    predicted: float = 0.0,
    bias: bool = False,
    reason: str = "",
    rule: str = "decoder",
    location: str = "decoder.yaml:22",
    calls: int = 1,
    spectrum: tuple[float, ...] = (),
) -> SitePlan:
    """A linear site; a rank of None leaves it dense."""
    before = m * n + m * bias
    after = before
    if rank is not None:
        after = rank * (m + n - (rank if form == "pivoted" else 0)) + m * bias
    return SitePlan(
        name=name,
        weight=f"{name}.weight",
        op="linear",
        operator=f"linear {n}→{m}",
        in_features=n,
        out_features=m,
        bias=bias,
        dtype="float32",
        calls=calls,
        rule=rule,
        location=location,
        forms=("low_rank", "pivoted"),
        form=None if rank is None else form,
        rank=rank,
        full_rank=min(m, n),
        parts=() if rank is None else parts(form, n, m, rank),
        predicted=predicted,
        energy=1.0 if rank is None else 0.9,
        before=Size(parameters=before, macs=100 * before, bytes=4 * before),
        after=Size(parameters=after, macs=100 * after, bytes=4 * after),
        reason=reason,
        spectrum=spectrum,
    )


def parts(form: str, n: int, m: int, rank: int) -> tuple[Part, ...]:
    """What the forms really build; tests/test_parts.py compares."""
    if form not in ("low_rank", "pivoted"):
        return ()
    if form == "low_rank":
        return (_layer("down", n, rank), _layer("up", rank, m))
    combine, pivot = _layer("combine", n - rank, rank), _layer("pivot", rank, m)
    return (combine, Part(path="", op="add_"), pivot)


def _layer(path: str, n: int, m: int) -> Part:
    return Part(path=path, op="linear", in_features=n, out_features=m)


def unmatched(name: str, n: int, m: int, reason: str, op: str = "linear") -> Unmatched:
    return Unmatched(
        name=name, op=op, weight=f"{name}.weight", shape=(m, n), parameters=m * n, reason=reason
    )


def plan(
    sites: Sequence[SitePlan] = (),
    others: Sequence[Unmatched] = (),
    *,
    model_class: str = "transformers.models.llama.modeling_llama.LlamaForCausalLM",
    loss_unit: str = "nats per prediction",
    uniform: bool = False,
    warnings: tuple[str, ...] = (),
    expanded: tuple[str, ...] = (),
    rewritten: bool = False,
    keep: float = 0.8,
    batch: Batch = TWO,
) -> Plan:
    """A plan whose totals follow from its sites; ``rewritten`` adds recorded graphs."""
    dense = sum(one.before.parameters for one in sites)
    cost = sum(one.after.parameters for one in sites)
    rest = 1000 + sum(one.parameters for one in others)
    predicted = sum(one.predicted for one in sites)
    before = tuple(_node(one.name, one.op) for one in (*sites, *others))
    after = tuple(
        _node(f"{one.name}.{part}", "linear")
        for one in sites
        for part in (("",) if one.form is None else ("pivot", "combine"))
    )
    return Plan(
        model_class=model_class,
        rules="decoder.yaml",
        metric="kfac",
        loss_unit=loss_unit,
        calibration={"batches": 16, "predictions": 8192, "family": "categorical", "seed": 0},
        batch=batch,
        budget=BudgetOutcome(
            keep=keep,
            of="matched",
            unit="parameters",
            allocation="uniform" if uniform else "global",
            limit=keep * dense,
            cost=cost,
            dense=dense,
            multiplier=None if uniform else 3.25e-9,
            predicted=predicted,
            fitted=predicted,
            bound=None if uniform else predicted * 0.999,
        ),
        sites=tuple(sites),
        unmatched=tuple(others),
        model_before=Size(
            parameters=dense + rest, macs=100 * (dense + rest), bytes=4 * (dense + rest)
        ),
        model_after=Size(parameters=cost + rest, macs=100 * (cost + rest), bytes=4 * (cost + rest)),
        before=before if rewritten else (),
        after=after if rewritten else (),
        expanded=expanded,
        seconds={"calibrate": 93.2},
        warnings=warnings,
    )


def llama(
    layers: int = 30, dense: Sequence[str] = (), spectra: bool = False, rewritten: bool = False
) -> Plan:
    """A small Llama: seven linear layers a block, the head tied; ``dense`` names stay dense."""
    sites: list[SitePlan] = []
    for layer in range(layers):
        widths = {
            "self_attn.q_proj": (576, 576),
            "self_attn.k_proj": (576, 192),
            "self_attn.v_proj": (576, 192),
            "self_attn.o_proj": (576, 576),
            "mlp.gate_proj": (576, 1536),
            "mlp.up_proj": (576, 1536),
            "mlp.down_proj": (1536, 576),
        }
        for number, (child, (n, m)) in enumerate(widths.items()):
            name = f"model.layers.{layer}.{child}"
            # Any deterministic numbers that vary from site to site.
            step = (layer * 5 + number * 3) % 17
            stays = name in dense
            sites.append(
                site(
                    name,
                    n,
                    m,
                    None if stays else min(n, m) // 3 + 8 * (step % 9),
                    predicted=0.0 if stays else 1e-4 * (1 + step),
                    reason="left dense by the budget" if stays else "",
                    rule="attention" if "attn" in child else "mlp",
                    location="decoder.yaml:12" if "attn" in child else "decoder.yaml:22",
                    spectrum=_spectrum(step) if spectra else (),
                )
            )
    head = unmatched("lm_head", 576, 49152, "weight is tied to model.embed_tokens.weight")
    embedding = unmatched(
        "model.embed_tokens", 576, 49152, "no rule matches embedding", op="embedding"
    )
    return plan(sites, [embedding, head], rewritten=rewritten)


def shared(layers: int = 3) -> Plan:
    """Queries, keys and values rewritten together, but for one block; the output by itself."""
    sites: list[SitePlan] = []
    for layer in range(layers):
        block, rank = f"model.layers.{layer}.self_attn", 64 + 32 * layer
        widths = {"q_proj": 576, "k_proj": 192, "v_proj": 192}
        for child, m in widths.items():
            one = site(f"{block}.{child}", 576, m, rank, predicted=1e-3 * (1 + layer))
            common = (_layer("shared.down", 576, rank),) if child == "q_proj" else ()
            after = rank * m + (rank * 576 if common else 0)
            sites.append(
                one.model_copy(
                    update={
                        "form": "joint",
                        "full_rank": 576,
                        "bundle": f"qkv@{block}.q_proj",
                        "parts": (*common, _layer("up", rank, m)),
                        "after": Size(parameters=after, macs=100 * after, bytes=4 * after),
                    }
                )
            )
        sites.append(site(f"{block}.o_proj", 576, 576, 200, predicted=1e-3))
    return plan(sites)


def measured(made: Plan) -> Plan:
    """The same with measured losses: a good deal above the predicted ones, not in their order."""
    lost = {site.name: site.predicted for site in made.sites}
    means = np.array(
        [
            sum(lost[name] for name in members) * (1.2 + at % 7 / 10)
            for at, members in enumerate(units(made).values())
        ]
    )
    spread = np.array([0.9, 1.0, 1.1])
    predictions = np.full(3, 512)
    sums = 512 * np.outer(spread, means)
    whole = 1.1 * sums.sum(1)
    fidelity = assess(made, sums, whole, predictions, "categorical")
    held_back = HeldBack(
        batches=3, predictions=1536, output="categorical", measured=0.1729, error=0.0036
    )
    speed = Speed(
        before=1.42,
        after=1.34,
        spread=(1.04, 1.08),
        pairs=5,
        machine="cpu: made up",
        device="cpu",
        threads=2,
        dtype="float32",
    )
    found = {"fidelity": fidelity, "held_back": held_back, "speed": speed}
    return made.model_copy(update=found)


def _spectrum(step: int) -> tuple[float, ...]:
    return tuple(3.0 / (1 + i) ** (1 + step / 20) for i in range(64))


def _node(path: str, op: str) -> NodeSummary:
    return NodeSummary(name=path.replace(".", "_"), op=op, path=path, inputs=(), shape=(1, 16, 576))
