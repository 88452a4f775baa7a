"""UniPool's scores: the positive part of logits that are scaled to length 1."""

import functools

import numpy as np
import torch
from torch import nn

from equipoise.contracts import Call, Scores
from equipoise.routing.scorer import Scorer

SAMPLES, CHUNK, SEED = 100_000, 1_000, 42


class Norm(Scorer):
    """``gate = sigma * c * relu(logit / |logit|)`` with a learnable ``sigma`` per layer; ``choice`` ranks the logits.

    The constant c makes the K gates of a token with Gaussian logits a vector whose mean length is ``sigma``. About half
    of the scores are zero; losses read them normalised over E, where sigma and c cancel.

    Args:
        num_experts: E.

    Source: UniPool (2605.06665), NormRouter. Differs: choice is the logit itself and not its positive part, so that a
    token with fewer than K positive logits does not fill its places by the order of the experts (they weigh 0).
    """

    def __init__(self, num_experts: int):
        super().__init__(num_experts)
        self.sigma = nn.Parameter(torch.ones(1))  # not 0-d: FSDP shards no scalars

    def forward(self, call: Call) -> Scores:
        """Score every token against every expert; an expert masked by a logit of -inf is outside the norm."""
        logit_TE = call.router(call.x_TD)
        masked_TE = logit_TE.isneginf()
        kept_TE = logit_TE.masked_fill(masked_TE, 0)
        unit_TE = kept_TE / (torch.linalg.vector_norm(kept_TE, dim=-1, keepdim=True) + 1e-8)
        positive_TE = unit_TE.relu()
        gate_TE = self.sigma.to(unit_TE.dtype) * length_constant(self.num_experts, call.k) * positive_TE
        prob_TE = positive_TE / (positive_TE.sum(-1, keepdim=True) + 1e-20)
        return Scores(logit_TE, prob_TE, gate_TE, unit_TE.masked_fill(masked_TE, -torch.inf))


@torch.compiler.assume_constant_result
def length_constant(num_experts: int, k: int) -> float:
    """c, the mean of ``1 / |top K of relu(x / |x|)|`` over Gaussian x of length E; computed once per process.

    Source: UniPool (2605.06665): 1e5 samples, seed 42. Differs: samples without a positive entry, where c would be
    infinite, are left out; with few experts they are not rare. NumPy's generator draws them, not torch's, so that
    whoever traces or fakes torch's tensors sees a number.
    """
    return _sampled(num_experts, k)


@functools.cache
def _sampled(num_experts: int, k: int) -> float:
    generator = np.random.default_rng(SEED)
    inverses = []
    for _ in range(SAMPLES // CHUNK):
        x = generator.standard_normal((CHUNK, num_experts), dtype=np.float32)
        top = np.partition(x.clip(0), num_experts - k, axis=1)[:, num_experts - k :]
        length = np.linalg.norm(top, axis=1) / np.linalg.norm(x, axis=1)
        inverses.append(1 / length[length > 0].astype(np.float64))
    return float(np.concatenate(inverses).mean())
