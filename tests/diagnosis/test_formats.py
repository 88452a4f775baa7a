import json

import numpy as np
import pytest

from equipoise.diagnosis.formats import from_loads, read_loads
from equipoise.diagnosis.synthetic import Workload, make_trace
from equipoise.diagnosis.trace_files import write_trace
from equipoise.errors import UserError

# The loads of EPLB's README, two layers of twelve experts.
WEIGHT = [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]]


def test_arrays_become_windows_of_loads():
    assert from_loads(WEIGHT).load_WLE.tolist() == [WEIGHT]
    assert from_loads(np.array([WEIGHT, WEIGHT], np.float32)).load_WLE.tolist() == [WEIGHT, WEIGHT]
    assert from_loads(np.array(WEIGHT, np.uint8)).load_WLE.dtype == np.int64


def test_files_of_arrays_and_of_others(tmp_path):
    np.save(tmp_path / "loads.npy", np.array(WEIGHT))
    (tmp_path / "plain.json").write_text(json.dumps(WEIGHT))
    (tmp_path / "eplb.json").write_text(json.dumps({"weight": WEIGHT}))
    (tmp_path / "sglang.json").write_text(json.dumps({"logical_count": [WEIGHT, WEIGHT]}))
    for name, windows in (("loads.npy", 1), ("plain.json", 1), ("eplb.json", 1), ("sglang.json", 2)):
        assert read_loads(tmp_path / name).load_WLE.tolist() == [WEIGHT] * windows


def test_a_trace_is_read_as_one(tmp_path):
    trace = make_trace(Workload(layers=2, num_experts=5, windows=2, tokens=17))
    write_trace(trace, tmp_path / "trace")
    np.testing.assert_array_equal(read_loads(tmp_path / "trace").load_WLE, trace.load_WLE)


@pytest.mark.parametrize("loads", [[], [1, 2], [[]], [[1, "a"]], [["1"]], [[None]], [[[[1]]]], "abc", None])
def test_what_is_no_array_of_loads_is_refused(loads):
    with pytest.raises(UserError):
        from_loads(loads)


@pytest.mark.parametrize("loads", [[[1, -1]], [[np.inf, 1]], [[np.nan, 1]]])
def test_loads_that_cannot_be_are_refused(loads):
    with pytest.raises(UserError, match="finite and at least 0"):
        from_loads(loads)


@pytest.mark.parametrize("text", ["", "{", "{}", "[[1, 2], [3]]", "[[NaN]]", '{"weight": {"a": 1}}', "[" * 100_000])
def test_hostile_truncated_and_empty_json_is_refused(text, tmp_path):
    (tmp_path / "loads.json").write_text(text)
    with pytest.raises(UserError, match=r"loads\.json"):
        read_loads(tmp_path / "loads.json")


class Evil:
    def __reduce__(self):
        return (open, ("/nonexistent/evil", "w"))


def test_hostile_truncated_and_empty_npy_is_refused(tmp_path):
    file = tmp_path / "loads.npy"
    np.save(file, np.array(WEIGHT))
    whole = file.read_bytes()
    huge = whole.replace(b"(2, 12)", b"(2, 99)")
    assert huge != whole
    for data in (b"", whole[:20], whole[:-8], huge, b"not an array"):
        file.write_bytes(data)
        with pytest.raises(UserError, match=r"loads\.npy"):
            read_loads(file)
    np.save(file, np.array([Evil()], object), allow_pickle=True)
    with pytest.raises(UserError, match="whole"):
        read_loads(file)


def test_unknown_endings_and_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_loads(tmp_path / "absent.npy")
    (tmp_path / "loads.csv").write_text("1,2")
    with pytest.raises(UserError, match="unknown ending"):
        read_loads(tmp_path / "loads.csv")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="No such file"):
        read_loads(tmp_path / "folder")


def test_rows_of_different_lengths_are_one_sentence(tmp_path):
    (tmp_path / "ragged.json").write_text("[[1, 2], [3]]")
    with pytest.raises(UserError, match=r"ragged\.json: Loads must be an array of numbers.*rows of equal length\.$"):
        read_loads(tmp_path / "ragged.json")
