"""What runs cannot tell: refused where a parameter has no meaning, warned of where it is loose."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from equipoise.errors import UserError, require
from equipoise.scaling.form import CHINCHILLA, CONSTANT, Form
from equipoise.scaling.runs import Runs
from equipoise.scaling.variable_projection import EXPONENT_RANGE

if TYPE_CHECKING:
    from equipoise.scaling.law import ScalingLaw

LEAST_SPREAD = 0.03  # standard deviation of ln(feature): sizes within a few per cent of each other are one size
LEAST_BUDGETS_APART = 1.2
FEWEST_VALUES = 3  # two unknowns per term, beside E
LOOSE = 3.0  # an exponent whose interval spans this factor says little
SAME_BUDGET = 1.05
FEWEST_SIZES = 5
SEEN_OFTEN = 0.05
AT_EDGE = 1e-6


def refuse_unidentifiable(form: Form, runs: Runs) -> None:
    """Fails: UserError that names the parameters which these runs cannot tell apart, and what to vary."""
    for name in form.features:
        sentence = f"The law reads {name}: give this column, or leave its term out."
        require(name in runs.features(), sentence.replace("density", "total"))
    spread = float(runs.flops.max() / runs.flops.min())
    sentence = (
        f"All runs spend about {runs.flops.max():.2g} FLOPs; alpha and beta cannot be told apart from one budget: add "
        "runs of another, ten times larger or smaller."
    )
    require(spread >= LEAST_BUDGETS_APART, sentence)
    needed, have = len(form.parameters), len(runs.loss)
    names = ", ".join(form.parameters)
    require(have >= needed, f"{have} runs cannot tell {needed} parameters ({names}) apart; add runs.")
    measured = [name for name in form.features if name != "density"]  # which follows from params and total
    logs = {name: np.log(runs.features()[name]) for name in measured}
    for name, values in logs.items():
        terms = _parameters_of(form, name)
        distinct = len(np.unique(np.round(values / LEAST_SPREAD)))
        sentence = f"The runs have {distinct} different {name}, too few to tell {terms} and E apart: vary {name} more."
        require(distinct >= FEWEST_VALUES, sentence)
    _refuse_line(form, logs)


def _refuse_line(form: Form, logs: dict[str, Float[np.ndarray, " N"]]) -> None:
    """Features that only move together cannot be credited one by one."""
    centred = np.stack([values - values.mean() for values in logs.values()])
    directions, sizes, _ = np.linalg.svd(centred, full_matrices=False)
    if sizes[-1] / np.sqrt(centred.shape[1]) >= LEAST_SPREAD:
        return
    together = [name for name, share in zip(logs, np.abs(directions[:, -1])) if share > 0.2]
    terms = " and ".join(_parameters_of(form, name) for name in together)
    raise UserError(
        f"In these runs {' and '.join(together)} only move together, so {terms} cannot be told apart: vary "
        f"{together[0]} at equal {together[-1]}."
    )


def _parameters_of(form: Form, feature: str) -> str:
    names = [
        name
        for coefficient, powers in form.powers.items()
        for exponent, lowered in powers.items()
        if lowered == feature
        for name in (coefficient, exponent)
    ]
    return ", ".join(dict.fromkeys(names))


def warnings_of(law: ScalingLaw) -> tuple[str, ...]:
    """What holds a reader back from trusting the law, a sentence each."""
    found = [*_bounds(law), *_loose(law), *_grid(law)]
    if not len(law.draws):
        found.append("No intervals were computed: the estimate alone does not say how far it could be off.")
    return tuple(found)


def _bounds(law: ScalingLaw) -> list[str]:
    found = []
    low, high = EXPONENT_RANGE
    for name in law.form.exponents:
        value = law.parameters[name]
        if value - low < AT_EDGE or high - value < AT_EDGE:
            found.append(f"Bound hit: {name} ended at {value:.2f}, the edge of its range ({low} to {high}).")
    for name in law.form.coefficients:
        place = law.form.parameters.index(name)
        share = float((law.draws[:, place] <= 0).mean()) if len(law.draws) else 0.0
        if law.parameters[name] <= 0:
            found.append(f"Bound hit: {name} is 0, so the runs show no sign of {_meaning(law.form, name)}.")
        elif share > SEEN_OFTEN:
            found.append(f"{name} is 0 in {share:.0%} of the refits: the runs hardly show {_meaning(law.form, name)}.")
    return found


def _meaning(form: Form, coefficient: str) -> str:
    if coefficient == CONSTANT:
        return "an irreducible loss"
    return f"an effect of {' and '.join(form.powers[coefficient].values())}"


def _loose(law: ScalingLaw) -> list[str]:
    if not len(law.draws):
        return []
    found = []
    for name in law.form.exponents:
        low, high = law.intervals[name]
        if high > LOOSE * low:
            found.append(f"The runs hardly determine {name}: it could be from {low:.2f} to {high:.2f}.")
    return found


def _grid(law: ScalingLaw) -> list[str]:
    """Budgets with few sizes, or with all of them on one side of the optimum."""
    few, smaller, larger = [], [], []
    for budget, members in budgets_of(law.runs.flops).items():
        if len(members) < FEWEST_VALUES:
            continue  # not laid out by budgets
        if len(members) < FEWEST_SIZES:
            few.append(budget)
        if law.form == CHINCHILLA:
            params = law.runs.params[members]
            best = float(law.surface.best_params(budget, law.runs.flops_per_product))
            if best > params.max():
                smaller.append(budget)
            elif best < params.min():
                larger.append(budget)
    said = {
        f"there are fewer than {FEWEST_SIZES} runs": few,
        "all runs are smaller than the best size": smaller,
        "all runs are larger than the best size": larger,
    }
    return [f"At {_listed(budgets)} FLOPs {words}." for words, budgets in said.items() if budgets]


def _listed(budgets: list[float]) -> str:
    return ", ".join(f"{budget:.2g}" for budget in budgets)


def budgets_of(flops: Float[np.ndarray, " N"]) -> dict[float, np.ndarray]:
    """Runs of the same budget, by its mean: neighbours within 5 % belong together."""
    order = np.argsort(flops)
    starts = np.flatnonzero(np.diff(np.log(flops[order])) > np.log(SAME_BUDGET)) + 1
    return {float(flops[members].mean()): members for members in np.split(order, starts)}
