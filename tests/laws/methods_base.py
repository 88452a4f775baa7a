"""What the laws need to know of the sequence loss, the dual steps and DeepSeek-V3's recipe."""

from typing import Any

JOINED = "its loss is of each sequence by itself, and tokens without padding are passed as one"
UNBIASED = "its loss counts the experts of highest score, not those that were dealt in turn"
SEQUENCES = ("sequence", "deepseek_v3")

SETTINGS: dict[str, dict[str, Any]] = {}
PER_CALL = dict.fromkeys(
    SEQUENCES, "its loss is of each sequence by itself, and tokens without a batch are one sequence"
)
EXEMPTIONS: dict[tuple[str, str], str] = {
    **{(method, "test_padding.test_masked_rows_equal_dropped_rows"): JOINED for method in SEQUENCES},
    ("deepseek_v3", "test_losses.test_balance_reads_one"): UNBIASED,
}
