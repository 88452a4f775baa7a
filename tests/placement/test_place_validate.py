import re

import numpy as np
import pytest

from equipoise.diagnosis.formats import from_loads
from equipoise.errors import UserError
from equipoise.placement import Placement, Settings, complaints, contiguous, place

LOADS = np.arange(1, 17).reshape(2, 8)
GB = 10**9


def refusal(changes: dict, settings: dict, trace=LOADS) -> str:
    with pytest.raises(UserError) as caught:
        place(trace, **({"devices": 4} | changes), settings=Settings(**settings))
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "settings", "words"),
    [
        ({"devices": 0}, {}, "devices must be above 0"),
        ({"nodes": 3}, {}, "4 devices do not divide over 3 nodes"),
        ({"replicas": -1}, {}, "replicas must be at least 0"),
        ({"replicas": 3}, {}, "8 experts and 3 replicas do not divide over 4 devices; take 0 or 4 replicas"),
        ({"devices": 16}, {}, "8 experts and 0 replicas do not divide over 16 devices; take 8 replicas"),
        ({"devices": 3}, {}, "take 1 replicas"),
        ({"groups": 3}, {}, "8 experts do not divide into 3 groups"),
        ({"nodes": 4, "groups": 2}, {}, "2 groups do not divide over 4 nodes"),
        ({"replicas": 28}, {}, "hold 9 experts, and there are only 8.*at most 24 replicas"),
        ({"nodes": 2, "groups": 2, "replicas": 12}, {}, "its node's groups have only 4.*at most 8 replicas"),
        ({"solver": "moetuner"}, {}, "Solver moetuner needs transitions"),
        ({}, {"objective": "affinity"}, "Objective affinity needs transitions"),
        ({"nodes": 2}, {"objective": "coactivation"}, "Objective coactivation needs tokens with several experts"),
        ({"solver": "eplb"}, {"objective": "affinity"}, "Solver eplb has its own purpose"),
        ({}, {"memory_bytes": 60 * GB}, "size of an expert is needed"),
        ({}, {"seconds": 0.0}, "seconds must be above 0"),
        ({}, {"windows": 0}, "windows must be above 0"),
        ({}, {"slack": -0.1}, "slack must be at least 0"),
    ],
)
def test_what_cannot_be_is_named(changes, settings, words):
    sentence = refusal(changes, settings)
    assert re.search(words, sentence), sentence


def test_memory_says_how_many_replicas_fit():
    tight = {"expert_bytes": GB, "memory_bytes": 6 * GB}
    assert "take at most 4 replicas" in refusal({"replicas": 8}, tight)
    assert "Each device would hold 8,000,000,000 bytes" in refusal({"replicas": 8}, tight)
    assert place(LOADS, 4, replicas=4, settings=Settings(**tight)).slots == 3
    assert "take more devices" in refusal({}, {"expert_bytes": GB, "memory_bytes": 3 * GB})


def test_a_trace_without_tokens_that_have_several_experts_has_no_coactivation():
    trace = from_loads(LOADS)
    with pytest.raises(UserError, match="several experts each"):
        place(trace, 4, nodes=2, settings=Settings(objective="coactivation"))


def test_a_present_placement_of_another_shape_is_refused():
    current = contiguous(2, 8, 2, 4)
    assert "2 layers, 8 experts and 2 devices" in refusal({}, {"current": current})


def test_complaints_name_doubled_copies_and_memory():
    order = np.array([[0, 1, 2, 0], [1, 1, 0, 2]])
    doubled = Placement(physical_to_logical=order, num_experts=3, devices=2)
    (sentence,) = complaints(doubled)
    assert "1 times a device holds two copies of one expert, first of expert 1 in layer 1" in sentence
    assert complaints(contiguous(2, 4, 2, 2), expert_bytes=3, memory_bytes=12) == []
    (sentence,) = complaints(contiguous(2, 4, 2, 2), expert_bytes=4, memory_bytes=12)
    assert "holds 16 bytes of experts and has 12" in sentence
