"""Balancers keep the load even; the tap carries their losses and counts; attach commits them once per step."""

from equipoise.balancing.balance_loss import BalanceLoss
from equipoise.balancing.bias import Bias
from equipoise.balancing.bip import BIP
from equipoise.balancing.erc import Erc
from equipoise.balancing.importance_load import ImportanceLoad
from equipoise.balancing.null_loss import NullLoss
from equipoise.balancing.pool_loss import PoolLoss
from equipoise.balancing.quantile import Quantile
from equipoise.balancing.relu_loss import ReluLoss
from equipoise.balancing.top1_loss import Top1Loss
from equipoise.balancing.z_loss import ZLoss

BALANCERS = {
    "balance_loss": BalanceLoss,
    "bias": Bias,
    "quantile": Quantile,
    "z_loss": ZLoss,
    "pool_loss": PoolLoss,
    "relu_loss": ReluLoss,
    "erc": Erc,
    "top1_loss": Top1Loss,
    "null_loss": NullLoss,
    "importance_load": ImportanceLoad,
    "bip": BIP,
}
