"""What is computed: the sizes of a model's expert layers."""

from __future__ import annotations

from dataclasses import dataclass

from equipoise.errors import require
from equipoise.nearest import nearest


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of the expert layers, which are alike.

    Attributes:
        name: for people.
        dim: width of the model.
        hidden_dim: hidden width of an expert (SwiGLU, three matrices).
        num_experts: experts of a layer.
        top_k: experts per token.
        num_layers: expert layers.
        other_params: parameters of a layer that every token passes besides its experts (attention, shared experts);
            0 simulates the experts alone.
        value_bytes: bytes of a weight and of an activation.
        state_bytes: bytes of training per weight: itself, gradient, optimizer.
    """

    name: str = "custom"
    dim: int
    hidden_dim: int
    num_experts: int
    top_k: int
    num_layers: int = 1
    other_params: float = 0.0
    value_bytes: int = 2
    state_bytes: int = 16

    def __post_init__(self) -> None:
        """Fails: UserError for sizes that make no sense."""
        sizes = (self.dim, self.hidden_dim, self.num_experts, self.top_k, self.num_layers, self.value_bytes)
        require(min(sizes) >= 1 and self.other_params >= 0, f"Every size of shape {self.name} must be at least 1.")
        fits = self.top_k <= self.num_experts
        require(fits, f"Shape {self.name}: {self.top_k} experts per token of {self.num_experts}.")
        require(self.state_bytes >= self.value_bytes, f"Shape {self.name}: state_bytes holds the weight itself.")

    @property
    def expert_bytes(self) -> int:
        """Weights of one expert."""
        return 3 * self.dim * self.hidden_dim * self.value_bytes

    @property
    def row_flops(self) -> int:
        """Floating-point operations of a row, forward."""
        return 6 * self.dim * self.hidden_dim

    @property
    def row_bytes(self) -> int:
        """A row on its way."""
        return self.dim * self.value_bytes

    @property
    def computed_bytes(self) -> int:
        """Memory of a row while its expert computes: input, output, gate, up and their product."""
        return (2 * self.dim + 3 * self.hidden_dim) * self.value_bytes

    @property
    def saved_bytes(self) -> int:
        """Memory of a row until the backward pass: input, gate and up."""
        return (self.dim + 2 * self.hidden_dim) * self.value_bytes


# Sizes from the models' published configurations; other_params counts attention and shared experts of one layer.
_PUBLISHED = (
    Shape(name="gpt-oss-120b", dim=2880, hidden_dim=2880, num_experts=128, top_k=4, num_layers=36, other_params=26.6e6),
    Shape(name="deepseek-v3", dim=7168, hidden_dim=2048, num_experts=256, top_k=8, num_layers=58, other_params=231e6),
    Shape(name="kimi-k2", dim=7168, hidden_dim=2048, num_experts=384, top_k=8, num_layers=60, other_params=145e6),
    Shape(name="mixtral-8x7b", dim=4096, hidden_dim=14336, num_experts=8, top_k=2, num_layers=32, other_params=41.9e6),
)


def shapes() -> dict[str, Shape]:
    """The shapes that are known by name."""
    return {shape.name: shape for shape in _PUBLISHED}


def find_shape(name: str) -> Shape:
    """A shape by name. Fails: UserError for an unknown one, with the nearest."""
    known = shapes()
    require(name in known, f"Unknown shape {name!r}{nearest(name, known)}; there are {', '.join(known)}.")
    return known[name]
