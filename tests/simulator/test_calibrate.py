"""Calibration: constants that are known come back, and bad files are refused."""

import json
import re
from dataclasses import replace

import pytest
from tiny_machine import SHAPE

from equipoise.errors import UserError
from equipoise.simulator import Settings, find_shape, read_cluster, simulate
from equipoise.simulator.calibrate import Measurement, calibrate, one_layer, read_measurements

CLUSTER = read_cluster("h200x8:8")
SHAPE_1 = one_layer(find_shape("gpt-oss-120b"))
POINT = {"shape": "gpt-oss-120b", "workload": "hot:0.5:4", "ranks": 8, "tokens": 4096, "policy": "least-loaded"}


def measured(cluster, tokens, policy="native", workload="hot:0.5:4"):
    """What a machine with these constants would have measured."""
    settings = Settings(shape=SHAPE_1, tokens=tokens, training=False, windows=1)
    seconds = simulate(workload, cluster, [policy], settings).outcomes[policy].seconds
    return Measurement(shape=SHAPE_1, workload=workload, ranks=8, tokens=tokens, policy=policy, seconds=seconds)


def test_known_constants_come_back():
    truth = {"efficiency": 0.55, "link_efficiency": 0.63}
    machine = replace(CLUSTER, software=replace(CLUSTER.software, **truth))
    points = [measured(machine, tokens, workload=load) for tokens in (1024, 8192) for load in ("balanced", "hot:0.9:2")]
    fitted = calibrate(CLUSTER, points, list(truth))
    for name, value in truth.items():
        assert fitted.constants[name] == pytest.approx(value, rel=0.01)
    assert max(map(abs, fitted.errors)) < 1e-3
    assert fitted.cluster.software == replace(CLUSTER.software, **fitted.constants)
    assert max(abs(point.error(CLUSTER)) for point in points) > 0.05


def test_a_ratio_needs_no_times():
    machine = replace(CLUSTER, software=replace(CLUSTER.software, weight_efficiency=0.1))
    native, spread = (measured(machine, 8192, policy) for policy in ("native", "least-loaded"))
    ratio = replace(spread, seconds=None, speedup=native.seconds / spread.seconds)
    assert ratio.error(machine) == pytest.approx(0, abs=1e-12)
    fitted = calibrate(CLUSTER, [ratio], ["weight_efficiency"])
    assert fitted.constants["weight_efficiency"] == pytest.approx(0.1, rel=0.01)
    assert replace(ratio, policy="native").simulated(machine) == 1.0


def test_a_file_with_a_known_model_and_one_with_sizes(tmp_path):
    path = tmp_path / "measured.json"
    sizes = {"dim": 2, "hidden_dim": 3, "num_experts": 4, "top_k": 1, "value_bytes": 1, "state_bytes": 8}
    path.write_text(json.dumps({"points": [POINT | {"speedup": 2.0}, POINT | {"shape": sizes, "seconds": 0.5}]}))
    (first, second), names = read_measurements(path)
    assert (first.shape, first.speedup, first.training) == (SHAPE_1, 2.0, False)
    assert (second.shape, second.seconds) == (SHAPE, 0.5)
    assert "link_efficiency" in names
    path.write_text(json.dumps({"points": [], "fit": ["row_passes"]}))
    assert read_measurements(path) == ([], ("row_passes",))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "is no valid JSON"),
        ("[]", 'must hold {"points": [...]}'),
        (json.dumps({"point": []}), 'must hold {"points": [...]}'),
        (json.dumps({"points": [], "fits": []}), "unknown key 'fits' (did you mean 'fit'?)"),
        (json.dumps({"points": [], "fit": "all"}), "fit must be a list"),
        (json.dumps({"points": [3]}), "point 1 must be an object"),
        (json.dumps({"points": [POINT | {"second": 1}]}), "unknown key 'second' (did you mean 'seconds'?)"),
        (json.dumps({"points": [POINT]}), "either seconds or speedup"),
        (json.dumps({"points": [POINT | {"seconds": 1, "speedup": 1}]}), "either seconds or speedup"),
        (json.dumps({"points": [POINT | {"seconds": -1}]}), "must be above 0, not -1.0"),
        (json.dumps({"points": [POINT | {"shape": "gpt-oss", "seconds": 1}]}), "did you mean 'gpt-oss-120b'"),
        (json.dumps({"points": [POINT | {"shape": {"dims": 1}, "seconds": 1}]}), "unknown key 'dims'"),
        (
            json.dumps({"points": [POINT | {"shape": {"dim": 1}, "seconds": 1}]}),
            "hidden_dim, num_experts, top_k must be given",
        ),
        (json.dumps({"points": [{"shape": "kimi-k2", "seconds": 1}]}), "workload, ranks, tokens, policy must be given"),
        (json.dumps({"points": [POINT | {"shape": 3, "seconds": 1}]}), "must be the name of a model, or sizes"),
        (json.dumps({"points": [POINT | {"ranks": 0, "seconds": 1}]}), "must be at least 1"),
        (json.dumps({"points": [POINT | {"tokens": True, "seconds": 1}]}), "tokens must be of type int, not True"),
        (json.dumps({"points": [POINT | {"ranks": "8", "seconds": 1}]}), "ranks must be of type int, not '8'"),
        (json.dumps({"points": [POINT | {"training": 1, "seconds": 1}]}), "training must be of type bool, not 1"),
    ],
)
def test_a_file_that_makes_no_sense_is_refused(tmp_path, text, sentence):
    path = tmp_path / "measured.json"
    path.write_text(text)
    with pytest.raises(UserError, match=re.escape(sentence)):
        read_measurements(path)


def test_other_refusals(tmp_path):
    with pytest.raises(UserError, match="Cannot read the measurements"):
        read_measurements(tmp_path / "absent.json")
    point = measured(CLUSTER, 128)
    with pytest.raises(UserError, match=re.escape("Unknown constant 'row_pass' (did you mean 'row_passes'?)")):
        calibrate(CLUSTER, [point], ["row_pass"])
    with pytest.raises(UserError, match="1 measured points cannot fit 2 constants"):
        calibrate(CLUSTER, [point], ["efficiency", "row_passes"])
