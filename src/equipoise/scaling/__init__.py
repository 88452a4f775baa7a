"""Scaling laws: fit them, know how far to trust them, plan the runs they need. Needs no torch."""

from equipoise.scaling.allocation import Candidates, Optimum
from equipoise.scaling.approach2 import Bias, PowerLaws, approach2_bias, fit_approach2
from equipoise.scaling.approach3 import fit_approach3
from equipoise.scaling.bootstrap import Interval
from equipoise.scaling.crossing import Crossing, find_crossing
from equipoise.scaling.fit import FitSettings, fit_scaling_law
from equipoise.scaling.law import ScalingLaw
from equipoise.scaling.planning import PlannedRun, grid_of, plan_isoflop
from equipoise.scaling.power import Precision, simulate
from equipoise.scaling.runs import Runs, read_runs
from equipoise.scaling.surface import Surface

__all__ = [
    "Bias",
    "Candidates",
    "Crossing",
    "FitSettings",
    "Interval",
    "Optimum",
    "PlannedRun",
    "PowerLaws",
    "Precision",
    "Runs",
    "ScalingLaw",
    "Surface",
    "approach2_bias",
    "find_crossing",
    "fit_approach2",
    "fit_approach3",
    "fit_scaling_law",
    "grid_of",
    "plan_isoflop",
    "read_runs",
    "simulate",
]
