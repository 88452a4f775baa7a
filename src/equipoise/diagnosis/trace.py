"""The trace: where tokens went. Recording writes it; diagnosis, placement and simulation read it.

Beside the letters of ``contracts.py``: ``W`` windows (steps, or intervals of serving), ``L`` layers, ``M`` = L - 1
pairs of neighbouring layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Num
from scipy import sparse

from equipoise.errors import require

TOKEN_FIELDS = ("expert_TLK", "weight_TLK", "window_T", "domain_T", "token_T")


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Where tokens went, per window and layer; optionally token by token.

    Attributes:
        load_WLE: rows that each expert got.
        layers: the layers' names.
        top_k: experts per token; None where it is unknown or differs.
        transition_MEE: [l, a, b] tokens that visited expert a in layer l and expert b in layer l + 1.
        coactivation_LEE: [l, a, b] tokens that visited both a and b in layer l; the diagonal is 0.
        expert_TLK: the experts of single tokens; -1 for none.
        weight_TLK: their combine weights.
        window_T: the window of each of these tokens.
        domain_T: the domain of each, an index into ``domains``.
        token_T: its id in the vocabulary.
        domains: names of the domains.
        expert_bytes: size of one expert's weights; None where unknown.
        about: anything else worth keeping that JSON can hold.
    """

    load_WLE: Num[np.ndarray, "W L E"]
    layers: tuple[str, ...]
    top_k: int | None = None
    transition_MEE: Int[np.ndarray, "M E E"] | None = None
    coactivation_LEE: Int[np.ndarray, "L E E"] | None = None
    expert_TLK: Int[np.ndarray, "T L K"] | None = None
    weight_TLK: Float[np.ndarray, "T L K"] | None = None
    window_T: Int[np.ndarray, " T"] | None = None
    domain_T: Int[np.ndarray, " T"] | None = None
    token_T: Int[np.ndarray, " T"] | None = None
    domains: tuple[str, ...] = ()
    expert_bytes: int | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Fails: UserError where the parts do not fit each other."""
        _check_loads(self)
        _check_pairs(self)
        _check_tokens(self)

    @property
    def num_experts(self) -> int:
        """E."""
        return self.load_WLE.shape[2]

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays that are there, by name."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, np.ndarray)}

    def windows(self, start: int, stop: int) -> Trace:
        """The windows from ``start`` to ``stop`` (excluded).

        Transitions and co-activation are recounted from the single tokens; without these they are left out, for they
        cannot be told apart by window.

        Fails: UserError if no window is left.
        """
        count = len(self.load_WLE)
        require(0 <= start < stop <= count, f"Windows {start} to {stop} are not among the trace's {count} windows.")
        changes: dict[str, Any] = {
            "load_WLE": self.load_WLE[start:stop],
            "transition_MEE": None,
            "coactivation_LEE": None,
        }
        if self.expert_TLK is None or self.window_T is None:
            return replace(self, **changes, **dict.fromkeys(TOKEN_FIELDS))
        chosen_T = (self.window_T >= start) & (self.window_T < stop)
        arrays = self.arrays()
        changes |= {name: arrays[name][chosen_T] for name in TOKEN_FIELDS if name in arrays}
        changes["window_T"] = changes["window_T"] - start
        return replace(self, **(changes | _count_pairs(changes["expert_TLK"], self.num_experts)))


def from_routing(
    expert_TLK: Int[np.ndarray, "T L K"], window_T: Int[np.ndarray, " T"], num_experts: int, **others: Any
) -> Trace:
    """A trace counted from the experts of single tokens.

    Args:
        expert_TLK: -1 for none (a null expert, a dropped row).
        window_T: from 0; the last one decides how many windows there are.
        num_experts: E.
        **others: further fields of ``Trace``.
    Fails: UserError for an expert that does not exist.
    """
    _check_experts(expert_TLK, num_experts)
    placed = len(window_T) > 0 and int(window_T.min()) >= 0
    require(placed, "Single tokens must be given, each with a window of at least 0.")
    _, L, K = expert_TLK.shape
    W = int(window_T.max()) + 1
    place_TLK = (window_T[:, None, None] * L + np.arange(L)[:, None]) * num_experts + expert_TLK
    load = np.bincount(place_TLK[expert_TLK >= 0], minlength=W * L * num_experts)
    others = {"layers": tuple(str(layer) for layer in range(L)), "top_k": K} | others
    return Trace(
        load_WLE=load.reshape(W, L, num_experts),
        expert_TLK=expert_TLK,
        window_T=window_T,
        **_count_pairs(expert_TLK, num_experts),
        **others,
    )


def _count_pairs(expert_TLK: Int[np.ndarray, "T L K"], num_experts: int) -> dict[str, np.ndarray]:
    """Transitions between layers and co-activation within them, as sparse products of who visited what."""
    T, L, K = expert_TLK.shape
    token_TK = np.repeat(np.arange(T), K).reshape(T, K)
    visited = []
    for layer in range(L):
        real_TK = expert_TLK[:, layer] >= 0
        place = (token_TK[real_TK], expert_TLK[:, layer][real_TK])
        visited.append(sparse.csr_array((np.ones(len(place[0]), np.int64), place), shape=(T, num_experts)))
    shape = (num_experts, num_experts)
    transition = [(here.T @ after).toarray() for here, after in pairwise(visited)]
    together = [(here.T @ here).toarray() for here in visited]
    for matrix in together:
        np.fill_diagonal(matrix, 0)
    return {
        "transition_MEE": np.array(transition, np.int64).reshape(-1, *shape),
        "coactivation_LEE": np.array(together, np.int64).reshape(-1, *shape),
    }


def _check_loads(trace: Trace) -> None:
    W, L, E = trace.load_WLE.shape
    require(min(W, L, E) > 0, f"A trace needs a window, a layer and an expert; this one has {W}, {L} and {E} of them.")
    finite = np.isfinite(trace.load_WLE).all() and (trace.load_WLE >= 0).all()
    require(bool(finite), "A trace's loads must be finite and at least 0; record it anew.")
    require(len(trace.layers) == L, f"A trace of {L} layers needs {L} layer names, not {len(trace.layers)}.")
    require(trace.top_k is None or trace.top_k > 0, f"A trace's top_k must be above 0, not {trace.top_k}.")
    size = trace.expert_bytes
    require(size is None or size > 0, f"A trace's expert_bytes must be above 0, not {size}.")


def _check_pairs(trace: Trace) -> None:
    _, L, E = trace.load_WLE.shape
    for name, count in (("transition_MEE", L - 1), ("coactivation_LEE", L)):
        counts = getattr(trace, name)
        if counts is not None:
            shape = (count, E, E)
            require(counts.shape == shape, f"A trace's {name} must have shape {shape}, not {counts.shape}.")
            require(counts.size == 0 or int(counts.min()) >= 0, f"A trace's {name} must be at least 0; record it anew.")


def _check_tokens(trace: Trace) -> None:
    W, L, E = trace.load_WLE.shape
    given = {name: getattr(trace, name) for name in TOKEN_FIELDS if getattr(trace, name) is not None}
    if not given:
        return
    require("expert_TLK" in given, f"A trace with {next(iter(given))} also needs expert_TLK, the tokens' experts.")
    shape = given["expert_TLK"].shape
    require(shape[1] == L, f"A trace of {L} layers has experts of single tokens in {shape[1]} layers.")
    for name, values in given.items():
        expected = shape[: values.ndim]
        require(values.shape == expected, f"A trace's {name} must have shape {expected}, not {values.shape}.")
    _check_experts(given["expert_TLK"], E)
    for name, bound, kind in (("window_T", W, "windows"), ("domain_T", len(trace.domains), "domains")):
        if name in given and given[name].size:
            low, high = int(given[name].min()), int(given[name].max())
            require(low >= 0 and high < bound, f"A trace's {name} must lie in its {bound} {kind}, not {low} to {high}.")


def _check_experts(expert_TLK: Int[np.ndarray, "T L K"], num_experts: int) -> None:
    if expert_TLK.size:
        low, high = int(expert_TLK.min()), int(expert_TLK.max())
        fits = low >= -1 and high < num_experts
        require(fits, f"Single tokens must have experts from -1 (none) to {num_experts - 1}, not {low} to {high}.")
