"""Who computes which rows on many devices: plans and their planners, meshes, balanced sequences. No torch is needed."""

from equipoise.parallel.eplb import ReplicaMaps, rebalance_experts
from equipoise.parallel.least_loaded import LeastLoaded, break_even_rows
from equipoise.parallel.mesh import Folding, dispatch_bytes, foldings
from equipoise.parallel.native import Native
from equipoise.parallel.plan import Plan, Planner, Segment, Transfer, contiguous_owners
from equipoise.parallel.replicas import Replicas
from equipoise.parallel.resharding import heterogeneous_owners
from equipoise.parallel.schedule import MicroBatch, Piece, Schedule
from equipoise.parallel.sequence_balance import BalancedBatches, SequenceBalance, SequenceCost
from equipoise.parallel.shadow import Shadow
from equipoise.parallel.sharded_sparse import Calibration, ShardedSparse, overlap_degree

__all__ = [
    "BalancedBatches",
    "Calibration",
    "Folding",
    "LeastLoaded",
    "MicroBatch",
    "Native",
    "Piece",
    "Plan",
    "Planner",
    "ReplicaMaps",
    "Replicas",
    "Schedule",
    "Segment",
    "SequenceBalance",
    "SequenceCost",
    "Shadow",
    "ShardedSparse",
    "Transfer",
    "break_even_rows",
    "contiguous_owners",
    "dispatch_bytes",
    "foldings",
    "heterogeneous_owners",
    "overlap_degree",
    "rebalance_experts",
]
