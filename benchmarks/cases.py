"""Shapes that are measured, from the models they are named after."""

from dataclasses import dataclass

from equipoise.config import ModelConfig


@dataclass(frozen=True)
class Layer:
    """One MoE layer: tokens, width, expert hidden width, experts, experts per token."""

    tokens: int
    dim: int
    hidden_dim: int
    num_experts: int
    top_k: int


# The demo's decoder, batch and sequence length: what `make demo` trains.
DEMO = ModelConfig()
DEMO_BATCH, DEMO_SEQ_LEN = 16, 128

LAYERS = {
    "demo": Layer(2048, 128, 128, 16, 2),
    "olmoe-quarter": Layer(4096, 512, 256, 64, 8),
    "mixtral-eighth": Layer(4096, 512, 1792, 8, 2),
}
