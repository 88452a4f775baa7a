"""The command as a user calls it: the table, JSON, the report, and what it refuses."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import tyro

from equipoise.commands.simulate import Config, run
from equipoise.diagnosis.trace_files import write_trace
from equipoise.errors import UserError
from equipoise.simulator import Shape, parse_workload

SMALL = "--cluster h200x8:16 --dim 64 --hidden-dim 32 --num-experts 32 --top-k 2 --num-layers 2 --tokens 256"


def simulate(words, as_json=False):
    run(tyro.cli(Config, args=words.split()), as_json)


def test_the_table_and_the_sentence_say_that_all_is_simulated(capsys):
    simulate(f"{SMALL} --policy native,least-loaded --workload hot:0.9:1")
    shown = capsys.readouterr().out
    assert re.search(r"^native .* 1\.00 ", shown, re.MULTILINE)
    assert "least-loaded" in shown
    assert "(simulated)" in shown


def test_json_holds_everything(capsys):
    simulate(f"{SMALL} --seed 3", as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["label"] == "simulated"
    assert found["settings"]["shape"]["name"] == "deepseek-v3, changed"
    assert (found["settings"]["ep"], found["settings"]["replicas"], found["settings"]["seed"]) == (16, 1, 3)
    assert found["cluster"]["sources"]["flops"].startswith("NVIDIA")
    assert list(found["policies"]) == ["native", "placed", "replicas", "least-loaded", "sharded-sparse", "shadow"]
    for policy in found["policies"].values():
        assert sum(policy["phases"].values()) == pytest.approx(policy["seconds"])
        own = np.array(list(policy["own_seconds"].values())).sum(0)
        waits = np.array(policy["waits_for"]).sum(1)
        np.testing.assert_allclose(own + waits, policy["seconds"])


def test_a_trace_brings_its_own_sizes(tmp_path, capsys):
    shape = Shape(dim=2, hidden_dim=3, num_experts=24, top_k=3, num_layers=5)
    write_trace(parse_workload("zipf:1.0", shape), tmp_path / "trace")
    simulate(f"--trace {tmp_path}/trace --cluster h100x8:8 --policy native --tokens 64", as_json=True)
    sizes = json.loads(capsys.readouterr().out)["settings"]["shape"]
    assert (sizes["num_experts"], sizes["top_k"], sizes["num_layers"], sizes["dim"]) == (24, 3, 5, 7168)
    with pytest.raises(UserError, match="The trace has 24 experts"):
        simulate(f"--trace {tmp_path}/trace --cluster h100x8:8 --num-experts 8")
    with pytest.raises(UserError, match="cannot be spread over expert-parallel groups of 32"):
        simulate(f"--trace {tmp_path}/trace --cluster h100x8:32 --ep 32")


def test_the_report_is_written_once(tmp_path, capsys):
    out = tmp_path / "out"
    simulate(f"{SMALL} --policy native,shadow --out {out}")
    page = (out / "report.html").read_text()
    assert len(page) < 6e6
    assert "Report:" in capsys.readouterr().out
    assert json.loads((out / "results.json").read_text())["label"] == "simulated"
    with pytest.raises(UserError, match="exists already"):
        simulate(f"{SMALL} --out {out}")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot write"):
        simulate(f"{SMALL} --policy native --out {tmp_path}/file/out")


def test_calibration_comes_first(tmp_path, capsys):
    path = tmp_path / "measured.json"
    point = {"shape": "mixtral-8x7b", "workload": "balanced", "ranks": 8, "tokens": 512, "policy": "native"}
    path.write_text(json.dumps({"points": [point | {"seconds": 0.01}], "fit": ["link_efficiency"]}))
    simulate(f"{SMALL} --policy native --calibrate {path}", as_json=True)
    found = json.loads(capsys.readouterr().out)
    fitted = found["calibration"]["constants"]["link_efficiency"]
    assert fitted == found["cluster"]["software"]["link_efficiency"] != 0.487
    assert found["calibration"]["points"][0]["measured"] == 0.01
    simulate(f"{SMALL} --policy native --calibrate {path}")
    assert "Calibrated on 1 points" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--cluster h200x9:8", "did you mean 'h200x8'"),
        ("--policy natve", "did you mean 'native'"),
        ("--model kimi-k3", "did you mean 'kimi-k2'"),
        ("--ep 5", "do not divide the cluster's 16"),
        ("--workload zipf:x", "'x' in the workload"),
        ("--num-experts 0", "must be at least 1"),
        ("--trace absent", "absent"),
        ("--trace absent --workload balanced", "not both"),
        ("--calibrate absent.json", "Cannot read the measurements absent.json"),
    ],
)
def test_bad_input_is_one_clear_sentence(words, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        simulate(words)


def test_no_torch_is_loaded():
    code = "import sys; from equipoise.simulator import simulate; simulate('balanced', 'h200x8:2', 'native'); "
    loaded = subprocess.run(
        [sys.executable, "-c", f"{code} print('torch' in sys.modules)"], capture_output=True, text=True
    )
    assert (loaded.stdout.strip(), loaded.stderr) == ("False", "")
