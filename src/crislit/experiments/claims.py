"""The paper's claims about table 1, tested on runs that differ in nothing but one part.

Two rows of the table are compared seed by seed: runs of one seed share the order of the data and
the drawn sentences, so that their difference varies less than their scores.
"""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from crislit.experiments.paper import TITLES
from crislit.experiments.records import Row
from crislit.experiments.runs import Groups, Measured, Runs, list_datasets

CLAIMS_CSV = (
    *("setting", "data", "claim", "comparison", "seeds", "mean", "spread", "low", "high"),
    *("positive", "verdict"),
)
SHOWN, NOT_SHOWN, CONTRADICTED = "shown", "not shown", "contradicted"
T_975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160),
    *(2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056),
    *(2.052, 2.048, 2.045, 2.042),
)
"""The 0.975 quantile of Student's t distribution with 1, 2, ..., 30 degrees of freedom.

With more, that of 30 is used: it makes intervals up to 5 percent too wide.
"""


class Claim(NamedTuple):
    """A claim of section 4.3: in each pair, the first row of table 1 scores above the second.

    Attributes:
        text: The claim.
        pairs: Names of rows.
    """

    text: str
    pairs: tuple[tuple[str, str], ...]


CLAIMS = (
    Claim("contrastive learning helps", (("con", "baseline"), ("con_dec1", "dec1"))),
    Claim("the decoder helps", (("dec1", "baseline"), ("con_dec1", "con"))),
    Claim("a second layer helps", (("con_dec2", "con_dec1"),)),
    Claim("a third layer helps", (("con_dec3", "con_dec2"),)),
    Claim("a fourth layer lowers the score", (("con_dec3", "con_dec4"),)),
    Claim("the full model beats the baseline", (("con_dec3", "baseline"),)),
)


class Differences(Measured):
    """Paired differences of the val mIoU, in points, one per seed."""

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 percent confidence interval of the mean, by Student's t; None for one seed."""
        if self.spread is None:
            return None
        freedom = len(self.values) - 1
        half = T_975[min(freedom, len(T_975)) - 1] * self.spread / math.sqrt(freedom + 1)
        return self.mean - half, self.mean + half

    @property
    def verdict(self) -> str:
        """Whether the runs show that the difference is positive."""
        if self.interval is None:
            return NOT_SHOWN
        low, high = self.interval
        return SHOWN if low > 0 else CONTRADICTED if high < 0 else NOT_SHOWN


class Tested(NamedTuple):
    """A claim, or one of its comparisons, on a data set."""

    dataset: str
    claim: Claim
    comparison: str
    differences: Differences


def paired_differences(better: Sequence[Row], worse: Sequence[Row]) -> dict[str, float]:
    """Return the differences of the mIoU in points by seed, for the seeds of both rows."""
    scores = [{row["seed"]: 100 * float(row["mIoU"]) for row in rows} for rows in (better, worse)]
    return {seed: scores[0][seed] - scores[1][seed] for seed in scores[0] if seed in scores[1]}


def evaluate_claims(runs: Runs) -> Iterator[Tested]:
    """Test every claim on every data set of one setting, on val.

    A claim with two comparisons is tested on their average, seed by seed; then each of them alone.
    Comparisons without runs are left out.
    """
    for dataset in list_datasets(runs, paper_rows=False):
        for claim in CLAIMS:
            compared = {
                f"{better} - {worse}": paired_differences(
                    runs.get((dataset, better, "val"), []), runs.get((dataset, worse, "val"), [])
                )
                for better, worse in claim.pairs
            }
            common = average(list(compared.values()))
            if len(compared) > 1 and common:
                yield Tested(dataset, claim, "average", Differences(common))
            for name, by_seed in compared.items():
                if by_seed:
                    yield Tested(dataset, claim, name, Differences(tuple(by_seed.values())))


def average(compared: Sequence[Mapping[str, float]]) -> tuple[float, ...]:
    """Average comparisons seed by seed, for the seeds that all of them have."""
    seeds = [seed for seed in compared[0] if all(seed in by_seed for by_seed in compared)]
    return tuple(statistics.fmean(by_seed[seed] for by_seed in compared) for seed in seeds)


def claims_table(runs: Runs, parts: bool = True) -> list[list[str]]:
    """Return the tested claims of one setting, the header first.

    Args:
        runs: The rows of the setting.
        parts: Show each comparison of a claim, too, and not only the whole claim.
    """
    header = ["claim", "data", "comparison", "seeds", "mean", "sd", "95 % interval", "above 0"]
    table = [[*header, "verdict"]]
    shown: set[tuple[str, str]] = set()
    for dataset, claim, comparison, differences in evaluate_claims(runs):
        if (dataset, claim.text) in shown and not parts:
            continue
        shown.add((dataset, claim.text))
        spread, interval = differences.spread, differences.interval
        table.append(
            [
                claim.text,
                TITLES.get(dataset, dataset),
                comparison,
                str(len(differences.values)),
                f"{differences.mean:+.2f}",
                "-" if spread is None else f"{spread:.2f}",
                "-" if interval is None else f"{interval[0]:+.2f} to {interval[1]:+.2f}",
                f"{count_positive(differences)} of {len(differences.values)}",
                differences.verdict,
            ]
        )
    return table


def claims_values(groups: Groups) -> Iterator[dict[str, str]]:
    """Yield the tested claims as data, with the columns of ``CLAIMS_CSV``."""
    for setting, runs in groups.items():
        for dataset, claim, comparison, differences in evaluate_claims(runs):
            low, high = differences.interval or (None, None)
            numbers = {"spread": differences.spread, "low": low, "high": high}
            yield {
                "setting": str(setting),
                "data": dataset,
                "claim": claim.text,
                "comparison": comparison,
                "seeds": str(len(differences.values)),
                "mean": f"{differences.mean:+.4f}",
                **{k: "" if value is None else f"{value:.4f}" for k, value in numbers.items()},
                "positive": str(count_positive(differences)),
                "verdict": differences.verdict,
            }


def count_positive(differences: Differences) -> int:
    """Return for how many seeds the first row scores above the second."""
    return sum(value > 0 for value in differences.values)
