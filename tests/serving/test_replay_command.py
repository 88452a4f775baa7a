import json
import re
import subprocess
import sys

import pytest
import tyro

from equipoise import UserError
from equipoise.commands.replay_requests import Config, run

KEYS = {"capacity", "goodput", "hit_rate", "hit_rate_bound", "ttft_p50", "ttft_p90", "ttft_p99", "load_cv"}


def replay(words, as_json=False):
    run(tyro.cli(Config, args=words.split()), as_json)


def test_json_holds_settings_and_all_policies(capsys):
    replay("--num-requests 50 --replicas 2 --rate 9", as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["settings"]["source"] == "skewed"
    assert found["settings"]["requests_per_second"] == pytest.approx(9)
    assert set(found["policies"]) == {"dual_map", "affinity", "least_loaded", "min_ttft", "round_robin", "preble"}
    for policy in found["policies"].values():
        assert policy.keys() >= KEYS


def test_a_file_its_speed_faults_and_the_options_of_dual_map(tmp_path, capsys):
    path = tmp_path / "requests.jsonl"
    lines = [
        {"timestamp": 1000 * id, "input_length": 700, "output_length": 3, "hash_ids": [0, id + 1]} for id in range(9)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    options = "--migration batch --allow-neighbor --slo-fraction 1 --rebalance-multiple 2 --slo 2 --seed 3"
    words = (
        f"{path} --policies preble,dual_map --speed 2 --num-requests 7 --truncate 600 --faults die:1@2.5 --routers 3"
    )
    replay(f"{words} {options}", as_json=True)
    found = json.loads(capsys.readouterr().out)
    settings = found["settings"]
    assert list(found["policies"]) == ["preble", "dual_map"]
    assert (settings["requests"], settings["requests_per_second"], settings["routers"]) == (7, 2.0, 3)
    assert settings["faults"] == [{"kind": "die", "replica": 1, "time": 2.5}]
    expected = {"migration": "batch", "allow_neighbor": True, "slo_fraction": 1.0, "slo": 2.0, "seed": 3}
    assert expected.items() <= settings["dual_map"].items()


def test_the_table_names_the_best_and_the_folder_gets_a_report(tmp_path, capsys):
    replay(f"--num-requests 50 --policies affinity,min_ttft --out {tmp_path / 'out'}")
    text = capsys.readouterr().out
    assert re.search(r"affinity +100\.0%", text)
    assert "of the requests their first token within 5 s" in text
    page = (tmp_path / "out/report.html").read_text()
    assert "min_ttft" in page
    assert json.loads((tmp_path / "out/results.json").read_text())["settings"]["requests"] == 50


def test_results_are_never_overwritten(tmp_path):
    words = f"--num-requests 9 --policies affinity --out {tmp_path}"
    (tmp_path / "results.json").write_text("dear")
    with pytest.raises(UserError, match=r"results\.json exists already; choose another --out"):
        replay(words)
    assert (tmp_path / "results.json").read_text() == "dear"


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another --out"):
        replay(f"--num-requests 9 --policies affinity --out {tmp_path / 'file'}")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--rate 2 --speed 2", "Give --rate or --speed, not both"),
        ("--rate 0", "rate must be above 0"),
        ("--speed -1", "speed must be above 0"),
        ("--slo 0", "slo must be seconds above 0"),
        ("--num-requests 0", "num-requests must be at least 1"),
        ("--truncate 0", "truncate must be at least 1"),
        ("--num-requests 1 --rate 3", "All requests arrive at once"),
        ("--routers 0", "routers must be at least 1"),
        ("--replicas 0", "replicas must be at least 1"),
        ("--policies nearest", "There is no policy 'nearest'"),
        ("--policies ,", "at least one policy"),
        ("--faults die@3", "'die@3' is no fault; give kind:replica@seconds"),
        ("--faults die:3@4,die:3@5", "Replica 3 cannot die at 5 s"),
        ("--cache-tokens 100", "block_tokens must be above 0 and at most cache_tokens"),
        ("nothing.jsonl", "There is no file nothing.jsonl"),
    ],
)
def test_bad_flags_are_one_sentence(words, sentence):
    few = "" if "num-requests" in words else " --num-requests 9"
    with pytest.raises(UserError, match=re.escape(sentence)):
        replay(words + few)


def test_serving_needs_no_torch():
    code = "import sys, equipoise.commands.replay_requests; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == "False"
