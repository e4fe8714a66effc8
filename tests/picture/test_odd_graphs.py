"""Whatever a plan holds is drawn: names in each other, values from nowhere, calls without end."""

import json
import random
from pathlib import Path

import pytest

from fxcompress.picture import Picture, graph_data
from fxcompress.picture.build import tree_of_plan
from fxcompress.plans.plan import NodeSummary, Plan
from tests.picture.test_exports import tokens
from tests.picture.test_folded import check_whole
from tests.report.plans import plan, site

WORDS = ("a", "b", "0", "1", "2", "body", "a.b", "", "shared", "(itself)", "é")
OPERATORS = ("linear", "relu", "getitem", "input", "output", "parameter")


def odd(chance: random.Random) -> Plan:
    """A plan that a file may hold, though no model has it."""

    def path() -> str:
        return ".".join(chance.choice(WORDS) for _ in range(chance.randint(0, 4)))

    def nodes(count: int) -> tuple[NodeSummary, ...]:
        return tuple(
            NodeSummary(
                name=f"n{at if chance.random() < 0.95 else 0}",
                op=chance.choice(OPERATORS),
                path=path(),
                inputs=tuple(f"n{chance.randint(0, count)}" for _ in range(chance.randint(0, 3))),
                shape=chance.choice([None, (), (2, 8), (8,)]),
            )
            for at in range(count)
        )

    sites = [
        site(name, 8, 8, chance.choice([None, 2, 8])).model_copy(
            update={"calls": chance.choice([0, 1, 2, 10**18])}
        )
        for name in sorted({path() for _ in range(chance.randint(0, 6))})
    ]
    graphs = {"before": nodes(chance.randint(1, 14)), "after": nodes(chance.randint(0, 14))}
    return plan(sites).model_copy(update=graphs)


@pytest.mark.parametrize("seed", range(5))
def test_any_plan_is_a_picture(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    for _ in range(30):
        made = odd(chance)
        check_whole(tree_of_plan(made))
        drawn = Picture.of_plan(made)
        assert drawn.text()
        assert drawn.near("*")
        assert tokens(drawn.to_dot())
        assert json.dumps(graph_data(made), allow_nan=False)
        assert drawn.to_model_explorer(tmp_path)
