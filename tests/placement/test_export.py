import json
from pathlib import Path

import numpy as np
import pytest

from equipoise.errors import UserError
from equipoise.placement import FORMATS, Placement, place, read_placement, write_placement

LOADS = np.random.default_rng(0).integers(1, 100, (3, 8))


def planned() -> Placement:
    return place(LOADS, 4, nodes=2, replicas=4, solver="pack")


def same(one: Placement, other: Placement) -> bool:
    order = (one.physical_to_logical == other.physical_to_logical).all()
    return bool(order) and (one.num_experts, one.devices, one.nodes) == (other.num_experts, other.devices, other.nodes)


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_comes_back_as_it_went(form, tmp_path):
    write_placement(planned(), tmp_path / "new" / "file.json", form)
    assert same(planned(), read_placement(tmp_path / "new" / "file.json", devices=4, nodes=2))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file.json"]


def test_our_own_format_keeps_what_was_predicted(tmp_path):
    write_placement(planned(), tmp_path / "file.json")
    back = read_placement(tmp_path / "file.json")
    assert (back.balance, back.bound, back.moved, back.solver) == (
        planned().balance,
        planned().bound,
        planned().moved,
        planned().solver,
    )


def test_what_others_read_by_hand(tmp_path):
    placement = Placement(physical_to_logical=np.array([[0, 1, 2, 0]]), num_experts=3, devices=2)
    read = {}
    for form in FORMATS:
        write_placement(placement, tmp_path / form, form)
        read[form] = json.loads((tmp_path / form).read_text())
    assert read["sglang"] == {"physical_to_logical_map": [[0, 1, 2, 0]]}  # a second key would be refused there
    assert read["eplb"] == {
        "phy2log": [[0, 1, 2, 0]],
        "log2phy": [[[0, 3], [1, -1], [2, -1]]],
        "logcnt": [[2, 1, 1]],
    }
    devices = [{"device_id": 0, "device_expert": [0, 1]}, {"device_id": 1, "device_expert": [2, 0]}]
    layer = {"layer_id": 0, "device_count": 2, "device_list": devices}
    assert read["vllm_ascend"] == {"moe_layer_count": 1, "layer_list": [layer]}


def test_eplb_says_what_the_planner_of_replicas_says(tmp_path):
    from equipoise.parallel.eplb import rebalance_experts

    windows = np.stack([LOADS[:, ::-1] * 9, LOADS])
    maps = rebalance_experts(windows.sum(0).astype(np.float32), 12, 1, 1, 4)
    write_placement(place(windows, 4, replicas=4, solver="eplb"), tmp_path / "file.json", "eplb")
    read = json.loads((tmp_path / "file.json").read_text())
    assert read["phy2log"] == maps.physical_to_logical.tolist()
    assert read["logcnt"] == maps.replicas.tolist()
    assert [[set(row) for row in layer] for layer in read["log2phy"]] == [
        [set(row) for row in layer] for layer in maps.logical_to_physical.tolist()
    ]


def damaged(values: dict, **changes) -> str:
    return json.dumps(values | changes)


def contents() -> dict[str, str]:
    good = {"format": "equipoise-placement", "schema": 1, "num_experts": 2, "devices": 2, "nodes": 1, "moved": 0}
    good |= {"solver": "x", "expert_bytes": None, "balance_L": None, "bound_L": None, "physical_to_logical": [[0, 1]]}
    layer = {"layer_id": 0, "device_count": 2, "device_list": [{"device_id": 0, "device_expert": [0]}]}
    return {
        "empty": "",
        "truncated": json.dumps(good)[:-9],
        "no object": "[1, 2]",
        "another thing": "{}",
        "deep": "[" * 100_000,
        "binary": "\x00\x01",
        "another schema": damaged(good, schema=2),
        "no experts": damaged(good, num_experts=0),
        "text for a count": damaged(good, devices="2"),
        "true for a count": damaged(good, devices=True),
        "an expert too far": damaged(good, physical_to_logical=[[0, 7]]),
        "an expert missing": damaged(good, physical_to_logical=[[0, 0]]),
        "fractions": damaged(good, physical_to_logical=[[0, 1.5]]),
        "ragged": damaged(good, physical_to_logical=[[0, 1], [0]]),
        "not a list": damaged(good, physical_to_logical={"a": 1}),
        "huge number": damaged(good, physical_to_logical=[[0, 10**30]]),
        "predictions of other layers": damaged(good, balance_L=[1.0, 2.0]),
        "NaN": damaged(good, balance_L=[float("nan")]),
        "SGLang, ragged": '{"physical_to_logical_map": [[0, 1], [1]]}',
        "SGLang, empty": '{"physical_to_logical_map": []}',
        "a device missing": json.dumps({"moe_layer_count": 1, "layer_list": [layer]}),
        "a layer missing": json.dumps({"moe_layer_count": 2, "layer_list": []}),
    }


@pytest.mark.parametrize("name", contents())
def test_hostile_truncated_and_empty_files_are_refused_in_one_sentence(name, tmp_path):
    (tmp_path / "file.json").write_text(contents()[name])
    with pytest.raises(UserError, match=r"file\.json"):
        read_placement(tmp_path / "file.json", devices=2)


def test_devices_that_nobody_named_are_asked_for(tmp_path):
    write_placement(planned(), tmp_path / "file.json", "sglang")
    with pytest.raises(UserError, match="how many devices"):
        read_placement(tmp_path / "file.json")


def test_what_cannot_be_written_leaves_what_was_there(tmp_path):
    file = tmp_path / "file.json"
    file.write_text("mine")
    with pytest.raises(UserError, match="Cannot write"):
        write_placement(planned(), file / "below")
    assert file.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [file]


def test_an_unknown_file_is_said_to_be_missing(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read_placement(Path(tmp_path / "absent.json"))
