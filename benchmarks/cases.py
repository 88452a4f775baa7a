"""What is measured."""

from equipoise.config import DataConfig, ModelConfig, OptimizerConfig

DEMO = ModelConfig()
DEMO_BATCH, DEMO_SEQ_LEN = OptimizerConfig().batch_size, DataConfig().seq_len  # what `make demo` trains

# The layer whose routing is timed: many small experts, so that routing weighs as much as it does in practice.
ROUTING = {"dim": 512, "hidden_dim": 256, "num_experts": 64, "top_k": 8}
ROUTING_TOKENS = 4096
