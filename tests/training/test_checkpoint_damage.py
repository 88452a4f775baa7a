import hashlib
import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
import safetensors.torch

from equipoise.errors import UserError
from equipoise.training import checkpoint, manifest
from training.checkpoint_cases import bits, blank, three, values


def data_file(folder: Path) -> Path:
    return next(checkpoint.latest(folder).glob("*.safetensors"))


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
