"""An answer that goes on when the replica that gives it is lost."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TypeVar

from ray.exceptions import ActorDiedError, ActorUnavailableError

from equipoise.serving.ray_errors import NoReplicasError, ReplicaLostError

LOST = (ReplicaLostError, ActorDiedError, ActorUnavailableError)

Item = TypeVar("Item")

logger = logging.getLogger("ray.serve")


async def unbroken(
    ask: Callable[[Sequence[Item]], AsyncIterator[Item]], attempts: int = 4, down_seconds: float = 60.0
) -> AsyncIterator[Item]:
    """The items of a streamed answer, each once, from as many replicas as it takes.

    Ray Serve sends a request again only while no replica has taken it; one whose replica dies later fails. Here it is
    asked for again, with the items that came already, so that the answer goes on where it broke off.

    Args:
        ask: starts the answer on some replica, such as a call of a deployment's handle, or goes on after these items;
            gives nothing where they are the whole answer.
        attempts: replicas that may be lost over one answer, less one: a request that kills them must not kill all.
        down_seconds: how long an answer that has begun waits for a replica when all are down.
    Fails: what the last replica was lost by, after so many attempts; NoReplicasError where all are down, at once if
        the answer has not begun.
    """
    items: list[Item] = []
    lost = 0
    down_until = float("inf")
    while True:
        try:
            async for item in ask(items):
                items.append(item)
                yield item
            return
        except LOST as error:
            lost += 1
            if lost == attempts:
                raise
            down_until = time.monotonic() + down_seconds
            logger.warning(
                f"A replica was lost after {len(items)} items of an answer ({error!r}); it goes on elsewhere."
            )
        except NoReplicasError:
            if not items or time.monotonic() >= down_until:
                raise
            await asyncio.sleep(1.0)
