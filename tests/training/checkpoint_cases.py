"""What the tests of checkpoints share: tensors to save, what a folder holds, and a full disk."""

import resource
from contextlib import contextmanager
from pathlib import Path

import torch

from equipoise.training import checkpoint


def values(seed: int = 0) -> dict[str, torch.Tensor]:
    """Every dtype in use, 0-d and empty tensors, gaps between elements, and a NaN with a payload."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(7, 5, generator=generator)
    return {
        "model.weight": normal,
        "model.transposed": torch.randn(3, 5, generator=generator).t(),
        "model.part": torch.randn(11, generator=generator)[2:5],
        "model.half": normal.bfloat16(),
        "model.double": normal.double() / 3,
        "model.flags": normal[0] > 0,
        "model.flag": torch.tensor(True),
        "model.none": torch.zeros(0, 3),
        "model.count": torch.tensor(2**53 + 1 + seed),
        "model.payload": torch.tensor([0x7FC12345 + seed, -1], dtype=torch.int32).view(torch.float32),
        "optimizer.weight.step": torch.tensor(7.0 + seed),
        "rng.0.cpu": torch.randint(256, (5056,), generator=generator, dtype=torch.uint8),
    }


def blank(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


def bits(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, torch.Size, bytes]]:
    return {
        name: (tensor.dtype, tensor.shape, tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, tensor in tensors.items()
    }


def three(folder: Path) -> None:
    """Checkpoints of the steps 3, 5 and 7; the seed of each is its step."""
    for step in (3, 5, 7):
        checkpoint.save(folder, step, values(step), {"step": step}, keep=3)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def no_file_above(size: int):
    """The kernel refuses to write files of more bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
