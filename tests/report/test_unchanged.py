import pytest

from fxcompress.plans.plan import NodeSummary
from fxcompress.report.unchanged import unchanged
from fxcompress.rules.matching.folding import fold_numbers
from tests.report.plans import plan, site, unmatched


@pytest.mark.parametrize(
    ("reasons", "folded"),
    [
        (["tied"], "tied"),
        (["rank 448 ≥ 418", "rank 96 ≥ 418"], "rank 96..448 ≥ 418"),
        (["1,000 of 2e-3", "900 of 1.5e-3"], "900..1,000 of 1.5e-3..2e-3"),
        (["rank 8, of 9", "rank 12, of 9"], "rank 8..12, of 9"),
        (["rank 3 in h.0.fc, int8", "rank 4 in h.2.fc, int8"], "rank 3..4 in h.{0,2}.fc, int8"),
    ],
)
def test_fold_numbers(reasons: list[str], folded: str) -> None:
    assert fold_numbers(reasons) == folded


def test_numbers_in_names_are_not_ranges() -> None:
    """A tie to another layer is another reason."""
    others = [
        unmatched(f"h.{i}.fc", 8, 8, f"weight is tied to h.{i + 1}.fc, see int8") for i in range(2)
    ]
    assert [one.reason for one in unchanged(plan([], others))] == [one.reason for one in others]


def test_a_number_sign_in_a_reason_is_no_number() -> None:
    others = [unmatched("h.0.fc", 8, 8, "rule # 5"), unmatched("h.1.fc", 8, 8, "rule 4 5")]
    assert len(unchanged(plan([], others))) == 2


def test_order_is_that_of_the_graph() -> None:
    made = plan(
        [site("b", 8, 8, None, reason="dense"), site("d", 8, 8, 2)],
        [unmatched("a", 8, 8, "no"), unmatched("c", 8, 8, "no"), unmatched("lost", 8, 8, "no")],
    )
    nodes = tuple(
        NodeSummary(name=path, op="linear", path=path, inputs=(), shape=None) for path in "cdba"
    )
    ordered = unchanged(made.model_copy(update={"before": nodes}))
    assert [one.patterns for one in ordered] == [("c",), ("b",), ("a",), ("lost",)]


def test_folded_parameters_are_of_all_of_them() -> None:
    others = [unmatched(f"h.{i}.fc", 8, 16, "no") for i in range(3)]
    (folded,) = unchanged(plan([], others))
    assert (folded.patterns, folded.what, folded.parameters) == (
        ("h.{0..2}.fc",),
        "linear 8→16",
        3 * 8 * 16,
    )
