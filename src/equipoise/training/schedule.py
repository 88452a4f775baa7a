"""Learning rate and bias step over a run's length."""

import math

from equipoise.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, progress: float) -> float:
    """Linear warm-up, then a cosine to the minimum.

    Args:
        progress: share of the run that is done, 0 to 1.
    """
    if progress < config.warmup:
        return config.learning_rate * progress / config.warmup
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - config.warmup) / max(1e-9, 1 - config.warmup))))
    return config.min_learning_rate + (config.learning_rate - config.min_learning_rate) * cosine


def bias_rate(steps: int) -> float:
    """A step with which a bias can cross the sigmoid's range within the run: the published 1e-3, more in short runs.

    A thousand steps of 1e-3 travel 1; runs of under 1,500 steps get 1.5 / steps.
    """
    return max(1e-3, 1.5 / steps)
