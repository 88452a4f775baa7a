"""Tiny trainings that several tests share."""

from pathlib import Path

import pytest

from equipoise.config import CompareConfig, ModelConfig, TrainConfig
from equipoise.training.loop import train
from tiny_runs import STEP_FLOPS, STEPS, Killed, parts, stopped_before, write_text


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="session")
def tiny(tiny_text: Path):
    """Makes the configuration of a tiny run of 9 steps, saved after the third and the sixth."""

    def tiny(out: Path, **settings) -> TrainConfig:
        own = {"checkpoint_every": 3, "log_every": 1, "validate_every": 2, "tensorboard": False}
        budget = {} if "flops" in settings else {"steps": STEPS}
        return TrainConfig(**parts(tiny_text, out, **budget | own | settings))

    return tiny


@pytest.fixture(scope="session")
def alone(tiny, tmp_path_factory) -> Path:
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("alone")
    train(tiny(folder))
    return folder


@pytest.fixture
def interrupted(tiny, tmp_path: Path):
    """Makes a run that was killed in its eighth step, and returns its configuration."""

    def interrupted(**settings) -> TrainConfig:
        config = tiny(tmp_path / "run", **settings)
        with pytest.raises(Killed), stopped_before(8):
            train(config)
        return config

    return interrupted


@pytest.fixture(scope="session")
def comparison(tiny_text: Path):
    """Makes the configuration of a tiny comparison, of two methods in 80 steps where it is not told otherwise."""

    def comparison(out: Path, **settings) -> CompareConfig:
        budget = {} if "minutes" in settings else {"flops": 80.4 * STEP_FLOPS}
        own = {"methods": ("unbalanced", "loss_free"), "model": {}} | budget | settings
        own["model"] = {"method": ModelConfig().method} | own["model"]
        return CompareConfig(**parts(tiny_text, out, **own))

    return comparison
