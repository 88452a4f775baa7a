"""Scorers turn tokens into scores; selectors turn scores into a Routing."""

from equipoise.routing.expert_choice import ExpertChoice
from equipoise.routing.sigmoid import Sigmoid
from equipoise.routing.softmax import Softmax
from equipoise.routing.sqrt_softplus import SqrtSoftplus
from equipoise.routing.top_k import TopK

SCORERS = {"softmax": Softmax, "sigmoid": Sigmoid, "sqrt_softplus": SqrtSoftplus}
SELECTORS = {"top_k": TopK, "expert_choice": ExpertChoice}
