import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from equipoise.diagnosis.formats import read_loads
from equipoise.errors import UserError

MAP = torch.tensor([[0, 1, 2, 0], [2, 1, 0, 1]])  # two layers, three experts in four slots


def saved(path: Path, value: object) -> Path:
    torch.save(value, path)
    return path


def record(step: int, rank: int, count: list[list[int]], **others: object) -> dict:
    counts = torch.tensor(count, dtype=torch.int32)
    return {"forward_pass_id": step, "rank": rank, "gatherer_key": "primary", "global_physical_count": counts} | others


def dump(records: list[dict]) -> dict:
    return {"records": records, "last_physical_to_logical_map": MAP}


def test_statistics_become_windows_and_empty_steps_go(tmp_path):
    count = torch.tensor([[[1, 2, 3], [4, 5, 6]], [[0, 0, 0], [0, 0, 0]], [[7, 0, 0], [0, 0, 7]]], dtype=torch.int32)
    file = saved(tmp_path / "a.pt", {"rank": 0, "logical_count": count, "average_utilization_rate_over_window": None})
    assert read_loads(file).load_WLE.tolist() == [[[1, 2, 3], [4, 5, 6]], [[7, 0, 0], [0, 0, 7]]]


def test_passes_of_all_ranks_add_up_by_pass_and_expert(tmp_path):
    saved(tmp_path / "0.pt", dump([record(5, 0, [[1, 2, 3, 4], [1, 2, 3, 4]]), record(9, 0, [[1, 0, 0, 0]] * 2)]))
    saved(tmp_path / "1.pt", dump([record(5, 1, [[10, 0, 0, 10], [0, 10, 0, 0]])]))
    assert read_loads(tmp_path).load_WLE.tolist() == [[[25, 2, 3], [3, 16, 1]], [[1, 0, 0], [0, 0, 1]]]


def test_single_tokens_keep_their_experts(tmp_path):
    slots = torch.full((2, 2, 8), -1, dtype=torch.int32)  # [L, tokens, 8]: room for eight, two are used
    slots[0, :, :2] = torch.tensor([[3, 1], [2, 0]])
    slots[1, :, :2] = torch.tensor([[0, 2], [3, 2]])
    others = {"topk_ids_of_layer": slots, "input_ids": [11, 12], "positions": [0, 1]}
    trace = read_loads(saved(tmp_path / "0.pt", dump([record(1, 0, [[0] * 4] * 2, **others)])))
    assert trace.expert_TLK.tolist() == [[[0, 1], [2, 0]], [[2, 0], [1, 0]]]
    assert trace.token_T.tolist() == [11, 12]
    assert trace.load_WLE.tolist() == [[[2, 1, 1], [2, 1, 1]]]
    assert trace.top_k == 2


class Evil:
    def __reduce__(self) -> tuple:
        return (os.mkdir, (Evil.target,))


@pytest.mark.parametrize(
    "inside", [lambda evil: evil, lambda evil: {"logical_count": evil}, lambda evil: {"rank": evil}]
)
def test_nothing_in_a_hostile_dump_is_run(inside, tmp_path):
    Evil.target = str(tmp_path / "run")
    torch.save(inside(Evil()), tmp_path / "evil.pt")
    with pytest.raises(UserError, match="more than tensors and plain values"):
        read_loads(tmp_path / "evil.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(inside(Evil())))
    with pytest.raises(UserError, match="more than tensors and plain values"):
        read_loads(tmp_path / "plain.pt")
    assert not (tmp_path / "run").exists()
    torch.load(tmp_path / "evil.pt", weights_only=False)  # the fault is real: a free unpickler runs it
    assert (tmp_path / "run").exists()


def test_truncated_and_empty_dumps_are_refused(tmp_path):
    whole = saved(tmp_path / "a.pt", {"logical_count": torch.ones(1, 2, 3)}).read_bytes()
    for data in (b"", whole[:10], whole[: len(whole) // 2], whole[:-30], b"PK\x03\x04"):
        (tmp_path / "a.pt").write_bytes(data)
        with pytest.raises(UserError, match=r"a\.pt"):
            read_loads(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([1, 2], "holds no dictionary"),
        ({}, "not SGLang dumps"),
        ({"records": []}, "not SGLang dumps"),
        (dump([]), "no forward pass"),
        (dump([{"rank": 0}]), "not a whole SGLang dump"),
        (dump([record(1, 0, [[1, 2]] * 2)]), "instead of"),
        (dump([record(1, 0, [[-1, 0, 0, 0]] * 2)]), "at least 0"),
        ({"logical_count": torch.zeros(2, 2, 3)}, "counts are all 0"),
        ({"logical_count": torch.ones(3)}, "not a whole SGLang dump"),
        ({"logical_count": "many"}, "not a whole SGLang dump"),
        ({"logical_count": -torch.ones(1, 2, 3)}, "at least 0"),
    ],
)
def test_what_is_no_dump_is_refused(value, words, tmp_path):
    with pytest.raises(UserError, match=words):
        read_loads(saved(tmp_path / "a.pt", value))


def test_tokens_beyond_the_slots_are_refused(tmp_path):
    slots = torch.full((2, 1, 8), 4, dtype=torch.int32)
    others = {"topk_ids_of_layer": slots, "input_ids": [11]}
    with pytest.raises(UserError, match="beyond the 4 physical ones"):
        read_loads(saved(tmp_path / "0.pt", dump([record(1, 0, [[0] * 4] * 2, **others)])))


def test_dumps_of_two_recordings_are_not_mixed(tmp_path):
    saved(tmp_path / "0.pt", dump([record(1, 0, [[1] * 4] * 2)]))
    saved(tmp_path / "1.pt", {"records": [record(1, 1, [[1] * 4] * 2)], "last_physical_to_logical_map": MAP.flip(0)})
    with pytest.raises(UserError, match="different physical_to_logical_map"):
        read_loads(tmp_path)
    saved(tmp_path / "1.pt", {"logical_count": np.ones((1, 2, 3)).tolist()})
    with pytest.raises(UserError, match="one mode"):
        read_loads(tmp_path)
