"""A decoder-only transformer, just large enough to host the layer.

Per layer: RMSNorm, causal attention with rotary positions, RMSNorm, experts (or one dense feed-forward); the embedding
is also the output head. Letters beyond the contracts': ``H`` heads, ``C`` channels per head, ``V`` vocabulary, ``L``
layers, ``P`` positions that are attended to.
"""

import tomllib
import zlib
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from equipoise.config import ModelConfig
from equipoise.errors import UserError
from equipoise.experts.pool import share_experts
from equipoise.experts.swiglu import DenseSwiGLU, SwiGLU
from equipoise.methods import find
from equipoise.models.cache import Cache
from equipoise.moe import MoE
from equipoise.routing.router import Router
from equipoise.sparsity import parse

DRAWN = ("weight", "gate_up", "down")  # the matrices that every method has


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, dim: int, num_heads: int, layer: int):
        super().__init__()
        self.num_heads, self.channels, self.layer = num_heads, dim // num_heads, layer
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(
        self,
        x_BSD: Float[Tensor, "B S D"],
        angle_2SC: Float[Tensor, "2 S half_C"],
        visible_SP: Bool[Tensor, "S P"] | None,
        cache: Cache | None,
    ) -> Float[Tensor, "B S D"]:
        """Attend to the visible positions; None: to all up to the token's own."""
        qkv = self.qkv(x_BSD).unflatten(-1, (3, self.num_heads, self.channels))
        query_BHSC, key, value = qkv.permute(2, 0, 3, 1, 4)
        query_BHSC, key = _rotate(query_BHSC, angle_2SC), _rotate(key, angle_2SC)
        if cache is not None:
            key, value = cache.append(self.layer, key, value)
        y_BHSC = F.scaled_dot_product_attention(query_BHSC, key, value, visible_SP, is_causal=visible_SP is None)
        return self.out(y_BHSC.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Attention, then the experts (``moe``) or one feed-forward that costs as much (``dense``); the other is None."""

    dense: Any  # nn.Module forgets the types of its children
    moe: Any

    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        dense = index < config.dense_layers
        self.attention_norm = nn.RMSNorm(config.dim)
        self.attention = Attention(config.dim, config.num_heads, index)
        self.feed_forward_norm = nn.RMSNorm(config.dim)
        self.dense = DenseSwiGLU(config.dim, config.top_k * config.hidden_dim) if dense else None
        self.moe = None if dense else _moe(config, index - config.dense_layers)

    def forward(
        self,
        x_BSD: Float[Tensor, "B S D"],
        angle_2SC: Float[Tensor, "2 S half_C"],
        visible_SP: Bool[Tensor, "S P"] | None,
        cache: Cache | None,
        mask_BS: Bool[Tensor, "B S"] | None,
    ) -> Float[Tensor, "B S D"]:
        """Add what attention and the feed-forward say."""
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), angle_2SC, visible_SP, cache)
        h_BSD = self.feed_forward_norm(x_BSD)
        return x_BSD + (self.moe(h_BSD, mask_BS) if self.moe is not None else self.dense(h_BSD))


class Decoder(nn.Module):
    """Token ids to next-token logits.

    The initial weights follow from torch's seed and each parameter's name alone, so two methods built after the same
    ``torch.manual_seed`` start from the same model; a pool of experts that all layers share has draws of its own.

    Args:
        config: the model's sizes and its method.
        vocab_size: V.
        max_seq_len: how far attention looks back, the token itself included; None for all the way. A text up to this
            length sees plain causal attention; a longer one is read through a window that slides along, so generation
            need not stop at the length the model was trained on.

    Fails: UserError for sizes or settings that cannot be built.
    """

    layers: Any  # of Layer; nn.ModuleList forgets the type

    def __init__(self, config: ModelConfig, vocab_size: int, max_seq_len: int | None = None):
        super().__init__()
        config.check()
        if max_seq_len is not None and max_seq_len < 1:
            raise UserError(f"max_seq_len must be above 0, or None for all the way back, not {max_seq_len}.")
        seed = int(torch.randint(2**31, (), device="cpu"))
        self.max_seq_len = max_seq_len
        self.embedding = nn.Embedding(vocab_size, config.dim)
        self.layers = nn.ModuleList()
        for index in range(config.num_layers):
            self.layers.append(Layer(config, index))
            if find(config.method).pool and index >= config.dense_layers:  # at once: a spare pool is a spare model
                share_experts(layer.moe for layer in self.layers[config.dense_layers :])
        self.norm = nn.RMSNorm(config.dim)
        _initialise(self, seed, residual_scale=(2 * config.num_layers) ** -0.5)

    def forward(
        self,
        token_BS: Int[Tensor, "B S"],
        cache: Cache | None = None,
        mask_BS: Bool[Tensor, "B S"] | None = None,
    ) -> Float[Tensor, "B S V"]:
        """Predict every position's next token.

        Args:
            token_BS: the tokens; with a cache, those that follow the ones it holds.
            cache: what was read before; these tokens are added to it.
            mask_BS: True for a real token. Padding stands on the right, where causal attention never sees it; the mask
                keeps it out of the experts and of every count.
        """
        start = cache.length if cache is not None else 0
        position_P = torch.arange(start + token_BS.shape[1], device=token_BS.device)
        x_BSD = self.embedding(token_BS)
        angle_2SC = _angles(position_P[start:], self.layers[0].attention.channels, x_BSD.dtype)
        visible_SP = _visible(position_P, start, self.max_seq_len)
        for layer in self.layers:
            x_BSD = layer(x_BSD, angle_2SC, visible_SP, cache, mask_BS)
        if cache is not None:
            cache.length += token_BS.shape[1]
        return F.linear(self.norm(x_BSD), self.embedding.weight)

    def cache(self, batch: int, capacity: int) -> Cache:
        """An empty cache for up to ``capacity`` positions of ``batch`` sequences, all memory taken at once."""
        attention = self.layers[0].attention
        shape = (2, len(self.layers), batch, attention.num_heads, capacity, attention.channels)
        return Cache(self.embedding.weight.detach().new_empty(shape))


def loss(logit_BSV: Float[Tensor, "B S V"], target_BS: Int[Tensor, "B S"]) -> Float[Tensor, ""]:
    """Mean cross-entropy in nats per token, in at least fp32; targets of -100 are left out."""
    logit_BSV = logit_BSV.to(torch.promote_types(logit_BSV.dtype, torch.float32))
    return F.cross_entropy(logit_BSV.flatten(0, 1), target_BS.flatten())


def _angles(position_S: Int[Tensor, " S"], channels: int, dtype: torch.dtype) -> Float[Tensor, "2 S half_C"]:
    """Cosine and sine of every position's turn of each pair of channels, in at least fp32."""
    dtype = torch.promote_types(dtype, torch.float32)
    pair = torch.arange(0, channels, 2, device=position_S.device, dtype=dtype)
    turn = position_S.to(dtype)[:, None] * 10000 ** (-pair / channels)
    return torch.stack([turn.cos(), turn.sin()])


def _rotate(x_BHSC: Float[Tensor, "B H S C"], angle_2SC: Float[Tensor, "2 S half_C"]) -> Float[Tensor, "B H S C"]:
    """Turn the pairs (c, c + C/2) of channels by each position's angles."""
    (cos, sin), (a, b) = angle_2SC, x_BHSC.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x_BHSC.dtype)


