"""Consistent hashing: two rings give every key a pair of replicas."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterable
from hashlib import blake2b

POINTS = 512  # per replica and ring: shares of the ring differ by about 1 / sqrt(512) = 4 %


class Ring:
    """Replicas on a circle; a key belongs to the replica that follows it.

    Adding or removing a replica moves only the keys of its own arcs.

    Args:
        salt: at most 16 bytes; rings of different salts are independent.
    """

    def __init__(self, salt: bytes) -> None:
        self._salt = salt
        self._points: list[tuple[int, str]] = []

    def add(self, replica: str) -> None:
        """Put a replica on the ring."""
        for point in range(POINTS):
            self._points.append((self._hash(f"{replica}/{point}".encode()), replica))
        self._points.sort()

    def remove(self, replica: str) -> None:
        """Take a replica off the ring."""
        self._points = [point for point in self._points if point[1] != replica]

    def owner(self, key: bytes) -> str:
        """The replica that follows the key."""
        place = bisect_right(self._points, (self._hash(key), ""))
        return self._points[place % len(self._points)][1]

    def _hash(self, data: bytes) -> int:
        return int.from_bytes(blake2b(data, digest_size=8, salt=self._salt).digest())


class Pairs:
    """Every key's two replicas: the same for every router that knows the same replicas.

    Two different ones where there are two; where both rings say the same, the second is the next by name. Adding a
    replica to n changes about 2 / (n + 1) of the pairs.
    Source: DualMap (arXiv 2602.06502), and its release's scheduler. Differs: the release takes the next by number, and
    our names are ordered so that a new name between two changes only pairs that stood there; 512 points per replica are
    INFERRED.
    """

    def __init__(self, replicas: Iterable[str]) -> None:
        self._names: list[str] = []
        self._rings = Ring(b"first"), Ring(b"second")
        for replica in replicas:
            self.add(replica)

    def add(self, replica: str) -> None:
        """Put a replica on both rings."""
        insort(self._names, replica)
        for ring in self._rings:
            ring.add(replica)

    def remove(self, replica: str) -> None:
        """Take a replica off both rings."""
        self._names.remove(replica)
        for ring in self._rings:
            ring.remove(replica)

    def of(self, key: int) -> tuple[str, str]:
        """The pair of a key; twice the same where there is one replica only."""
        data = str(key).encode()
        first, second = (ring.owner(data) for ring in self._rings)
        return (first, self.after(first)) if first == second else (first, second)

    def after(self, replica: str) -> str:
        """The next replica by name; the first follows the last."""
        place = self._names.index(replica)
        return self._names[(place + 1) % len(self._names)]
