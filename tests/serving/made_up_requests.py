"""Small requests, and a driver that answers a router by hand."""

from equipoise.serving import Request

BLOCK = 512


def request(id: int, blocks: tuple[int, ...], arrival: float = 0.0, output_tokens: int = 7) -> Request:
    """A request whose blocks are all full."""
    return Request(id, arrival, BLOCK * len(blocks), output_tokens, blocks)


def warm(router, name: str, blocks: tuple[int, ...], id: int = 10_000) -> None:
    """Let a replica compute and finish a prompt, as if it had been sent there."""
    router.fleet.send(router.fleet[name], request(id, blocks), 0.0)
    router.fleet.prefilled(name, id, 0.0)
    router.fleet.finished(name, id, 0.0)
