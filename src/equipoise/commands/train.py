"""``equipoise train``."""

import os

from equipoise.commands import print_json
from equipoise.config import TrainConfig

Config = TrainConfig
EXAMPLE = "equipoise train --method loss_free --steps 500 --out runs/mine"


def run(config: TrainConfig, as_json: bool) -> None:
    """Train and print what became of it."""
    from equipoise.training.loop import train

    result = train(config)
    if int(os.environ.get("RANK", "0")) > 0:
        return  # torchrun's other ranks have the same result
    if as_json:
        print_json(result)
        return
    print(
        f"{result['method']}: perplexity {result['perplexity']:.3f} ({result['loss']:.4f} nats per token), MaxVio "
        f"{result['max_vio_global']:.2f}, {result['dead_experts']} dead experts, {result['steps']} steps, "
        f"{result['tokens_per_second']:,.0f} tokens/s.\nWeights, metrics and checkpoints: {config.out}"
    )
