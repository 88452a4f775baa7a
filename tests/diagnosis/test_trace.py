import numpy as np
import pytest

from equipoise.diagnosis.trace import Trace, from_routing
from equipoise.errors import UserError

# Four tokens, two layers, two experts per token; -1 is a dropped one.
EXPERTS = np.array([[[0, 1], [2, 1]], [[0, 2], [2, 0]], [[1, -1], [1, 2]], [[2, 0], [-1, -1]]])
WINDOWS = np.array([0, 0, 1, 1])


def counted(**others) -> Trace:
    return from_routing(EXPERTS, WINDOWS, 3, **others)


def test_counts_by_hand():
    trace = counted()
    assert trace.load_WLE.tolist() == [[[2, 1, 1], [1, 1, 2]], [[1, 1, 1], [0, 1, 1]]]
    assert trace.transition_MEE.tolist() == [[[1, 1, 2], [0, 2, 2], [1, 0, 1]]]
    assert trace.coactivation_LEE.tolist() == [
        [[0, 1, 2], [1, 0, 0], [2, 0, 0]],
        [[0, 0, 1], [0, 0, 2], [1, 2, 0]],
    ]
    assert (trace.top_k, trace.layers, trace.num_experts) == (2, ("0", "1"), 3)


def test_counts_agree_with_a_loop_over_tokens():
    draw = np.random.default_rng(0)
    experts = draw.integers(-1, 7, (101, 3, 2))
    experts[:, :, 1] = np.where(experts[:, :, 1] == experts[:, :, 0], -1, experts[:, :, 1])
    windows = draw.integers(0, 3, 101)
    windows[0] = 2
    trace = from_routing(experts, windows, 7)
    load, move, pair = np.zeros((3, 3, 7), int), np.zeros((2, 7, 7), int), np.zeros((3, 7, 7), int)
    for token, window in zip(experts, windows):
        for layer in range(3):
            here = [e for e in token[layer] if e >= 0]
            for a in here:
                load[window, layer, a] += 1
                for b in here:
                    pair[layer, a, b] += a != b
                for b in token[layer + 1] if layer < 2 else []:
                    if b >= 0:
                        move[layer, a, b] += 1
    np.testing.assert_array_equal(trace.load_WLE, load)
    np.testing.assert_array_equal(trace.transition_MEE, move)
    np.testing.assert_array_equal(trace.coactivation_LEE, pair)


def test_a_part_of_the_windows_is_counted_anew():
    part = counted(domain_T=np.array([0, 1, 1, 0]), domains=("code", "prose")).windows(1, 2)
    assert part.load_WLE.tolist() == [[[1, 1, 1], [0, 1, 1]]]
    assert part.transition_MEE.tolist() == [[[0, 0, 0], [0, 1, 1], [0, 0, 0]]]
    assert part.window_T.tolist() == [0, 0]
    assert part.domain_T.tolist() == [1, 0]


def test_transitions_without_tokens_are_not_claimed_for_a_part():
    whole = counted()
    pairs = {"transition_MEE": whole.transition_MEE, "coactivation_LEE": whole.coactivation_LEE}
    part = Trace(load_WLE=whole.load_WLE, layers=whole.layers, **pairs).windows(0, 1)
    assert part.transition_MEE is None
    assert part.coactivation_LEE is None
    assert part.load_WLE.tolist() == whole.load_WLE[:1].tolist()


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (1, 1), (0, 3), (-1, 1), (2, 1)])
def test_windows_that_are_not_there_are_refused(start, stop):
    with pytest.raises(UserError, match="are not among the trace's 2 windows"):
        counted().windows(start, stop)


LOAD = np.ones((2, 2, 3), np.int64)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"load_WLE": np.ones((0, 2, 3))}, "needs a window"),
        ({"load_WLE": -LOAD}, "at least 0"),
        ({"load_WLE": LOAD * np.nan}, "finite"),
        ({"layers": ("a",)}, "2 layers needs 2 layer names, not 1"),
        ({"top_k": 0}, "top_k must be above 0"),
        ({"expert_bytes": -1}, "expert_bytes must be above 0"),
        ({"transition_MEE": np.ones((2, 3, 3), int)}, r"transition_MEE must have shape \(1, 3, 3\)"),
        ({"coactivation_LEE": -np.ones((2, 3, 3), int)}, "coactivation_LEE must be at least 0"),
        ({"token_T": np.zeros(4, int)}, "with token_T also needs expert_TLK"),
        ({"expert_TLK": EXPERTS + 1}, "from -1 .none. to 2, not 0 to 3"),
        ({"expert_TLK": EXPERTS, "window_T": WINDOWS + 1}, "window_T must lie in its 2 windows, not 1 to 2"),
        ({"expert_TLK": EXPERTS, "domain_T": WINDOWS}, "domain_T must lie in its 0 domains"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes, words):
    with pytest.raises(UserError, match=words):
        Trace(**({"load_WLE": LOAD, "layers": ("a", "b")} | changes))


def test_an_expert_that_does_not_exist_is_refused():
    with pytest.raises(UserError, match="to 1, not -1 to 2"):
        from_routing(EXPERTS, WINDOWS, 2)
    with pytest.raises(UserError, match="window of at least 0"):
        from_routing(EXPERTS[:0], WINDOWS[:0], 3)
