import hashlib
import json
import pickle
import re
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from equipoise.contracts import UserError
from equipoise.training import checkpoint, manifest


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


def data_file(folder: Path) -> Path:
    return next(checkpoint.latest(folder).glob("*.safetensors"))


@contextmanager
def no_file_above(size: int):
    """The kernel refuses to write files of more bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_round_trip_is_exact_to_the_bit(tmp_path):
    tensors, state = values(), {"data": {"position": 2**60, "text": "\u00e9\ud800"}, "loss": [0.1, -0.0, 1e-310, None]}
    path = checkpoint.save(tmp_path / "new" / "folder", 123, tensors, state, keep=1)
    assert path == tmp_path / "new" / "folder" / "step-00000123"
    assert names(path) == ["checkpoint.json", "shard-00001-model-00001-of-00001.safetensors"]
    filled = blank(tensors)
    loaded = checkpoint.load(tmp_path / "new" / "folder", filled)
    assert bits(filled) == bits(tensors)
    assert loaded == checkpoint.Loaded(123, state, path, (), ())


def test_the_newest_are_kept_and_leftovers_removed(tmp_path):
    assert checkpoint.latest(tmp_path / "none") is None
    (tmp_path / ".tmp-step-00000001").mkdir()
    (tmp_path / ".tmp-step-00000001" / "part").write_bytes(b"left by a killed process")
    (tmp_path / "step-by-step.md").write_text("not a checkpoint")
    for step in (9, 99_999_999, 100_000_000):
        checkpoint.save(tmp_path, step, values(), {}, keep=2)
    assert names(tmp_path) == ["step-100000000", "step-99999999", "step-by-step.md"]
    assert checkpoint.latest(tmp_path) == tmp_path / "step-100000000"


def test_a_save_replaces_its_step_and_drops_later_ones(tmp_path):
    three(tmp_path)
    checkpoint.save(tmp_path, 5, values(11), {"again": True}, keep=2)
    assert names(tmp_path) == ["step-00000003", "step-00000005"]
    filled = blank(values())
    assert checkpoint.load(tmp_path, filled).state == {"again": True}
    assert bits(filled) == bits(values(11))


KILLED = """
import itertools, os, random, shutil, signal, sys, time
from pathlib import Path
import torch
from equipoise.training import checkpoint

folder = Path(sys.argv[1])
torch.set_num_threads(1)

def save(step):
    tensors = {"a": torch.full((1009,), step), "b": torch.full((31, 7), step / 3)}
    checkpoint.save(folder, step, tensors, {"at": step}, keep=1)

def check(*steps):
    tensors = {"a": torch.zeros(1009, dtype=torch.int64), "b": torch.zeros(31, 7)}
    loaded = checkpoint.load(folder, tensors)
    assert loaded.step in steps, (loaded, steps)
    assert loaded.state == {"at": loaded.step}
    assert (tensors["a"] == loaded.step).all() and (tensors["b"] == torch.tensor(loaded.step / 3)).all()
    return loaded.step

def run(child):
    pid = os.fork()
    if pid == 0:
        child()
        os._exit(0)
    return pid

def kill_at(event, step):
    changes = itertools.count()
    def hook(name, arguments):
        opened = name == "open" and str(arguments[0]).startswith(str(folder))
        if (opened or name in ("os.mkdir", "os.rename", "os.remove", "os.rmdir")) and next(changes) == event:
            os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    save(step)

# Before every single change of the file system that a save makes: of a later step, the same step, and an earlier step.
for before, step in ((7, 8), (7, 7), (9, 8)):
    seen = set()
    for event in range(1000):
        shutil.rmtree(folder, ignore_errors=True)
        save(before)
        killed = os.WIFSIGNALED(os.waitpid(run(lambda: kill_at(event, step)), 0)[1])
        seen.add(check(before, step))
        save(10)
        assert os.listdir(folder) == ["step-00000010"], os.listdir(folder)
        if not killed:
            break
    assert seen == {before, step}
    assert event > 10

