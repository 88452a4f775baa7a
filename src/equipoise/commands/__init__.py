"""The commands, one module each: ``Config``, ``run(config, as_json)`` and ``EXAMPLE``.

A module is imported when its command is asked for, so that no command waits for what another one needs.
"""

import json
from typing import Any

# Name on the command line to its module and what it does, in the order in which they are listed.
COMMANDS = {
    "compare": ("compare", "Train balancing methods side by side at equal FLOPs on a text, and report."),
    "train": ("train", "Train one decoder; started again, it resumes. Under torchrun, on many ranks."),
    "generate": ("generate", "Let a trained model continue a text."),
    "methods": ("methods", "List the balancing methods, or explain one."),
    "scaling-law": ("scaling_law", "Fit a scaling law to finished runs: the best model for a budget, with intervals."),
    "place": ("place", "Decide which devices hold which experts."),
    "simulate": ("simulate", "Simulate what policies of expert parallelism would cost on a cluster."),
    "replay-requests": ("replay_requests", "Compare policies that send requests to replicas, on simulated replicas."),
}


def print_json(value: Any) -> None:
    """Print a result for machines."""
    print(json.dumps(value, indent=1))
