"""Scorers turn tokens into scores; selectors turn scores into a Routing."""

from equipoise.routing.active import Active
from equipoise.routing.base import Base
from equipoise.routing.centroid import Centroid
from equipoise.routing.cosine import Cosine
from equipoise.routing.expert_choice import ExpertChoice
from equipoise.routing.noisy import Noisy
from equipoise.routing.norm import Norm
from equipoise.routing.null_experts import NullExperts
from equipoise.routing.relu import Relu
from equipoise.routing.selective_sinkhorn import SelectiveSinkhorn
from equipoise.routing.sigmoid import Sigmoid
from equipoise.routing.sinkhorn import Sinkhorn
from equipoise.routing.softmax import Softmax
from equipoise.routing.sparse_transport import SparseTransport
from equipoise.routing.sqrt_softplus import SqrtSoftplus
from equipoise.routing.token_rounding import TokenRounding
from equipoise.routing.top_k import TopK

SCORERS = {
    "softmax": Softmax,
    "sigmoid": Sigmoid,
    "sqrt_softplus": SqrtSoftplus,
    "norm": Norm,
    "relu": Relu,
    "cosine": Cosine,
    "centroid": Centroid,
    "noisy": Noisy,
}
SELECTORS = {
    "top_k": TopK,
    "expert_choice": ExpertChoice,
    "active": Active,
    "null_experts": NullExperts,
    "token_rounding": TokenRounding,
    "selective_sinkhorn": SelectiveSinkhorn,
    "sinkhorn": Sinkhorn,
    "sparse_transport": SparseTransport,
    "base": Base,
}