# At random moments of saves one after the other.
random.seed(0)
step = check(10)
for _ in range(5):
    pid = run(lambda: [save(later) for later in range(step + 1, step + 1000)])
    while checkpoint.latest(folder).name == f"step-{step:08d}":
        time.sleep(0.001)
    time.sleep(random.random() / 20)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    step = check(*range(step + 1, step + 1000))
"""


def test_killed_at_any_moment_the_last_checkpoint_stays(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "run"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path):
    three(tmp_path)
    before = names(tmp_path)
    with no_file_above(1000), pytest.raises(UserError) as caught:
        checkpoint.save(tmp_path, 9, values(), {}, keep=1)
    assert str(caught.value) == (
        f"Cannot write the checkpoint of step 9 to {tmp_path}: File too large; make room or choose another folder "
        "(the last good checkpoint, step-00000007, is kept)."
    )
    assert names(tmp_path) == before
    assert checkpoint.load(tmp_path, values()).step == 7


def test_a_disk_that_is_full_at_the_manifest_leaves_nothing(tmp_path):
    state = {"long": "x" * 100_000}
    with no_file_above(50_000), pytest.raises(UserError, match=re.escape("(there is no earlier one).")):
        checkpoint.save(tmp_path, 9, values(), state, keep=1)
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=re.escape(f"to {tmp_path / 'file' / 'run'}: Not a directory; ")):
        checkpoint.save(tmp_path / "file" / "run", 9, values(), {}, keep=1)


def test_an_error_of_ours_is_not_hidden(tmp_path):
    with pytest.raises(TypeError, match="not JSON serializable"):
        checkpoint.save(tmp_path, 9, values(), {"tensor": torch.zeros(1)}, keep=1)


def truncate(folder: Path) -> None:
    file = data_file(folder)
    file.write_bytes(file.read_bytes()[:-1])


def flip(folder: Path) -> None:
    content = bytearray(data_file(folder).read_bytes())
    content[-1] ^= 1
    data_file(folder).write_bytes(content)


def rewrite(text: str):
    return lambda folder: (checkpoint.latest(folder) / "checkpoint.json").write_text(text)


def edit(old: str, new: str):
    def change(folder: Path) -> None:
        file = checkpoint.latest(folder) / "checkpoint.json"
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, new))

    return change


def reseal(change):
    """A hostile checkpoint: whoever changed its files also made the digests fit."""

    def changed(folder: Path) -> None:
        path = checkpoint.latest(folder)
        (path / "checkpoint.json").unlink()
        change(data_file(folder))
        manifest.seal(path, 7, {})

    return changed


def forge(files: object):
    """A manifest with digests that fit, but these files."""

    def change(folder: Path) -> None:
        digest = hashlib.blake2b(json.dumps([1, 7, {}, files]).encode()).hexdigest()
        content = {"schema": 1, "step": 7, "state": {}, "files": files, "digest": digest}
        (checkpoint.latest(folder) / "checkpoint.json").write_text(json.dumps(content))

    return change


def rename_tensors(metadata: dict[str, str] | None):
    def change(file: Path) -> None:
        safetensors.torch.save_file(safetensors.torch.load_file(file), file, metadata=metadata)

    return change


def move_part(file: Path) -> None:
    """Say that a tensor's part begins elsewhere, so that it does not cover the tensor."""
    tensors = safetensors.torch.load_file(file)
    offsets = {name: {"saved_offsets": [0] * tensor.dim()} for name, tensor in tensors.items()}
    offsets["model.weight"]["saved_offsets"] = [1, 0]
    safetensors.torch.save_file(tensors, file, metadata={"DCP_SHARDING_INFO": json.dumps(offsets)})


