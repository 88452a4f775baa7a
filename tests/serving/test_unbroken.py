import asyncio

import pytest

pytest.importorskip("ray.serve", reason="needs Ray: pip install 'equipoise[serve]'")

from ray.serve._private.common import DeploymentID

from equipoise.serving.ray_errors import NoReplicasError, ReplicaLostError
from equipoise.serving.unbroken import unbroken

DOWN = NoReplicasError(DeploymentID("model", "app"))
ANSWER = [2, 3, 5, 7, 11]


class Replicas:
    """Each gives the answer from where it is asked to, up to a number of items, then fails as told."""

    def __init__(self, *lives: tuple[int, Exception | None]) -> None:
        self.lives = list(lives)
        self.asked: list[list[int]] = []

    async def ask(self, sofar):
        self.asked.append(list(sofar))
        count, error = self.lives.pop(0)
        for item in ANSWER[len(sofar) :][:count]:
            yield item
        if error is not None:
            raise error


def collected(replicas: Replicas, **options: float) -> list[int]:
    async def collect():
        return [item async for item in unbroken(replicas.ask, **options)]

    return asyncio.run(collect())


def test_an_answer_goes_on_where_it_broke_off_each_item_once():
    replicas = Replicas((2, ReplicaLostError()), (0, ReplicaLostError()), (1, ReplicaLostError()), (9, None))
    assert collected(replicas) == ANSWER
    assert replicas.asked == [[], [2, 3], [2, 3], [2, 3, 5]]


def test_a_request_that_loses_replica_after_replica_is_given_up():
    lost = [ReplicaLostError(str(place)) for place in range(3)]
    replicas = Replicas(*((1, error) for error in lost), (9, None))
    with pytest.raises(ReplicaLostError, match="2"):
        collected(replicas, attempts=3)
    assert len(replicas.asked) == 3


def test_other_errors_are_not_tried_again():
    replicas = Replicas((1, ValueError("mine")), (9, None))
    with pytest.raises(ValueError, match="mine"):
        collected(replicas)
    assert len(replicas.asked) == 1


def test_one_that_has_not_begun_is_refused_at_once_when_all_are_down():
    replicas = Replicas((0, DOWN), (9, None))
    with pytest.raises(NoReplicasError, match=r"No replica of .* is running; try again soon"):
        collected(replicas)
    assert len(replicas.asked) == 1


def test_one_that_has_begun_waits_for_the_next_replica():
    replicas = Replicas((2, ReplicaLostError()), (0, DOWN), (9, None))
    assert collected(replicas) == ANSWER


def test_but_not_for_ever():
    replicas = Replicas((2, ReplicaLostError()), (0, DOWN), (9, None))
    with pytest.raises(NoReplicasError):
        collected(replicas, down_seconds=0.0)
    assert len(replicas.asked) == 2
