"""The commands, one module each: ``Config``, ``run(config, as_json)``, ``SUMMARY``, ``EXAMPLE``.

A module is imported to explain itself, so it imports what it works with only in ``run``.
"""

import json
from typing import Any

# Name on the command line to module, in the order in which they are listed.
COMMANDS = {
    "compare": "equipoise.commands.compare",
    "train": "equipoise.commands.train",
    "generate": "equipoise.commands.generate",
    "methods": "equipoise.commands.methods",
}


def print_json(value: Any) -> None:
    """Print a result for machines."""
    print(json.dumps(value, indent=1))