DAMAGE = {
    "truncated": (truncate, r"model-00001-of-00001.safetensors is damaged: it has \d+ bytes, not \d+"),
    "a flipped bit": (flip, "00001.safetensors is damaged: its content is not what was saved"),
    "no data": (lambda folder: data_file(folder).unlink(), "00001.safetensors is missing"),
    "no manifest": (lambda folder: (checkpoint.latest(folder) / "checkpoint.json").unlink(), "checkpoint.json is miss"),
    "nothing": (lambda folder: shutil.rmtree(checkpoint.latest(folder)) or (folder / "step-7").mkdir(), "is missing"),
    "an unlisted file": (
        lambda folder: shutil.copy(data_file(folder), checkpoint.latest(folder) / "more.safetensors"),
        "more.safetensors does not belong to the checkpoint",
    ),
    "an edited step": (edit('"step": 7', '"step": 8'), "checkpoint.json is damaged"),
    "an edited state": (edit('"step": 7\n', '"step": 6\n'), "checkpoint.json is damaged"),
    "a newer schema": (edit('"schema": 1', '"schema": 2'), "written by a newer version of equipoise"),
    "empty": (rewrite(""), "checkpoint.json is damaged"),
    "not UTF-8": (rewrite("\udc80".encode("utf-8", "surrogatepass").decode("latin1")), "checkpoint.json is damaged"),
    "half a manifest": (rewrite('{"schema": 1, "step"'), "checkpoint.json is damaged"),
    "a list": (rewrite("[1]"), "checkpoint.json is damaged"),
    "deep": (rewrite("[" * 200_000), "checkpoint.json is damaged"),
    "a long number": (rewrite("9" * 10_000), "checkpoint.json is damaged"),
    "wrong types": (rewrite('{"schema": 1, "step": "7", "state": [], "files": 3, "digest": null}'), "json is damaged"),
    "a way out": (
        forge({"../step-00000005/checkpoint.json": {"size": 1, "digest": ""}}),
        "is not a file of the checkp",
    ),
    "an absolute path": (forge({"/dev/zero": {"size": 0, "digest": ""}}), "is not a file of the checkpoint"),
    "the parent": (forge({"..": {"size": 0, "digest": ""}}), "is missing"),
    "no size": (forge({"x.safetensors": {"digest": ""}}), "is not a file of the checkpoint"),
    "files that are a list": (forge(["x.safetensors"]), "checkpoint.json is damaged"),
    "no safetensors": (reseal(lambda file: file.write_bytes(b"\xff" * 999)), "tensors cannot be read"),
    "misleading header": (reseal(rename_tensors({"DCP_SHARDING_INFO": "[]"})), "tensors cannot be read"),
    "a part elsewhere": (reseal(move_part), "tensors cannot be read"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found_and_only_allow_previous_goes_back(name, tmp_path):
    three(tmp_path)
    damage, reason = DAMAGE[name]
    damage(tmp_path)
    latest = checkpoint.latest(tmp_path)
    tensors = values()
    with pytest.raises(
        UserError, match=f"^{re.escape(str(latest))}[^\n]*{reason}[^\n]*; --allow-previous takes the one "
    ):
        checkpoint.load(tmp_path, tensors)
    assert bits(tensors) == bits(values())
    loaded = checkpoint.load(tmp_path, tensors, allow_previous=True)
    assert bits(tensors) == bits(values(5))
    assert (loaded.step, loaded.state, loaded.path) == (5, {"step": 5}, tmp_path / "step-00000005")
    ((skipped, why),) = loaded.skipped
    assert skipped == latest
    assert re.search(reason, why)


def test_every_checkpoint_damaged(tmp_path):
    checkpoint.save(tmp_path, 3, values(), {}, keep=1)
    truncate(tmp_path)
    with pytest.raises(UserError, match=r"bytes, not [0-9]+; start in another folder.$"):
        checkpoint.load(tmp_path, values())
    with pytest.raises(UserError, match=r"can be used: .* bytes, not [0-9]+; start in another folder.$"):
        checkpoint.load(tmp_path, values(), allow_previous=True)
    with pytest.raises(UserError, match=re.escape(f"No checkpoint in {tmp_path / 'none'} was found.")):
        checkpoint.load(tmp_path / "none", values())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model.new": torch.zeros(1), "model.other": torch.zeros(1)}, "lacks the tensor model.new, and 1 more"),
        ({"model.weight": None}, "has the tensor model.weight, and 0 more, without a place"),
        ({"model.weight": torch.zeros(5, 7)}, "has model.weight as torch.float32 (7, 5), not torch.float32 (5, 7)"),
        (
            {"model.weight": torch.zeros(7, 5).double()},
            "has model.weight as torch.float32 (7, 5), not torch.float64 (7, 5)",
        ),
        ({"model.count": torch.zeros(1, dtype=torch.int64)}, "has model.count as torch.int64 (), not torch.int64 (1,)"),
        ({"rng.0.cpu": None}, "has the tensor rng.0.cpu, and 0 more, without a place"),
        ({"rng.0.cuda": torch.zeros(1)}, "lacks the tensor rng.0.cuda, and 0 more"),
    ],
)
def test_a_checkpoint_that_does_not_fit_fills_nothing(change, reason, tmp_path):
    checkpoint.save(tmp_path, 3, values(3), {}, keep=1)
    wanted = {name: tensor for name, tensor in (values() | change).items() if tensor is not None}
    before = bits(wanted)
    with pytest.raises(UserError, match=re.escape(f"step-00000003 {reason}; start in")):
        checkpoint.load(tmp_path, wanted)
    assert bits(wanted) == before


