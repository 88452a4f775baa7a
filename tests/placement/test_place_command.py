import json

import numpy as np
import pytest

from equipoise.commands.place import Config, bytes_of, run
from equipoise.diagnosis.synthetic import Workload, make_trace
from equipoise.diagnosis.trace_files import write_trace
from equipoise.errors import UserError
from equipoise.placement import place, read_placement, write_placement


@pytest.fixture
def trace(tmp_path):
    made = make_trace(Workload(layers=2, num_experts=8, windows=3, tokens=256, affinity=0.5))
    write_trace(made, tmp_path / "trace")
    return tmp_path / "trace"


def test_json_holds_the_plan_and_files_what_was_exported(trace, tmp_path, capsys):
    config = Config(
        trace=trace,
        devices=4,
        nodes=2,
        solver="pack",
        replicas=4,
        expert_size="3MB",
        memory="1GiB",
        export=(f"sglang:{tmp_path / 'sglang.json'}", f"equipoise:{tmp_path / 'ours.json'}"),
    )
    run(config, as_json=True)
    facts = json.loads(capsys.readouterr().out)
    read = read_placement(tmp_path / "ours.json")
    assert facts["physical_to_logical"] == read.physical_to_logical.tolist()
    assert json.loads((tmp_path / "sglang.json").read_text()) == {
        "physical_to_logical_map": facts["physical_to_logical"]
    }
    assert facts["moved_bytes"] == 3_000_000 * facts["moved"] > 0
    assert facts["gap"] == pytest.approx(facts["balance"] / facts["bound"] - 1)
    assert facts["planned"]["worst"] < facts["present"]["worst"]
    assert facts["written"] == [str(tmp_path / "sglang.json"), str(tmp_path / "ours.json")]


def test_a_dry_run_says_what_would_move_and_writes_nothing(trace, tmp_path, capsys):
    write_placement(place(np.ones((2, 8)), 4), tmp_path / "now.json")
    config = Config(
        trace=trace, devices=4, current=tmp_path / "now.json", export=(f"eplb:{tmp_path / 'new.json'}",), dry_run=True
    )
    run(config, as_json=False)
    printed = capsys.readouterr().out
    assert "Would move" in printed
    assert "gap" in printed
    assert "bound" in printed
    assert not (tmp_path / "new.json").exists()


def test_a_doubled_copy_at_present_is_pointed_out(trace, tmp_path, capsys):
    order = [[0, 0, 1, 2, 3, 4, 5, 6, 7, 1, 2, 3]] * 2
    (tmp_path / "now.json").write_text(json.dumps({"physical_to_logical_map": order}))
    run(Config(trace=trace, devices=4, replicas=4, solver="pack", current=tmp_path / "now.json"), as_json=False)
    assert "Present placement: 2 times a device holds two copies" in capsys.readouterr().out


@pytest.mark.parametrize("word", ["sglang", "sglang:", "other:file.json"])
def test_an_export_without_format_or_file_is_refused_before_anything_is_read(word, tmp_path):
    with pytest.raises(UserError, match="FORMAT:FILE"):
        run(Config(trace=tmp_path / "absent", devices=4, export=(word,)), as_json=True)


def test_bad_input_loses_nothing_that_was_saved(trace, tmp_path):
    (tmp_path / "file.json").write_text("mine")
    with pytest.raises(UserError, match="do not divide"):
        run(Config(trace=trace, devices=3, export=(f"sglang:{tmp_path / 'file.json'}",)), as_json=True)
    assert (tmp_path / "file.json").read_text() == "mine"


def test_sizes():
    assert [bytes_of(text) for text in ("88MB", "1.5 GiB", "7", "7B", "2kb")] == [88 * 10**6, 3 * 2**29, 7, 7, 2000]
    for text in ("", "MB", "-1MB", "0GB", "3 parsecs", "1e9"):
        with pytest.raises(UserError, match="size must be"):
            bytes_of(text)
