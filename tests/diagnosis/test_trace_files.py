import hashlib
import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from equipoise.diagnosis import trace_files
from equipoise.diagnosis.synthetic import Workload, make_trace
from equipoise.diagnosis.trace import Trace
from equipoise.diagnosis.trace_files import read_trace, write_trace
from equipoise.errors import UserError


def made() -> Trace:
    return make_trace(Workload(layers=3, num_experts=7, windows=3, tokens=53, domains=2, switch_every=1))


def same(one: Trace, other: Trace) -> bool:
    arrays, others = one.arrays(), other.arrays()
    facts = [(t.layers, t.top_k, t.domains, t.expert_bytes, dict(t.about)) for t in (one, other)]
    alike = all((arrays[name] == others[name]).all() and arrays[name].dtype == others[name].dtype for name in arrays)
    return arrays.keys() == others.keys() and alike and facts[0] == facts[1]


@pytest.mark.parametrize("shard_bytes", [32, 1000, 2**28])
def test_a_trace_comes_back_as_it_went_however_it_is_cut(shard_bytes, tmp_path):
    write_trace(made(), tmp_path / "new" / "trace", shard_bytes)
    assert same(read_trace(tmp_path / "new" / "trace"), made())
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["trace"]
    shards = len(list((tmp_path / "new" / "trace").glob("*.safetensors")))
    assert shards == 1 if shard_bytes == 2**28 else shards > 5


def test_weights_sizes_and_fractions_come_back(tmp_path):
    trace = Trace(
        load_WLE=np.array([[[0.5, 2.25]]]),
        layers=("model.layers.3.mlp",),
        expert_TLK=np.array([[[1]]], np.int16),
        weight_TLK=np.array([[[0.75]]], np.float32),
        expert_bytes=12,
        about={"model": "toy", "steps": [1, 2]},
    )
    write_trace(trace, tmp_path / "trace")
    assert same(read_trace(tmp_path / "trace"), trace)


def test_an_empty_list_of_tokens_comes_back(tmp_path):
    trace = Trace(load_WLE=np.ones((1, 1, 2)), layers=("a",), expert_TLK=np.zeros((0, 1, 2), np.int32))
    write_trace(trace, tmp_path / "trace")
    assert read_trace(tmp_path / "trace").expert_TLK.shape == (0, 1, 2)


def test_what_is_there_is_never_overwritten(tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(UserError, match="exists; give the trace another name"):
        write_trace(made(), tmp_path / "mine")
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize("broken", ["_write", "_description"])
def test_a_write_that_fails_leaves_nothing(broken, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trace_files, broken, full)
    with pytest.raises(UserError, match="No space left on device"):
        write_trace(made(), tmp_path / "trace")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot write the trace"):
        write_trace(made(), tmp_path / "file" / "trace")


@pytest.fixture
def written(tmp_path):
    write_trace(made(), tmp_path / "trace", 1000)
    return tmp_path / "trace"


def refusal(folder) -> str:
    with pytest.raises(UserError) as caught:
        read_trace(folder)
    assert str(caught.value).count("\n") == 0
    return str(caught.value)


def edit(folder, change) -> None:
    about = json.loads((folder / "trace.json").read_text())
    change(about)
    (folder / "trace.json").write_text(json.dumps(about))


def test_every_truncation_and_flipped_byte_is_found(written):
    shard = written / "shard-00001.safetensors"
    data = shard.read_bytes()
    for damaged in (b"", data[: len(data) // 2], data + b"x"):
        shard.write_bytes(damaged)
        assert "instead of" in refusal(written)
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert "was changed after it was written" in refusal(written)
    shard.unlink()
    assert "shard-00001.safetensors is missing" in refusal(written)


def test_a_damaged_description_is_found(written):
    text = (written / "trace.json").read_text()
    for damaged in ("", text[:50], "[" * 100_000, text.replace('"schema": 1', '"schema": NaN')):
        (written / "trace.json").write_text(damaged)
        assert "is not JSON" in refusal(written)
    for damaged in ("[]", "{}", "7"):
        (written / "trace.json").write_text(damaged)
        assert "does not describe a trace" in refusal(written)
    (written / "trace.json").unlink()
    assert "No such file" in refusal(written)


def drop(name):
    return lambda about: about.pop(name)


def put(name, value):
    return lambda about: about.__setitem__(name, value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (put("schema", 2), "schema 2, this version reads 1"),
        (put("layers", ["a"]), "3 layer names, not 1"),
        (put("layers", [1, 2, 3]), "names that are none"),
        (put("layers", 5), "is damaged"),
        (put("about", []), "names that are none"),
        (put("files", {}), "no shard holds"),
        (put("files", []), "is damaged"),
        (put("files", {"../other.safetensors": {"size": 1, "digest": ""}}), "not a file of the trace"),
        (put("files", {"/etc/passwd": {"size": 1, "digest": ""}}), "not a file of the trace"),
        (put("top_k", "many"), "is damaged"),
        (drop("arrays"), "is damaged"),
        (drop("domains"), "is damaged"),
        (lambda about: about["arrays"].pop("load_WLE"), "is damaged"),
        (lambda about: about["arrays"].__setitem__("other", about["arrays"]["load_WLE"]), "no shard holds"),
        (lambda about: about["arrays"]["load_WLE"].__setitem__("shape", [10**12, 1, 1]), "unlike in trace.json"),
        (lambda about: about["arrays"]["load_WLE"].__setitem__("dtype", "float64"), "unlike in trace.json"),
    ],
)
def test_a_description_that_claims_something_else_is_refused(change, words, written):
    edit(written, change)
    assert words in refusal(written)


def test_a_shard_that_is_no_safetensors_file_is_refused(written):
    data = b"\xff" * 8 + b"{}"
    (written / "shard-00000.safetensors").write_bytes(data)
    entry = {"size": len(data), "digest": hashlib.sha256(data).hexdigest()}
    edit(written, lambda about: about["files"].__setitem__("shard-00000.safetensors", entry))
    assert "not a safetensors file" in refusal(written)


def test_loads_that_cannot_be_are_refused_though_the_files_are_whole(written):
    save_file({"load_WLE/0": np.full((3, 3, 7), -1)}, written / "shard-00000.safetensors")
    data = (written / "shard-00000.safetensors").read_bytes()
    entry = {"size": len(data), "digest": hashlib.sha256(data).hexdigest()}

    def change(about):
        about["files"] = {"shard-00000.safetensors": entry}
        about["arrays"] = {"load_WLE": {"shape": [3, 3, 7], "dtype": "int64"}}

    edit(written, change)
    assert "at least 0" in refusal(written)
