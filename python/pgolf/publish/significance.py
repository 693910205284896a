"""Is a score better than another, and how many seeds would show it: t-tests by scipy, one-sided, lower is better.

`margin` is what the scores must be better by. Against several scores the test is Welch's, against a single number the
one-sample t-test; both are undefined where there is no spread to judge by, and then the answer is None.
"""

import math
import statistics
from collections.abc import Sequence

from scipy import stats

MOST_SEEDS = 1000  # beyond which nobody will run them


def describe(values: Sequence[float]) -> dict:
    """{"n", "mean", "std" (ddof 1), "min", "max", "ci95": [low, high]}; of one value std and ci95 are None."""
    n, mean, std = len(values), statistics.fmean(values), None
    interval = None
    if n > 1:
        std = statistics.stdev(values)
        half = stats.t.ppf(0.975, n - 1) * std / math.sqrt(n)
        interval = [mean - half, mean + half]
    return {"n": n, "mean": mean, "std": std, "min": min(values), "max": max(values), "ci95": interval}


def p_value(ours: Sequence[float], theirs: Sequence[float], margin: float = 0.0) -> float | None:
    """The probability of a difference like this one if ours were not better than theirs by more than `margin`."""
    if len(ours) < 2 or (_variance(ours) == 0 and _variance(theirs) == 0):
        return None
    if len(theirs) == 1:
        return float(stats.ttest_1samp(ours, theirs[0] - margin, alternative="less").pvalue)
    shifted = [value + margin for value in ours]
    return float(stats.ttest_ind(shifted, theirs, equal_var=False, alternative="less").pvalue)


def gain_needed(n: int, std: float, margin: float, alpha: float = 0.01) -> float:
    """The mean gain over a number that n seeds of this spread must show for p < alpha beyond `margin`."""
    return margin + float(stats.t.isf(alpha, n - 1)) * std / math.sqrt(n)


def seeds_needed(
    ours: Sequence[float], theirs: Sequence[float], margin: float = 0.0, alpha: float = 0.01, power: float | None = None
) -> int | None:
    """How many seeds of ours in all give p < alpha, theirs staying as they are.

    Args:
        power: the probability with which they do, our mean and spread being the true ones; None: if just these mean and
            spread are observed again, which happens about every other time.

    Returns:
        At least the number there are; None: no number up to MOST_SEEDS does, or there is no spread to judge by.
    """
    effect = statistics.fmean(theirs) - statistics.fmean(ours) - margin
    if len(ours) < 2 or effect <= 0 or (_variance(ours) == 0 and _variance(theirs) == 0):
        return None
    for n in range(len(ours), MOST_SEEDS + 1):
        ours_part, theirs_part = _variance(ours) / n, _variance(theirs) / len(theirs)
        error = math.sqrt(ours_part + theirs_part)
        freedom = n - 1.0
        if len(theirs) > 1:  # Welch and Satterthwaite's
            freedom = error**4 / (ours_part**2 / (n - 1) + theirs_part**2 / (len(theirs) - 1))
        critical = stats.t.isf(alpha, freedom)
        reached = (
            effect / error > critical if power is None else stats.nct.sf(critical, freedom, effect / error) >= power
        )
        if reached:
            return n
    return None


def _variance(values: Sequence[float]) -> float:
    return statistics.variance(values) if len(values) > 1 else 0.0
