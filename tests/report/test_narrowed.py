"""A hidden value with fewer channels: one change of several operators, wherever they are."""

from __future__ import annotations

from collections.abc import Sequence

from fxcompress.plans.plan import AND_INPUT, Held, Part, Plan, SitePlan, Size
from fxcompress.report import diff_plan
from tests.report.pages import Page
from tests.report.plans import measured, plan, site

LOST = 0.0125


def chain(block: str, makers: Sequence[str], reader: str, k: int, lost: float) -> list[SitePlan]:
    """Operators around a value of 1,536 channels, of which k are kept, in a block of 576."""

    def one(name: str, n: int, m: int, after: tuple[int, int], member: int) -> SitePlan:
        size = after[0] * after[1]
        return site(f"{block}.{name}", n, m, None).model_copy(
            update={
                "form": "narrow",
                "rank": k,
                "full_rank": 1536,
                "bundle": f"{block}.{reader}{AND_INPUT}",
                "member": member,
                "parts": (Part(path="", op="linear", in_features=after[0], out_features=after[1]),),
                "predicted": lost if name == reader else 0.0,
                "rule": "ffn" if name == reader else "rest",
                "after": Size(parameters=size, macs=100 * size, bytes=4 * size),
            }
        )

    found = [one(name, 576, 1536, (576, k), at) for at, name in enumerate(makers)]
    return [*found, one(reader, 1536, 576, (k, 576), len(makers))]


def gated(rewritten: bool = False) -> Plan:
    sites: list[SitePlan] = []
    for layer, k in enumerate((1024, 896)):
        sites += chain(f"h.{layer}.mlp", ("gate", "up"), "down", k, LOST * (layer + 1))
    return plan(sites, rewritten=rewritten)


def encoder() -> Plan:
    """What makes the value and what reads it are in different modules, as in a BERT."""
    sites: list[SitePlan] = []
    for layer in range(3):
        sites += chain(f"layer.{layer}", ("inter.dense",), "output.dense", 1024, LOST)
        sites.append(site(f"layer.{layer}.attention.q", 576, 576, 96, predicted=0.001))
    return plan(sites)


def test_one_change_and_one_loss() -> None:
    text = str(diff_plan(gated()))
    assert (
        "h.{0..1}.mlp                                        2 alike\n"
        "  gate, up: 1,536 → 896..1,024 channels █▇, read by down  KL 0.0125..0.0250\n"
        "- gate                linear 576→1536         884,736\n"
        "+ gate                linear 576→k            516k..590k\n"
        "- up                  linear 576→1536         884,736\n"
        "+ up                  linear 576→k            516k..590k\n"
        "- down                linear 1536→576         884,736\n"
        "+ down                linear k→576            516k..590k    refitted\n"
        "  narrow, rule ffn (decoder.yaml:22)\n"
    ) in text
    assert text.count("KL 0.0125") == 1
    assert "k is the number of channels" in text


def test_operators_of_several_modules_are_one_block() -> None:
    text = str(diff_plan(encoder()))
    assert (
        "layer.{0..2}                                        3 alike\n"
        "  inter.dense: 1,536 → 1,024 channels, read by output.dense  KL 0.0125\n"
        "- inter.dense         linear 576→1536         884,736\n"
        "+ inter.dense         linear 576→1024         589,824\n"
        "- output.dense        linear 1536→576         884,736\n"
        "+ output.dense        linear 1024→576         589,824       refitted\n"
    ) in text
    assert "layer.{0..2}.attention" in text


def test_the_table_tells_the_loss_beside_what_reads_the_value() -> None:
    lines = str(encoder()).splitlines()
    assert next(line for line in lines if line.startswith("  inter.dense")).split()[-3:-1] == [
        "with",
        "output.dense",
    ]
    assert "0.0125" in next(line for line in lines if line.startswith("  output.dense"))


def test_what_was_measured_stands_there_too() -> None:
    found = measured(gated(rewritten=True))
    text = str(diff_plan(found))
    (line,) = (line for line in text.splitlines() if "read by down" in line)
    assert ", measured 0." in line
    up = next(line for line in str(found).splitlines() if line.startswith("  up "))
    assert up.count("with down") == 2


def test_square_layers_of_a_list_are_told_apart() -> None:
    """Both would be one row, as they have numbers for names and equal shapes."""
    sites = [
        each.model_copy(update={"operator": "linear 1536→1536"})
        for each in chain("net", ("0",), "2", 1024, LOST)
    ]
    assert "  0: 1,536 → 1,024 channels, read by 2  KL 0.0125\n" in str(diff_plan(plan(sites)))


def test_two_hidden_values_in_one_block() -> None:
    first = chain("h", ("a",), "b", 1024, LOST)
    other = chain("h", ("c",), "d", 512, LOST)
    mixed = [first[0], other[0], first[1], other[1]]
    text = str(diff_plan(plan(mixed)))
    assert text.index("+ b  ") < text.index("  c: 1,536 → 512 channels, read by d")


def test_what_else_has_entries_of_channels_has_lines_of_its_own() -> None:
    """The plan counts it with the first layer: there it is taken out again."""
    first, reader = chain("net", ("0",), "3", 1024, LOST)
    gone = 4 * (1536 - 1024)
    size = first.after.parameters
    first = first.model_copy(
        update={"after": Size({**first.after.root, "parameters": size - gone})}
    )
    held = (Held(name="net.1", parameters=4, bytes=32), Held(name="net.2", parameters=0, bytes=8))
    reader = reader.model_copy(update={"held": held})
    text = str(diff_plan(plan([first, reader])))
    assert (
        "- 0                   linear 576→1536         884,736\n"
        "+ 0                   linear 576→1024         589,824\n"
        "- 3                   linear 1536→576         884,736\n"
        "+ 3                   linear 1024→576         589,824       refitted\n"
        "- 1                   entries of channels     6,144\n"
        "+ 1                   entries of channels     4,096\n"
    ) in text
    held_with = Page(diff_plan(plan([first, reader])).to_html()).data["sites"]["bundles"]
    assert [one["held"] for one in held_with.values()] == [["net.1"]]


def test_the_page() -> None:
    page = Page(diff_plan(gated()).to_html())
    names = page.data["sites"]["name"]
    down = names.index("h.0.mlp.down")
    (bundle, *_) = page.data["sites"]["bundles"].values()
    assert bundle["sites"] == ["h.0.mlp.gate", "h.0.mlp.up", "h.0.mlp.down"]
    assert bundle["reader"] == "h.0.mlp.down"
    assert page.data["sites"]["rank"][down] == "1024 of 1536"
    assert page.words("elsewhere")[names.index("h.0.mlp.gate")] == "with down"
    assert page.words("elsewhere")[down] == ""
    assert page.data["sites"]["spectrum"][names.index("h.0.mlp.gate")] == []