def test_random_states_may_differ_if_inexact_is_allowed(tmp_path):
    checkpoint.save(tmp_path, 3, values(3), {}, keep=1)
    wanted = values() | {"rng.0.cuda": torch.full((16,), 7, dtype=torch.uint8)}
    del wanted["rng.0.cpu"]
    assert checkpoint.load(tmp_path, wanted, allow_inexact=True).unrestored == ("rng.0.cuda",)
    assert wanted["rng.0.cuda"].tolist() == [7] * 16
    assert bits({"model.weight": wanted["model.weight"]}) == bits({"model.weight": values(3)["model.weight"]})


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_is_never_run(tmp_path):
    trap = pickle.dumps(Trap(tmp_path / "sprung"))
    pickle.loads(trap)
    (tmp_path / "sprung").unlink()
    path = checkpoint.save(tmp_path, 3, values(3), {}, keep=1)
    for name in (".metadata", "__0_0.distcp", "model.pt", "pytorch_model.bin"):
        (path / name).write_bytes(trap)
    filled = blank(values())
    checkpoint.load(tmp_path, filled)
    assert bits(filled) == bits(values(3))
    reseal(lambda file: file.write_bytes(trap))(tmp_path)
    with pytest.raises(UserError, match="tensors cannot be read"):
        checkpoint.load(tmp_path, filled)
    assert not (tmp_path / "sprung").exists()


