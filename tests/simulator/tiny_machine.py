"""A cluster whose times can be worked out by hand: nodes of two ranks, software that loses nothing."""

from equipoise.simulator import Cluster, Link, Shape, Software

IDEAL = Software(
    efficiency=1.0,
    half_rows=0.0,
    launch_seconds=0.0,
    row_passes=0.0,
    link_efficiency=1.0,
    weight_efficiency=1.0,
    hop_seconds=0.0,
    message_seconds=0.0,
    plan_seconds=0.0,
)
NEAR, FAR = 100.0, 10.0  # bytes per second of a port
SHAPE = Shape(dim=2, hidden_dim=3, num_experts=4, top_k=1, value_bytes=1, state_bytes=8)


def tiny(num_ranks=4, software=IDEAL, ranks_per_port=1, flops=36.0):
    """36 flops: a row of SHAPE, which costs 6 * 2 * 3, takes a second."""
    links = (
        Link(name="near", reach=2, bandwidth=NEAR),
        Link(name="far", bandwidth=FAR, ranks_per_port=ranks_per_port),
    )
    return Cluster(
        name="tiny",
        num_ranks=num_ranks,
        ranks_per_node=2,
        flops=flops,
        memory=1000.0,
        memory_bandwidth=1e9,
        links=links,
        software=software,
    )
