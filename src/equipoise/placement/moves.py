"""What a placement moves: devices are renamed, and slots ordered, so that most experts stay where they are."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Int
from scipy.optimize import linear_sum_assignment


def stay(copy_EG: Bool[np.ndarray, "E G"], present_EG: Bool[np.ndarray, "E G"], nodes: int) -> Bool[np.ndarray, "E G"]:
    """The same placement with nodes, and devices within them, renamed so that most copies stay on their device."""
    kept_GG = copy_EG.T.astype(np.int64) @ present_EG  # [g, h] copies that stay if device g takes the name h
    own = np.split(np.arange(len(kept_GG)), nodes)
    kept_NN = np.zeros((nodes, nodes), np.int64)
    names = np.zeros((nodes, nodes, len(own[0])), np.int64)
    for n, m in np.ndindex(nodes, nodes):
        inner = kept_GG[np.ix_(own[n], own[m])]
        row, column = linear_sum_assignment(inner, maximize=True)
        kept_NN[n, m], names[n, m] = inner[row, column].sum(), own[m][column]
    renamed_EG = np.empty_like(copy_EG)
    for n, m in zip(*linear_sum_assignment(kept_NN, maximize=True)):
        renamed_EG[:, names[n, m]] = copy_EG[:, own[n]]
    return renamed_EG


def moved(copy_LEG: Bool[np.ndarray, "L E G"], present_LEG: Bool[np.ndarray, "L E G"]) -> int:
    """Copies that a device gets and does not hold at present."""
    return int((copy_LEG & ~present_LEG).sum())


def slots(copy_EG: Bool[np.ndarray, "E G"], present_P: Int[np.ndarray, " P"]) -> Int[np.ndarray, " slots"]:
    """The expert of each slot. What stays on a device stays in its slot; the others fill the rest, ascending."""
    size = int(copy_EG[:, 0].sum())
    order_GS = np.full((copy_EG.shape[1], size), -1)
    for device, (order_S, copy_E) in enumerate(zip(order_GS, copy_EG.T)):
        if len(present_P) == order_GS.size:
            present_S = present_P[device * size : (device + 1) * size]
            first_S = np.isin(np.arange(size), np.unique(present_S, return_index=True)[1])
            order_S[:] = np.where(copy_E[present_S] & first_S, present_S, -1)
        order_S[order_S < 0] = np.setdiff1d(np.flatnonzero(copy_E), order_S)
    return order_GS.ravel()
