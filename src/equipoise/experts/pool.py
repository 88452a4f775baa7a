"""One pool of experts for several layers."""

from collections.abc import Iterable

from torch import nn

from equipoise.balancing.balanced import BalancedLayer
from equipoise.errors import require


def share_experts(layers: Iterable[BalancedLayer]) -> nn.Module:
    """Let layers compute with one pool of experts, that of the first; each keeps its own router.

    Call it before the optimizer is made. The pool is one module under several names: ``parameters()`` gives its weights
    once, files hold them once, and ``safetensors.torch.load_model`` fills all layers from them.

    Args:
        layers: of one model, whose experts are all of one size.
    Returns:
        The pool.
    Fails: UserError without layers, or for layers whose experts differ in number or size.
    Source: UniPool (2605.06665). Differs: no.
    """
    layers = list(layers)
    require(bool(layers), "share_experts got no layer; pass the MoE layers of the model.")
    sizes = [{name: tuple(weight.shape) for name, weight in layer.experts.named_parameters()} for layer in layers]
    alike = all(size == sizes[0] for size in sizes)
    require(alike, "The layers' experts differ in number or size, so they cannot share one pool.")
    for layer in layers[1:]:
        layer.experts = layers[0].experts
    return layers[0].experts
