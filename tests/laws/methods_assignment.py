"""What the laws need to know of the methods that solve an assignment."""

from typing import Any

SETTINGS: dict[str, dict[str, Any]] = {
    # Else the laws would hardly see a plan. Its tolerance is in tokens, so that a larger batch would stop later.
    "selective_sinkhorn": {"probability": 1.0, "grad": "unroll", "tolerance": 0.0},
    "sparse_transport": {"evaluation": "top_k", "multiple": 1},
}
PER_CALL = {
    "bip": "its turns are taken on the tokens of one call, by definition",
    "selective_sinkhorn": "its plan is made for the tokens of one call, by definition",
    "sinkhorn": "its prices are solved on the tokens of one call, by definition",
    "sparse_transport": "its experts choose among the tokens of one call, by definition",
    "base": "its assignment is made for the tokens of one call, by definition",
}
EVEN = "its loads are equal by construction"
PLANNED = "its loads are spread by a plan"
EXEMPTIONS: dict[tuple[str, str], str] = {
    **{
        (method, law): reason
        for method, reason in PER_CALL.items()
        for law in (
            "test_counting.test_accumulation_counts_and_learns_as_one_batch",
            "test_foreign_loops.test_uneven_token_sums_equal_one_batch",
        )
        if (method, law) != ("sparse_transport", "test_counting.test_accumulation_counts_and_learns_as_one_batch")
    },
    **{
        (method, law): reason
        for method, reason in (
            ("sinkhorn", PLANNED),
            ("sparse_transport", EVEN),
            ("base", EVEN),
            ("selective_sinkhorn", PLANNED),
        )
        for law in (
            "test_losses.test_mirrored_layers_score_badly",
            "test_state.test_all_tokens_to_one_expert",
        )
    },
    (
        "selective_sinkhorn",
        "test_symmetry.test_weights_ignore_the_selection_state",
    ): "its weights are those of the plan",
}
