"""The key-value cache: what attention has read stays, so that each new token is computed alone."""

from jaxtyping import Float
from torch import Tensor

from equipoise.errors import UserError


class Cache:
    """Keys and values of the tokens read so far; made by ``Decoder.cache``.

    Args:
        store_2LBHPC: room for the keys and values of each layer, sequence, head, position and channel.

    Attributes:
        length: positions read so far, the same for all sequences.
    """

    def __init__(self, store_2LBHPC: Float[Tensor, "2 L B H P C"]):
        self.store_2LBHPC = store_2LBHPC
        self.length = 0

    def append(
        self, layer: int, key_BHSC: Float[Tensor, "B H S C"], value_BHSC: Float[Tensor, "B H S C"]
    ) -> tuple[Float[Tensor, "B H P C"], Float[Tensor, "B H P C"]]:
        """Keep a layer's keys and values of S new positions, and return those of all positions so far.

        The decoder moves ``length`` on when all layers have appended.

        Fails: UserError when the cache is full.
        """
        end, capacity = self.length + key_BHSC.shape[2], self.store_2LBHPC.shape[4]
        if end > capacity:
            raise UserError(f"The cache holds {capacity} positions, not {end}; make it with capacity={end} or more.")
        key_BHPC, value_BHPC = self.store_2LBHPC[:, layer, :, :, :end]
        key_BHPC[:, :, self.length :] = key_BHSC
        value_BHPC[:, :, self.length :] = value_BHSC
        return key_BHPC, value_BHPC