class Tied(nn.Module):
    """Tied weights, dropout, a count, and a parameter that never gets a gradient."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 5)
        self.hidden = nn.Linear(5, 5)
        self.head = nn.Linear(5, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.unused = nn.Parameter(torch.ones(3))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("cache", torch.zeros(2), persistent=False)

    def forward(self, token_T: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return self.head(nn.functional.dropout(self.hidden(self.embedding(token_T)).relu(), 0.3)).square().sum()


def build(seed: int, amsgrad: bool = False) -> tuple[Tied, list[torch.optim.Optimizer]]:
    torch.manual_seed(seed)
    model = Tied()
    own = dict(model.named_parameters())
    first = [own.pop("hidden.weight"), own.pop("hidden.bias")]
    return model, [torch.optim.AdamW(first, 1e-2, amsgrad=amsgrad), torch.optim.AdamW(own.values(), 3e-2)]


def train(model: Tied, optimizers: list[torch.optim.Optimizer], steps: int) -> None:
    for _ in range(steps):
        model(torch.arange(11)).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("steps", [0, 3])
def test_a_resumed_run_continues_to_the_bit(steps, tmp_path):
    straight, optimizers = build(0, amsgrad=True)
    train(straight, optimizers, steps + 4)

    model, optimizers = build(0, amsgrad=True)
    train(model, optimizers, steps)
    tensors = checkpoint.flatten(model, *optimizers) | checkpoint.rng_tensors()
    checkpoint.save(tmp_path, steps, tensors, {}, keep=1)

    resumed, optimizers = build(1, amsgrad=True)
    tensors = checkpoint.flatten(resumed, *optimizers) | checkpoint.rng_tensors()
    checkpoint.load(tmp_path, tensors)
    checkpoint.restore_rng(tensors)
    train(resumed, optimizers, 4)
    assert resumed.head.weight is resumed.embedding.weight
    assert resumed.count == steps + 4
    assert bits(resumed.state_dict()) == bits(straight.state_dict())


def test_names_of_a_flat_model():
    model, optimizers = build(0, amsgrad=True)
    parameters = ["embedding.weight", "hidden.bias", "hidden.weight", "unused"]
    expected = {f"model.{name}" for name in [*parameters, "frozen", "count"]}
    expected |= {f"optimizer.{name}.{key}" for name in parameters for key in ("step", "exp_avg", "exp_avg_sq")}
    expected |= {f"optimizer.hidden.{name}.max_exp_avg_sq" for name in ("weight", "bias")}
    assert set(checkpoint.flatten(model, *optimizers)) == expected


def test_state_is_made_as_adam_makes_it_and_without_a_step():
    model, optimizers = build(0, amsgrad=True)
    steps = []
    for optimizer in optimizers:
        optimizer.register_step_post_hook(lambda *_: steps.append(1))
    made = checkpoint.flatten(model, *optimizers)
    assert steps == []
    assert all(not made[name].any() for name in made if name.startswith("optimizer."))
    model, optimizers = build(0, amsgrad=True)
    train(model, optimizers, 1)
    for name, tensor in checkpoint.flatten(model, *optimizers).items():
        assert (made[name].dtype, made[name].shape, made[name].device) == (tensor.dtype, tensor.shape, tensor.device)


def test_other_optimizers_and_their_limits():
    model = nn.Linear(3, 2)
    sgd = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(torch.ones(3)).sum().backward()
    sgd.step()
    flat = checkpoint.flatten(model, sgd)
    assert flat["optimizer.weight.momentum_buffer"].tolist() == [[1.0] * 3] * 2
    with pytest.raises(UserError, match="AdamW has a parameter that is not the model's"):
        checkpoint.flatten(model, torch.optim.AdamW([nn.Parameter(torch.ones(1))]))
    lbfgs = torch.optim.LBFGS(model.parameters(), max_iter=1)
    lbfgs.step(lambda: model(torch.ones(3)).sum())
    with pytest.raises(UserError, match="Cannot save LBFGS: its state 'func_evals' is not a tensor"):
        checkpoint.flatten(model, lbfgs)


def test_exported_weights_load_with_safetensors_alone(tmp_path):
    model, _ = build(0)
    path = tmp_path / "model.safetensors"
    checkpoint.export_weights(model, path)
    assert set(safetensors.torch.load_file(path)) == {
        "embedding.weight", "hidden.weight", "hidden.bias", "unused", "frozen", "count"
    }  # fmt: skip
    other, _ = build(1)
    assert safetensors.torch.load_model(other, path) == (set(), [])
    assert bits(other.state_dict()) == bits(model.state_dict())
    before = path.read_bytes()
    with no_file_above(100), pytest.raises(UserError, match=re.escape(f"weights to {path}: File too large")):
        checkpoint.export_weights(other, path)
    assert path.read_bytes() == before
    assert names(tmp_path) == ["model.safetensors"]


RANK = """
import resource, sys
from pathlib import Path
import torch
import torch.distributed as dist
from torch.distributed.tensor import Shard, distribute_tensor
from equipoise.contracts import UserError
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
