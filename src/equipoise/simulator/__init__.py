"""What a policy would gain on a cluster: the real planners on a modelled machine. Needs no torch; all is simulated."""

from equipoise.simulator.cluster import Cluster, Link, Software, machines, read_cluster
from equipoise.simulator.cost import PHASES, Policy
from equipoise.simulator.policies import POLICIES
from equipoise.simulator.shape import Shape, find_shape, shapes
from equipoise.simulator.simulation import Settings, Simulation, simulate
from equipoise.simulator.tally import Outcome
from equipoise.simulator.workload import parse_workload

__all__ = [
    "PHASES",
    "POLICIES",
    "Cluster",
    "Link",
    "Outcome",
    "Policy",
    "Settings",
    "Shape",
    "Simulation",
    "Software",
    "find_shape",
    "machines",
    "parse_workload",
    "read_cluster",
    "shapes",
    "simulate",
]