def _visible(position_P: Int[Tensor, " P"], start: int, window: int | None) -> Bool[Tensor, "S P"] | None:
    """Which positions the tokens from ``start`` on may see; None where that is plain causal attention."""
    window = len(position_P) if window is None else window
    if start == 0 and len(position_P) <= window:
        return None
    distance_SP = position_P[start:, None] - position_P
    return (distance_SP >= 0) & (distance_SP < window)


def _moe(config: ModelConfig, index: int) -> MoE:
    """The MoE layer of this number that a configuration asks for; a pool has as many experts as all layers would."""
    num_layers = config.num_layers - config.dense_layers
    sparsity = parse(config.sparsity, config.top_k, num_layers, config.num_experts)
    return MoE(
        dim=config.dim,
        hidden_dim=config.hidden_dim,
        num_experts=config.num_experts * (num_layers if find(config.method).pool else 1),
        top_k=sparsity[index].by_step(),
        method=config.method,
        shared_experts=config.shared_experts,
        z_loss=config.z_loss,
        kernel=config.kernel,
        **settings_of(config.set),
    )


def settings_of(items: tuple[str, ...]) -> dict[str, Any]:
    """Settings from ``part.setting=value``; values are written as in TOML, but a word needs no quotes."""
    settings: dict[str, Any] = {}
    for name, text in (item.split("=", 1) for item in items):
        try:
            settings[name] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            if not text.isidentifier():
                raise UserError(f"{name}={text} has no valid value; give a number, true, false or a word.") from None
            settings[name] = text
    return settings


def _initialise(model: nn.Module, seed: int, residual_scale: float) -> None:
    """Draw each weight with a variance of 1 / its inputs, those that write to the residual stream scaled down.

    Every weight has a random stream of its own, so what a method adds shifts no other draw. Parts that only some
    methods have keep the values they were made with, such as a noisy router's second matrix.
    """
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Embedding | Router | SwiGLU):
            continue
        for leaf, weight in module.named_parameters(prefix=name, recurse=False):
            if weight.is_meta or leaf.rpartition(".")[2] not in DRAWN:
                continue  # a model on "meta" only tells its sizes
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {leaf}".encode()))
            draw = torch.randn(weight.shape, generator=generator, dtype=torch.float32, device="cpu")
            writes_residual = not {"out", "down"}.isdisjoint(leaf.split("."))
            with torch.no_grad():
                weight.copy_(draw * weight.shape[-1] ** -0.5 * (residual_scale if writes_residual else 1))
