"""What is measured: the decoder, batch and sequence length that `make demo` trains."""

from equipoise.config import DataConfig, ModelConfig, OptimizerConfig

DEMO = ModelConfig()
DEMO_BATCH, DEMO_SEQ_LEN = OptimizerConfig().batch_size, DataConfig().seq_len
