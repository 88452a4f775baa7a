"""Packing: heaviest first onto the emptiest device, then swaps, then other replicas, then again from shaken starts."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float

from equipoise.placement.problem import Problem, replicate

Copies = Bool[np.ndarray, "E G"]
LEAST_GAIN = 1e-9
GOOD_ENOUGH = 1e-3  # relative distance from the bound at which looking on is not worth the time


def pack(problem: Problem, rounds: int = 10, seed: int = 0) -> Copies:
    """A good placement by local search; the same for the same seed.

    With groups, these are first packed onto the nodes, and every node is then a problem of its own.

    Args:
        problem: one layer.
        rounds: how many shaken starts to try.
        seed: seed of the shaking.
    """
    if problem.groups > 1:
        return _pack_nodes(problem, rounds, seed)
    draw = np.random.default_rng(seed)
    best = _improve(problem, _heaviest_first(problem))
    value = problem.value(best)
    for _ in range(rounds):
        if value <= problem.bound * (1 + GOOD_ENOUGH):
            break
        other = _improve(problem, _shake(best, draw))
        if problem.value(other) < value - LEAST_GAIN:
            best, value = other, problem.value(other)
    return best


def _pack_nodes(problem: Problem, rounds: int, seed: int) -> Copies:
    nodes, size = problem.nodes, problem.num_experts // problem.groups
    group_WE = problem.share_WE.reshape(len(problem.share_WE), problem.groups, size).sum(2) / problem.devices * nodes
    node_of = pack(Problem(group_WE, nodes, problem.groups // nodes), rounds, seed)
    copy_EG = np.zeros((problem.num_experts, problem.devices), bool)
    for node, devices in enumerate(np.split(np.arange(problem.devices), nodes)):
        experts = np.flatnonzero(np.repeat(node_of[:, node], size))
        inner = pack(Problem(problem.share_WE[:, experts], len(devices), problem.slots), rounds, seed)
        copy_EG[np.ix_(experts, devices)] = inner
    return copy_EG


def _heaviest_first(problem: Problem) -> Copies:
    """LPT (Graham 1969) with slots, on what each expert has to do in its worst window."""
    G, S = problem.devices, problem.slots
    weight_E = problem.share_WE.max(0)
    count_E = replicate(weight_E, problem.replicas, problem.most_copies)
    weight_WE = problem.share_WE / count_E
    copy_EG, load_WG = np.zeros((problem.num_experts, G), bool), np.zeros((len(weight_WE), G))
    for expert in np.argsort(-weight_E / count_E, kind="stable"):
        for _ in range(count_E[expert]):
            free_G = copy_EG.sum(0) < S
            open_G = free_G & ~copy_EG[expert]
            if not open_G.any():
                _make_room(copy_EG, load_WG, weight_WE, expert, np.flatnonzero(free_G)[0])
                continue
            after_G = (load_WG + weight_WE[:, expert, None]).max(0)
            device = np.argmin(np.where(open_G, after_G, np.inf))
            copy_EG[expert, device] = True
            load_WG[:, device] += weight_WE[:, expert]
    return copy_EG


def _make_room(
    copy_EG: Copies, load_WG: Float[np.ndarray, "W G"], weight_WE: Float[np.ndarray, "W E"], expert: int, free: int
) -> None:
    """Only devices that hold the expert have slots left: another device passes one of its experts there."""
    for device in np.argsort(load_WG.max(0), kind="stable"):
        passable = np.flatnonzero(copy_EG[:, device] & ~copy_EG[:, free])
        if not copy_EG[expert, device] and len(passable):
            passed = passable[np.argmin(weight_WE[:, passable].max(0))]
            copy_EG[[passed, expert], device] = [False, True]
            copy_EG[passed, free] = True
            load_WG[:, device] += weight_WE[:, expert] - weight_WE[:, passed]
            load_WG[:, free] += weight_WE[:, passed]
            return
    raise AssertionError("an expert has at most as many copies as there are devices, so one can always be passed on")


def _improve(problem: Problem, copy_EG: Copies) -> Copies:
    """Swaps with the fullest device while they help, then another distribution of replicas, in turn."""
    copy_EG = copy_EG.copy()
    while True:
        _swap(problem, copy_EG)
        if not problem.replicas or not _replicate_elsewhere(problem, copy_EG):
            return copy_EG


def _swap(problem: Problem, copy_EG: Copies) -> None:
    """Swap an expert of the fullest device with one of another while both end below what the fullest has."""
    weight_WE = problem.share_WE / copy_EG.sum(1)
    load_WG = weight_WE @ copy_EG
    while True:
        hot = int(load_WG.max(0).argmax())
        mine = np.flatnonzero(copy_EG[:, hot])
        theirs, device = np.nonzero(copy_EG & ~copy_EG[:, hot, None])
        if not len(theirs):
            return
        delta = weight_WE[:, mine, None] - weight_WE[:, None, theirs]
        fullest = np.maximum((load_WG[:, hot, None, None] - delta).max(0), (load_WG[:, device][:, None] + delta).max(0))
        fullest[copy_EG[mine][:, device]] = np.inf
        a, b = np.unravel_index(fullest.argmin(), fullest.shape)
        if fullest[a, b] >= load_WG[:, hot].max() - LEAST_GAIN:
            return
        copy_EG[[mine[a], theirs[b]], hot] = [False, True]
        copy_EG[[mine[a], theirs[b]], device[b]] = [True, False]
        load_WG[:, hot] -= delta[:, a, b]
        load_WG[:, device[b]] += delta[:, a, b]


def _replicate_elsewhere(problem: Problem, copy_EG: Copies) -> bool:
    """Give an expert of the fullest device one copy more, in place of a copy of another; True if that helped."""
    count_E = copy_EG.sum(1)
    load_WG = (problem.share_WE / count_E) @ copy_EG
    hot = int(load_WG.max(0).argmax())
    spare, device = np.nonzero(copy_EG & (count_E > 1)[:, None])
    best, place = load_WG[:, hot].max() - LEAST_GAIN, None
    for more in np.flatnonzero(copy_EG[:, hot] & (count_E < problem.most_copies)):
        fits = ~copy_EG[more, device] & (spare != more)
        if not fits.any():
            continue
        fullest = _after_exchange(problem.share_WE, copy_EG, load_WG, int(more), (spare[fits], device[fits]))
        if fullest.min() < best:
            best, place = fullest.min(), (more, spare[fits][fullest.argmin()], device[fits][fullest.argmin()])
    if place is None:
        return False
    copy_EG[place[0], place[2]], copy_EG[place[1], place[2]] = True, False
    return True


def _after_exchange(
    share_WE: Float[np.ndarray, "W E"],
    copy_EG: Copies,
    load_WG: Float[np.ndarray, "W G"],
    more: int,
    place: tuple[np.ndarray, np.ndarray],
) -> Float[np.ndarray, " candidates"]:
    """The fullest device's load once each candidate ``(spare, device)`` became a copy of ``more``."""
    spare, device = place
    count_E = copy_EG.sum(1)
    less_W = share_WE[:, more] / count_E[more] - share_WE[:, more] / (count_E[more] + 1)
    rise_WE = share_WE[:, spare] / (count_E[spare] - 1) - share_WE[:, spare] / count_E[spare]
    load = (load_WG - less_W[:, None] * copy_EG[more])[:, None, :] + rise_WE[:, :, None] * copy_EG[spare]
    index = np.arange(len(spare))
    gone = share_WE[:, spare] / (count_E[spare] - 1)
    load[:, index, device] += share_WE[:, more, None] / (count_E[more] + 1) - gone
    return load.max((0, 2))


def _shake(copy_EG: Copies, draw: np.random.Generator) -> Copies:
    """Swap random experts of random devices, a tenth of all slots but at least two pairs, and pass on a replica."""
    copy_EG = copy_EG.copy()
    spare, device = np.nonzero(copy_EG & (copy_EG.sum(1) > 1)[:, None])
    if len(spare):
        one = draw.integers(len(spare))
        others = np.flatnonzero(~copy_EG[:, device[one]])
        if len(others):
            copy_EG[[spare[one], draw.choice(others)], device[one]] = [False, True]
    for _ in range(max(2, int(copy_EG.sum()) // 20)):
        one, other = draw.choice(copy_EG.shape[1], 2, replace=copy_EG.shape[1] < 2)
        mine, theirs = (copy_EG[:, a] & ~copy_EG[:, b] for a, b in ((one, other), (other, one)))
        if mine.any() and theirs.any():
            a, b = draw.choice(np.flatnonzero(mine)), draw.choice(np.flatnonzero(theirs))
            copy_EG[[a, b], one], copy_EG[[a, b], other] = [False, True], [True, False]
    return copy_EG
