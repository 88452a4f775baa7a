"""Gloo ranks that stay: processes spawned once, which run named functions until the session ends."""

import importlib
import multiprocessing
import pickle
import tempfile
import traceback
import warnings
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from time import monotonic
from typing import Any

import torch
import torch.distributed as dist


class RankError(Exception):
    """A job failed; the message holds the traceback of the rank it failed on."""


class Ranks:
    """A pool of ranks in one gloo group, spawned at the first job, and anew after a job that failed or hung.

    A job is named ``"module:function"`` and called as ``function(rank, **arguments)`` on every rank. Arguments and
    results travel pickled. No import hook runs in the ranks: they have the package as users have it.

    Args:
        size: how many.
    """

    def __init__(self, size: int = 2):
        self.size = size
        self.spawned = 0
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []

    def run(self, job: str, timeout: float = 60.0, **arguments: Any) -> list[Any]:
        """The job's result on every rank.

        Fails: RankError for a rank that failed, died, or gave no answer in ``timeout`` seconds.
        """
        if not self._processes:
            self._spawn()
        message = pickle.dumps((job, arguments))
        for pipe in self._pipes:
            pipe.send_bytes(message)
        try:
            return self._collect(job, monotonic() + timeout)
        except RankError:
            self.close()
            raise

    def close(self) -> None:
        """End the processes at once: what they wait for may never come."""
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []

    def _spawn(self) -> None:
        context = multiprocessing.get_context("spawn")
        with tempfile.NamedTemporaryFile(prefix="ranks-", delete=False) as store:
            meeting = f"file://{store.name}"
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, self.size, meeting), daemon=True)
            process.start()
            theirs.close()  # so that a dead rank is an end of file here
            self._processes.append(process)
            self._pipes.append(ours)
        self.spawned += 1

    def _collect(self, job: str, deadline: float) -> list[Any]:
        """Take answers in any order: the rank that failed speaks before those that wait for it."""
        results: dict[int, Any] = {}
        while len(results) < self.size:
            waiting = [pipe for rank, pipe in enumerate(self._pipes) if rank not in results]
            ready = wait(waiting, max(0.0, deadline - monotonic()))
            if not ready:
                raise RankError(f"{job}: no answer in time from ranks {[self._pipes.index(pipe) for pipe in waiting]}.")
            for pipe in waiting:
                if pipe in ready:
                    rank = self._pipes.index(pipe)
                    results[rank] = receive(pipe, f"{job}: rank {rank}")
        return [results[rank] for rank in range(self.size)]


def receive(pipe: Connection, who: str) -> Any:
    try:
        done, result = pickle.loads(pipe.recv_bytes())
    except EOFError:
        raise RankError(f"{who} died.") from None
    if not done:
        raise RankError(f"{who} failed:\n{result}")
    return result


def _serve(pipe: Connection, rank: int, size: int, meeting: str) -> None:
    """A rank's life: join the group, then run jobs as they come. As in the tests, warnings are errors."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size)
    while True:
        job, arguments = pickle.loads(pipe.recv_bytes())
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                answer = True, named(job)(rank, **arguments)
        except Exception:
            answer = False, traceback.format_exc()
        pipe.send_bytes(pickle.dumps(answer))


def named(name: str) -> Any:
    """What ``"module:attribute"`` names."""
    module, attribute = name.split(":")
    return getattr(importlib.import_module(module), attribute)
