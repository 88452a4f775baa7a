"""What several seeds can show."""

import math
import statistics

import numpy as np
import pytest

from equipoise.report.seeds import T_QUANTILES, detectable_difference, is_clear, paired_difference, t_quantiles


def probability_below(t: float, degrees: int) -> float:
    """Student's distribution function by the trapezoid rule: the oracle of the table."""
    x = np.linspace(0, t, 20001)
    scale = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(degrees * math.pi)
    return 0.5 + scale * float(np.trapezoid((1 + x**2 / degrees) ** (-(degrees + 1) / 2), x))


@pytest.mark.parametrize("degrees", T_QUANTILES)
def test_table_agrees_with_the_density(degrees):
    high, low = t_quantiles(degrees)
    assert probability_below(high, degrees) == pytest.approx(0.975, abs=1e-4)
    assert probability_below(low, degrees) == pytest.approx(0.80, abs=3e-4)


def test_between_rows_the_smaller_number_of_degrees_counts():
    assert t_quantiles(11) == t_quantiles(10)
    assert t_quantiles(10_000) == t_quantiles(120)


def test_paired_difference_takes_seeds_that_both_have():
    mean, error = paired_difference({0: 5.0, 1: 7.0, 2: 100.0}, {1: 4.0, 0: 4.0, 3: 1.0})
    assert mean == 2.0  # of 1 and 3
    assert error == pytest.approx(math.sqrt(2) / math.sqrt(2))


@pytest.mark.parametrize("values", [{0: 5.0}, {0: 5.0, 7: 1.0}, {0: 5.0, 1: math.inf}, {0: math.nan, 1: 2.0}])
def test_no_paired_difference_without_two_finite_pairs(values):
    assert paired_difference(values, {0: 4.0, 1: 4.0}) is None


def test_a_difference_is_clear_beyond_its_t_interval():
    assert is_clear(-4.31, 1.0, pairs=3)  # 4.303 on two degrees of freedom
    assert not is_clear(-4.29, 1.0, pairs=3)
    assert not is_clear(0.0, 0.0, pairs=3)


def test_detectable_difference_by_hand():
    # means of methods 2 and 4, of seeds 1.5 and 4.5: every residual is 0.5, so s2 = 1 on one degree of freedom
    assert detectable_difference([[1.0, 3.0], [2.0, 6.0]]) == pytest.approx((12.706 + 1.376) * math.sqrt(2 * 1 / 2))


def test_detectable_difference_ignores_what_methods_and_seeds_shift():
    noise = [[0.1, -0.2, 0.0], [0.0, 0.3, -0.1], [-0.2, 0.1, 0.2]]
    shifted = [[value + 5 * m + 11 * s for s, value in enumerate(row)] for m, row in enumerate(noise)]
    assert detectable_difference(shifted) == pytest.approx(detectable_difference(noise))


def test_with_two_methods_it_is_the_paired_t_test():
    first, second = [5.0, 5.3, 4.9], [4.8, 5.2, 4.5]
    error = statistics.stdev(a - b for a, b in zip(first, second)) / math.sqrt(3)
    assert detectable_difference([first, second]) == pytest.approx((4.303 + 1.061) * error)
