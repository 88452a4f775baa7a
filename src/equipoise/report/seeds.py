"""What several seeds can show: paired differences, and the smallest difference that could have been seen.

Quantiles of Student's t stand in a small table; between its rows the next smaller number of degrees of freedom is
taken, which errs towards caution.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

# degrees of freedom: (0.975 quantile, 0.80 quantile) of Student's t
T_QUANTILES = {
    1: (12.706, 1.376),
    2: (4.303, 1.061),
    3: (3.182, 0.978),
    4: (2.776, 0.941),
    5: (2.571, 0.920),
    6: (2.447, 0.906),
    7: (2.365, 0.896),
    8: (2.306, 0.889),
    9: (2.262, 0.883),
    10: (2.228, 0.879),
    12: (2.179, 0.873),
    15: (2.131, 0.866),
    20: (2.086, 0.860),
    30: (2.042, 0.854),
    60: (2.000, 0.848),
    120: (1.980, 0.845),
}


def t_quantiles(degrees: int) -> tuple[float, float]:
    """The 0.975 and the 0.80 quantile of Student's t; between the table's rows those of the row before."""
    assert degrees >= 1, "a spread needs at least one degree of freedom"
    return T_QUANTILES[max(row for row in T_QUANTILES if row <= degrees)]


def paired_difference(values: dict[int, float], baseline: dict[int, float]) -> tuple[float, float] | None:
    """Mean difference to the baseline over the seeds that both have, and its standard error.

    Args:
        values: seed to the method's value.
        baseline: seed to the baseline's value.

    Returns:
        (mean, standard error), or None with fewer than two shared seeds or where a value is not finite.
    """
    differences = [value - baseline[seed] for seed, value in values.items() if seed in baseline]
    if len(differences) < 2 or not all(map(math.isfinite, differences)):
        return None
    return statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(len(differences))


def is_clear(difference: float, standard_error: float, pairs: int) -> bool:
    """True where the 95 % t interval of a mean of `pairs` differences excludes zero."""
    return abs(difference) > t_quantiles(pairs - 1)[0] * standard_error


def detectable_difference(values: Sequence[Sequence[float]]) -> float:
    """The smallest difference between two methods that is found in 80 % of comparisons like this one.

    Methods and seeds form a table. What is left of it after the methods' and the seeds' means are taken away is noise,
    of variance s2 on (M-1)(n-1) degrees of freedom; a paired difference then has variance 2 s2 / n. The answer is
    (t_0.975 + t_0.80) sqrt(2 s2 / n), the usual central-t approximation: two-sided, 95 % confidence, 80 % power.

    Args:
        values: M methods of n values each, in the same order of seeds; M >= 2, n >= 2.
    """
    methods, seeds = len(values), len(values[0])
    assert methods >= 2, "a difference needs two methods"
    assert seeds >= 2, "a spread needs two seeds"
    of_method = [statistics.fmean(row) for row in values]
    of_seed = [statistics.fmean(column) for column in zip(*values, strict=True)]
    centre = statistics.fmean(of_method)
    noise = sum(
        (value - of_method[m] - of_seed[s] + centre) ** 2 for m, row in enumerate(values) for s, value in enumerate(row)
    )
    degrees = (methods - 1) * (seeds - 1)
    return sum(t_quantiles(degrees)) * math.sqrt(2 * noise / degrees / seeds)
