import pytest
from torch import nn

from fxcompress.forms import FORMS, LinearShape
from fxcompress.report.bodies import BODIES, part_text


@pytest.mark.parametrize("form", sorted(FORMS))
@pytest.mark.parametrize("rank", [1, 5, 20])
def test_the_diff_shows_the_layers_that_the_form_builds(form: str, rank: int) -> None:
    shape = LinearShape(in_features=24, out_features=40, bias=True)
    body = FORMS[form].empty(shape, rank)
    built = [
        f"{name} linear {layer.in_features}→{layer.out_features}"
        for name, layer in body.named_children()
        if isinstance(layer, nn.Linear)
    ]
    shown = [f"{part.name} {part_text(part, 24, 40, [rank])}" for part in BODIES[form].parts]
    assert shown == built
    functions = [n.target.__name__ for n in body.graph.nodes if n.op == "call_function"]
    assert BODIES[form].tail.partition(" (")[0] == ", ".join(functions)


def test_ranks_that_differ_stay_symbols() -> None:
    pivot, combine = BODIES["pivoted"].parts
    assert part_text(pivot, 576, 1536, [96, 208]) == "linear 576→r"
    assert part_text(combine, 576, 1536, [96, 208]) == "linear r→1536-r"
