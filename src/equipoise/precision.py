"""State that keeps its precision whatever dtype the model is cast to."""

from torch import nn


class FixedPrecision(nn.Module):
    """A module whose own buffers follow moves, but not casts: steps of 1e-3 vanish beside 0.5 in bf16."""

    def _apply(self, fn, recurse=True):
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self
