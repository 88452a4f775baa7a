"""``equipoise generate``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from equipoise.commands import print_json

EXAMPLE = 'equipoise generate runs/mine --prompt "def main("'


@dataclass(frozen=True, kw_only=True)
class Config:
    """Let a trained model continue a text."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a finished `equipoise train`."""
    prompt: str = "\n"
    """Text to continue."""
    tokens: int = 200
    """Tokens to add."""
    temperature: float = 0.8
    """0 takes the likeliest token; higher is wilder."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that hold this share of the probability."""
    seed: int = 0
    """Seed of the draws."""


def run(config: Config, as_json: bool) -> None:
    """Print the prompt and what the model makes of it."""
    from equipoise.training.sampling import continue_text

    pieces = continue_text(config.run, config.prompt, config.tokens, config.temperature, config.top_p, config.seed)
    if as_json:
        print_json({"prompt": config.prompt, "text": "".join(pieces)})
        return
    print(config.prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
