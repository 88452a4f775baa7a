"""The pool itself: answers of all ranks, the culprit's traceback, an end to waiting, and a fresh start after that."""

from multiprocessing import Pipe

import pytest

from ranks.pool import RankError, Ranks, receive

pytestmark = pytest.mark.xdist_group("ranks")


def test_ranks_answer_and_recover(ranks):
    assert ranks.run("ranks.jobs:add_up", value=5) == [11, 11]
    before = ranks.spawned
    with pytest.raises(RankError, match=r"(?s)rank 1 failed.*in fail_on.*ValueError: planted on rank 1"):
        ranks.run("ranks.jobs:fail_on", culprit=1)
    assert ranks.run("ranks.jobs:add_up", value=7) == [15, 15]
    assert ranks.spawned == before + 1


def test_waiting_ends():
    """No process answers that soon after it was started."""
    pool = Ranks(2)
    with pytest.raises(RankError, match=r"no answer in time from ranks \[0, 1\]"):
        pool.run("ranks.jobs:add_up", timeout=0.01, value=0)
    assert pool.spawned == 1


def test_a_dead_rank_is_noticed():
    ours, theirs = Pipe()
    theirs.close()
    with pytest.raises(RankError, match="rank 3 died"):
        receive(ours, "rank 3")
