"""The paper's claims are tested on paired differences, and the verdicts follow the intervals."""

from collections.abc import Sequence

import pytest
from matplotlib.collections import LineCollection

from crislit.experiments.claims import (
    CLAIMS,
    CONTRADICTED,
    NOT_SHOWN,
    SHOWN,
    T_975,
    Differences,
    claims_table,
    claims_values,
    evaluate_claims,
)
from crislit.experiments.paper import TABLE1, TABLE1_RESULTS
from crislit.experiments.plots import plot_claims
from crislit.experiments.tables import tables_by_name
from tests.experiments.measured_runs import Groups, group, run, table_row


def grouped(**scores: Sequence[float]) -> Groups:
    """Return runs of rows of table 1 on shapes, by row: one score per seed."""
    return group(
        *(
            run("dataset=shapes", f"ablation={name}", f"seed={seed}", mIoU=score / 100)
            for name, values in scores.items()
            for seed, score in enumerate(values)
        )
    )


def test_the_interval_is_students() -> None:
    # By hand: mean 2, deviations -1, 0, 1, so sd 1; half width 4.303 / sqrt(3).
    differences = Differences((1.0, 2.0, 3.0))
    assert (differences.mean, differences.spread) == (2.0, 1.0)
    assert differences.interval == pytest.approx((2 - 2.4843, 2 + 2.4843), abs=1e-4)
    assert differences.verdict == NOT_SHOWN
    # Ten values: sd sqrt(10/9), half width 2.262 sqrt(10/9) / sqrt(10) = 0.754.
    ten = Differences(tuple(3.0 + (-1) ** i for i in range(10)))
    assert ten.interval == pytest.approx((3 - 0.754, 3 + 0.754), abs=1e-3)


def test_the_quantiles_are_those_of_students_distribution() -> None:
    stats = pytest.importorskip("scipy.stats")
    assert pytest.approx([stats.t.ppf(0.975, df) for df in range(1, 31)], abs=6e-4) == T_975


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ((1.0, 1.1, 0.9), SHOWN),
        ((-1.0, -1.1, -0.9), CONTRADICTED),
        ((1.0, -1.0, 0.5), NOT_SHOWN),
        ((5.0,), NOT_SHOWN),
    ],
)
def test_verdicts_follow_the_interval(values: tuple[float, ...], verdict: str) -> None:
    assert Differences(values).verdict == verdict


def test_rows_are_compared_seed_by_seed() -> None:
    ((_, runs),) = grouped(baseline=[40, 50, 44], con=[42, 51, 47], con_dec3=[43, 54]).items()
    table = claims_table(runs)
    contrastive = table_row(table, "contrastive learning helps", "shapes")
    assert contrastive["comparison"] == "con - baseline", "the other one was not run"
    assert {k: contrastive[k] for k in ("seeds", "mean", "sd", "above 0")} == {
        **{"seeds": "3", "mean": "+2.00", "sd": "1.00", "above 0": "3 of 3"},
    }
    assert contrastive["95 % interval"] == "-0.48 to +4.48"
    full = table_row(table, "the full model beats the baseline", "shapes")
    assert (full["seeds"], full["mean"]) == ("2", "+3.50"), "seeds of both rows only"


def test_a_claim_about_two_pairs_is_tested_on_their_average() -> None:
    scores = {"baseline": [40, 41], "con": [42, 44], "dec1": [45, 45], "con_dec1": [45, 48]}
    ((_, runs),) = grouped(**scores).items()
    tested = {(t.claim.text, t.comparison): t.differences.values for t in evaluate_claims(runs)}
    assert tested["contrastive learning helps", "average"] == pytest.approx((1.0, 3.0))
    assert tested["contrastive learning helps", "con - baseline"] == pytest.approx((2.0, 3.0))
    assert tested["contrastive learning helps", "con_dec1 - dec1"] == pytest.approx((0.0, 3.0))
    assert tested["the decoder helps", "average"] == pytest.approx((4.0, 4.0))
    whole = claims_table(runs, parts=False)
    assert [row[:3] for row in whole[1:]] == [
        ["contrastive learning helps", "shapes", "average"],
        ["the decoder helps", "shapes", "average"],
    ]


def test_a_claim_without_both_rows_is_left_out() -> None:
    ((_, runs),) = grouped(con=[40, 41], con_dec1=[45, 46]).items()
    # Contrastive learning and the decoder have a comparison each that was not run.
    tested = {(t.claim.text, t.comparison) for t in evaluate_claims(runs)}
    assert tested == {("the decoder helps", "con_dec1 - con")}


def test_the_claims_are_those_of_the_papers_table() -> None:
    assert {name for claim in CLAIMS for pair in claim.pairs for name in pair} == set(TABLE1)
    for claim in CLAIMS:
        for better, worse in claim.pairs:
            for results in TABLE1_RESULTS.values():
                if better in results and worse in results:
                    assert results[better][0] > results[worse][0], (claim.text, better)


def test_the_claims_as_data_have_every_number() -> None:
    rows = list(claims_values(grouped(con_dec1=[45, 46, 47], con_dec2=[46, 47.5, 48.5])))
    (row,) = rows
    assert (row["claim"], row["comparison"]) == ("a second layer helps", "con_dec2 - con_dec1")
    assert (row["seeds"], row["positive"], row["verdict"]) == ("3", "3", SHOWN)
    assert float(row["mean"]) == pytest.approx(4 / 3, abs=1e-4)
    assert float(row["low"]) == pytest.approx(4 / 3 - 4.303 * 0.28868 / 3**0.5, abs=1e-3)


def test_the_plot_shows_the_interval_of_each_whole_claim() -> None:
    scores = {"baseline": [40, 41], "con": [42, 44], "dec1": [45, 45], "con_dec1": [45, 48]}
    ((_, runs),) = grouped(**scores).items()
    (axes,) = plot_claims(runs).axes
    (bars,) = [lines for lines in axes.collections if isinstance(lines, LineCollection)]
    half = 12.706 * 2**0.5 / 2**0.5
    contrastive, decoder = (segment[:, 0].tolist() for segment in bars.get_segments())
    assert contrastive == pytest.approx([2 - half, 2 + half])
    assert decoder == pytest.approx([4.0, 4.0])
    _, labels = axes.get_legend_handles_labels()
    assert labels == ["shapes, 2 seeds"]


def test_the_claims_are_a_table_of_a_setting() -> None:
    tables = tables_by_name(grouped(con_dec1=[45, 46], con_dec2=[46, 47.5]))
    assert "| a second layer helps | shapes | con_dec2 - con_dec1 | 2 |" in tables["claims-tiny"]
