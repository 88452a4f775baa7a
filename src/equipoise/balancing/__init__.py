"""Balancers keep the load even; the tap carries their losses and counts; attach commits them once per step."""

from equipoise.balancing.balance_loss import BalanceLoss
from equipoise.balancing.bias import Bias
from equipoise.balancing.quantile import Quantile
from equipoise.balancing.z_loss import ZLoss

BALANCERS = {"balance_loss": BalanceLoss, "bias": Bias, "quantile": Quantile, "z_loss": ZLoss}
