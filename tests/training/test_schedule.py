import math

import pytest

from equipoise.config import OptimizerConfig
from equipoise.training.schedule import bias_rate, learning_rate


@pytest.mark.parametrize(
    ("progress", "rate"),
    [
        (0.0, 0.0),
        (0.05, 1.0),
        (0.2, 4.0),
        (0.2 + 0.8 / 4, 1 + 3 * (0.5 + math.sqrt(0.125))),
        (0.6, 2.5),
        (1.0, 1.0),
        (1.01, 1.0),  # a run whose length was an estimate may be a step longer
    ],
)
def test_warms_up_in_a_line_and_falls_along_a_cosine(progress: float, rate: float) -> None:
    config = OptimizerConfig(learning_rate=4.0, min_learning_rate=1.0, warmup=0.2)
    assert learning_rate(config, progress) == pytest.approx(rate, rel=1e-12)


@pytest.mark.parametrize(("warmup", "rates"), [(0.0, [4.0, 2.5, 1.0]), (1.0, [0.0, 2.0, 4.0])])
def test_all_or_nothing_may_be_warm_up(warmup: float, rates: list[float]) -> None:
    config = OptimizerConfig(learning_rate=4.0, min_learning_rate=1.0, warmup=warmup)
    assert [learning_rate(config, progress) for progress in (0.0, 0.5, 1.0)] == pytest.approx(rates)


@pytest.mark.parametrize(("steps", "rate"), [(1, 1.5), (300, 5e-3), (1500, 1e-3), (100_000, 1e-3)])
def test_a_bias_travels_the_sigmoids_range_in_a_short_run_and_keeps_the_published_step_in_a_long_one(steps, rate):
    assert bias_rate(steps) == pytest.approx(rate)
    assert steps * bias_rate(steps) >= 1.5 - 1e-9
