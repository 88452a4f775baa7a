"""Loads to plan for: random ones of small prime sizes, and the awkward ones."""

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

KINDS = ("any", "one expert", "one source", "nothing", "skewed")


@st.composite
def loads(draw, max_ranks=7, max_experts=13):
    """(load_RE, owner_E, ranks per node): owners anywhere, ranks without experts, nodes that are not full."""
    num_ranks = draw(st.integers(1, max_ranks))
    num_experts = draw(st.integers(1, max_experts))
    kind = draw(st.sampled_from(KINDS))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    load_RE = random.integers(0, draw(st.sampled_from([2, 11, 997])), (num_ranks, num_experts))
    if kind == "one expert":
        load_RE[:, np.arange(num_experts) != random.integers(num_experts)] = 0
    elif kind == "one source":
        load_RE[np.arange(num_ranks) != random.integers(num_ranks)] = 0
    elif kind == "nothing":
        load_RE[:] = 0
    elif kind == "skewed":
        load_RE = load_RE * random.zipf(1.5, num_experts).clip(max=101)
    owner_E = draw(arrays(np.int64, num_experts, elements=st.integers(0, num_ranks - 1)))
    return load_RE, owner_E, draw(st.integers(1, num_ranks))


def skewed(num_ranks, num_experts, rows=4096, seed=0):
    """A larger load with a few hot experts: each rank routes as many rows."""
    random = np.random.default_rng(seed)
    share_E = random.dirichlet(np.full(num_experts, 0.3))
    return random.multinomial(rows, share_E, size=num_ranks)


def rows_by_hand(plan, load_RE):
    """[source, rank, expert]: every single row looked up in the segments; dropped rows nowhere."""
    num_ranks, num_experts = load_RE.shape
    rows = np.zeros((num_ranks, num_ranks, num_experts), dtype=np.int64)
    for expert in range(num_experts):
        source_N = np.repeat(np.arange(num_ranks), load_RE[:, expert])
        for position, source in enumerate(source_N.tolist()):
            for rank, start, end in plan.segments[expert]:
                if start <= position < end:
                    rows[source, rank, expert] += 1
    return rows
