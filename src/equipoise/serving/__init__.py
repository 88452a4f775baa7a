"""Which replica gets a request: policies, and a simulator that compares them. Needs no torch and no server."""

from equipoise.serving.costs import Costs
from equipoise.serving.dual_map import DualMap
from equipoise.serving.faults import Fault
from equipoise.serving.fleet import Fleet
from equipoise.serving.policies import POLICIES
from equipoise.serving.replay import ReplaySettings, replay
from equipoise.serving.request import Request, read_requests, truncated
from equipoise.serving.router import Router
from equipoise.serving.settings import DualMapSettings
from equipoise.serving.workload import SkewedWorkload

__all__ = [
    "POLICIES",
    "Costs",
    "DualMap",
    "DualMapSettings",
    "Fault",
    "Fleet",
    "ReplaySettings",
    "Request",
    "Router",
    "SkewedWorkload",
    "read_requests",
    "replay",
    "truncated",
]
