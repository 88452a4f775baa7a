import re
import subprocess
import sys

import pytest
import torch

from equipoise.errors import UserError
from equipoise.training import checkpoint
from training.checkpoint_cases import names

RANK = """
import resource, sys
from pathlib import Path
import torch
import torch.distributed as dist
from torch.distributed.tensor import Shard, distribute_tensor
from equipoise.errors import UserError
from equipoise.training import checkpoint

rank, folder = int(sys.argv[1]), Path(sys.argv[2])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
mesh = dist.init_device_mesh("cpu", (2,))
torch.manual_seed(rank)

whole = torch.arange(35000.0).view(7, 5000)

def tensors(scale):
    split = distribute_tensor(scale * whole, mesh, [Shard(0)])
    return {"all": scale * whole, "split": split} | checkpoint.rng_tensors()

def refused(work):
    try:
        work()
    except UserError as error:
        return str(error)

saved = tensors(1)
checkpoint.save(folder / "run", 3, saved, {"from": rank}, keep=1)
torch.rand(1)
filled = tensors(0)
assert checkpoint.load(folder / "run", filled).state == {"from": 0}
assert torch.equal(filled["all"], whole)
assert torch.equal(filled["split"].to_local(), whole[4:] if rank else whole[:4])
assert torch.equal(filled[f"rng.{rank}.cpu"], saved[f"rng.{rank}.cpu"])

if rank == 1:  # a disk that is full on one rank only
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
error = refused(lambda: checkpoint.save(folder / "run", 4, saved, {}, keep=1))
assert error and "File too large" in error and "step-00000003, is kept" in error, error
filled["more"] = torch.zeros(1)
error = refused(lambda: checkpoint.load(folder / "run", filled))
assert error and "lacks the tensor more" in error, error
dist.barrier()
dist.destroy_process_group()
"""


def test_two_ranks_and_the_same_files_on_one(tmp_path):
    command = [sys.executable, "-c", RANK]
    ranks = [subprocess.Popen([*command, str(rank), tmp_path], stderr=subprocess.PIPE) for rank in (0, 1)]
    try:
        errors = [process.communicate(timeout=120)[1].decode() for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], errors
    assert names(tmp_path / "run") == ["step-00000003"]
    assert len(list((tmp_path / "run" / "step-00000003").glob("*.safetensors"))) == 2
    tensors = {"all": torch.zeros(7, 5000), "split": torch.zeros(7, 5000)} | checkpoint.rng_tensors()
    with pytest.raises(UserError, match=re.escape("has the tensor rng.1.cpu, and 0 more, without a place")):
        checkpoint.load(tmp_path / "run", tensors)
    checkpoint.load(tmp_path / "run", tensors, allow_inexact=True)
    assert torch.equal(tensors["all"], torch.arange(35000.0).view(7, 5000))
    assert torch.equal(tensors["split"], tensors["all"])
