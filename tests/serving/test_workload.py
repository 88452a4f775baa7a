from collections import Counter
from statistics import fmean

import pytest

from equipoise import UserError
from equipoise.serving import SkewedWorkload
from equipoise.serving.replay import hit_tokens_bound


def test_the_means_are_those_published_for_tools_and_agents():
    """8,596 and 182 tokens, 59 % seen before; 4 requests per second are ours."""
    requests = list(SkewedWorkload(num_requests=6000).requests())
    assert fmean(request.input_tokens for request in requests) == pytest.approx(8596, rel=0.05)
    assert fmean(request.output_tokens for request in requests) == pytest.approx(182, rel=0.05)
    assert 6000 / requests[-1].arrival == pytest.approx(4.0, rel=0.05)
    seen = sum(hit_tokens_bound(requests, 512)) / sum(request.input_tokens for request in requests)
    assert seen == pytest.approx(0.59, abs=0.03)


def test_prompts_fit_their_blocks_and_start_alike_by_zipfs_law():
    requests = list(SkewedWorkload(num_requests=5000, continued=0.0).requests())
    for request in requests:
        assert len(request.blocks) == -(-request.input_tokens // 512)
        assert request.input_tokens <= 20_480
    counts = [count for _, count in Counter(request.blocks[0] for request in requests).most_common()]
    assert len(counts) == 128
    assert counts[0] / counts[1] == pytest.approx(2, rel=0.25)
    assert counts[0] / 5000 == pytest.approx(1 / sum(1 / rank for rank in range(1, 129)), rel=0.1)


def test_a_block_always_follows_the_same_block():
    parents = {}
    for request in SkewedWorkload(num_requests=2000, continued=0.8).requests():
        for before, block in zip((None, *request.blocks), request.blocks):
            assert parents.setdefault(block, before) == before


def test_equal_seeds_give_equal_requests():
    def first(seed):
        return list(SkewedWorkload(num_requests=50, seed=seed).requests())

    assert first(3) == first(3)
    assert first(3) != first(4)


@pytest.mark.parametrize("wrong", [{"num_requests": 0}, {"rate": 0.0}, {"continued": 1.0}, {"most_tokens": 6656}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        SkewedWorkload(**wrong)
