"""Training runs that a law is fitted to: from arrays, or from a CSV or JSON file."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from equipoise.errors import UserError, require

REQUIRED, OPTIONAL = ("params", "tokens", "loss"), ("flops", "total", "granularity")
FLOPS_PER_PRODUCT = 6.0  # of training, per parameter and token: 2 forward, 4 backward
FEWEST_RUNS = 4
LEAST_COUNT = 1000.0  # no language model has fewer parameters or saw fewer tokens: the unit is wrong
MOST_NATS = 20.0  # guessing evenly among half a billion words; a "loss" above it is a perplexity
FLOPS_RANGE = (0.1, 1000.0)  # plausible FLOPs per parameter and token


@dataclass(frozen=True)
class Runs:
    """Finished training runs, one entry each. ``Runs.of`` builds and checks them.

    Attributes:
        params: parameters that a token visits (active ones, for a Mixture-of-Experts).
        tokens: training tokens.
        loss: final loss, nats per token.
        flops: training FLOPs.
        total: parameters in all; None where the law does not read them.
        granularity: how many times finer the experts are than a dense feed-forward; None where it is not read.
    """

    params: Float[np.ndarray, " N"]
    tokens: Float[np.ndarray, " N"]
    loss: Float[np.ndarray, " N"]
    flops: Float[np.ndarray, " N"]
    total: Float[np.ndarray, " N"] | None = None
    granularity: Float[np.ndarray, " N"] | None = None

    @classmethod
    def of(cls, where: Callable[[int], str] = "run {}".format, **columns: Any) -> Runs:
        """Build and check runs from anything that becomes an array; ``flops`` is 6 * params * tokens if not given.

        Fails: UserError for lengths that differ, fewer than 4 runs, a value that is not finite or not positive (it is
        named by ``where``), and for units that make no sense.
        """
        arrays = {name: _numbers(name, values) for name, values in columns.items() if values is not None}
        lengths = {name: len(values) for name, values in arrays.items()}
        require(len(set(lengths.values())) == 1, f"Every run needs all values; there are {_listed(lengths)}.")
        count = lengths["params"]
        require(count >= FEWEST_RUNS, f"A law needs at least {FEWEST_RUNS} runs, better 15; there are {count}.")
        for name, values in arrays.items():
            _refuse_row(~np.isfinite(values), where, f"has no finite {name}; leave it out or mend it")
            _refuse_row(values <= 0, where, f"has {name} that is not positive; leave it out or mend it")
        arrays.setdefault("flops", FLOPS_PER_PRODUCT * arrays["params"] * arrays["tokens"])
        runs = cls(**arrays)
        _refuse_units(runs, where)
        return runs

    @property
    def flops_per_product(self) -> float:
        """Training FLOPs per parameter and token, the geometric mean over the runs."""
        return float(np.exp(np.log(self.flops / (self.params * self.tokens)).mean()))

    def features(self) -> dict[str, Float[np.ndarray, " N"]]:
        """Everything that a form may read."""
        known = {"params": self.params, "tokens": self.tokens}
        if self.total is not None:
            known |= {"total": self.total, "density": self.params / self.total}
        if self.granularity is not None:
            known |= {"granularity": self.granularity}
        return known


def read_runs(path: str | Path) -> dict[str, Runs]:
    """Read runs from CSV with a header, or from JSON: a list of records, or a table whose ``runs`` is one.

    Columns: params, tokens, loss; optional flops, total, granularity, and ``method``, by which runs are told apart.
    Others are ignored.

    Returns: runs by method, in order of first appearance; under "" where there is no method.
    Fails: UserError for a file that cannot be read, a column that is missing, and as ``Runs.of``; lines are named.
    """
    path = Path(path)
    rows, lines = _rows(path)
    require(bool(rows), f"{path} holds no runs.")
    missing = [name for name in REQUIRED if name not in rows[0]]
    have = ", ".join(map(str, rows[0])) or "none"
    require(not missing, f"{path} lacks {' and '.join(missing)}; its columns are {have}.")
    names = [*REQUIRED, *(name for name in OPTIONAL if name in rows[0])]
    groups: dict[str, list[int]] = {}
    for position, row in enumerate(rows):
        groups.setdefault(str(row.get("method") or ""), []).append(position)
    found = {}
    for method, places in groups.items():
        columns = {name: [_number(rows[place].get(name), name, lines[place]) for place in places] for name in names}
        try:
            found[method] = Runs.of(lambda index, places=places: lines[places[index]], **columns)
        except UserError as error:
            raise UserError(f"{method}: {error}" if method else str(error)) from error
    return found


def _rows(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The records, and what to call each of them."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix.lower() == ".json":
                return _records(path, json.load(file))
            reader = csv.DictReader(file, skipinitialspace=True)
            numbered = [(row, reader.line_num) for row in reader]
    except OSError as error:
        raise UserError(f"Cannot read the runs {path}: {error.strerror}.") from error
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path} is neither CSV nor JSON: {error}.") from error
    return [row for row, _ in numbered], [f"line {number} of {path}" for _, number in numbered]


def _records(path: Path, value: Any) -> tuple[list[dict[str, Any]], list[str]]:
    records = value.get("runs") if isinstance(value, dict) else value
    fine = isinstance(records, list) and all(isinstance(record, dict) for record in records)
    require(fine, f"{path} must hold a list of runs, each with {', '.join(REQUIRED)}.")
    return records, [f"run {number} of {path}" for number in range(len(records))]  # type: ignore


def _number(value: Any, name: str, line: str) -> float:
    """A cell; one that is empty is NaN, which is refused with its line."""
    try:
        return math.nan if value in (None, "") else float(value)
    except (TypeError, ValueError) as error:
        raise UserError(f"The {name} of {line} must be a number, not {value!r}.") from error


def _numbers(name: str, values: Any) -> Float[np.ndarray, " N"]:
    try:
        numbers = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(f"The {name} of the runs must be numbers.") from error
    require(numbers.ndim == 1, f"The {name} must be one number per run, not an array of shape {numbers.shape}.")
    return numbers


def _refuse_row(wrong: np.ndarray, where: Callable[[int], str], words: str) -> None:
    if wrong.any():
        place = where(int(np.argmax(wrong)))
        raise UserError(f"{place[0].upper()}{place[1:]} {words}.")


def _refuse_units(runs: Runs, where: Callable[[int], str]) -> None:
    for name in ("params", "tokens"):
        most = float(getattr(runs, name).max())
        words = f"The {name} reach only {most:g}: give counts, not thousands, millions or billions."
        require(most >= LEAST_COUNT, words)
    _refuse_row(runs.loss > MOST_NATS, where, f"has a loss above {MOST_NATS:g}: give nats per token, not perplexity")
    ratio = runs.flops / (runs.params * runs.tokens)
    low, high = FLOPS_RANGE
    words = "has flops that do not fit its params and tokens (about 6 * params * tokens); give its FLOPs in training"
    _refuse_row((ratio < low) | (ratio > high), where, words)
    if runs.total is not None:
        _refuse_row(runs.total < runs.params, where, "has fewer parameters in total than params, the active ones")


def _listed(lengths: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in lengths.items())
