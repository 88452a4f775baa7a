"""What a replica costs: every constant of the simulator, fixed before the first policy was replayed."""

from dataclasses import dataclass, fields

from equipoise.errors import require


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Time and memory of one replica: Qwen2.5-7B in fp16 on one Ascend 910B4 with 32 GB.

    Published with DualMap (arXiv 2602.06502) and its start-up configuration: ``prefill_seconds``, ``block_tokens``,
    ``cache_tokens`` and 57,344 bytes of key-value cache per token. INFERRED, from sizes and bandwidths: the others; and
    that ``cache_tokens`` is meant per replica. Fails: UserError for a value that is not positive.
    """

    prefill_seconds: float = 1.6e-4
    """Per prompt token that must be computed."""
    hit_seconds: float = 2.3e-6
    """Per prompt token read from the context cache in host memory: 57,344 bytes at 25 GB/s."""
    decode_seconds: float = 0.019
    """A decoding step: 15.2 GB of weights at 0.8 TB/s."""
    context_seconds: float = 7.2e-8
    """What each token of context adds to a step of decoding: 57,344 bytes at 0.8 TB/s."""
    chunk_tokens: int = 512
    """Prompt tokens that are computed per step beside the running requests' next tokens (chunked prefill)."""
    kv_tokens: int = 240_000
    """Tokens of running requests that fit the device: 13.8 GB, what weights and 3 GB of workspace leave of 32 GB."""
    cache_tokens: int = 1_000_000
    """Tokens that a replica's context cache keeps, least recently used out first."""
    block_tokens: int = 512
    """Tokens per block: what is cached and compared is whole blocks."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            require(value > 0, f"{field.name} must be above 0, not {value}.")
