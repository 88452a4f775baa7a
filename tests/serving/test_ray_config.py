import subprocess
import sys

import pytest

pytest.importorskip("ray.serve", reason="needs Ray: pip install 'equipoise[serve]'")

from equipoise import UserError
from equipoise.serving import POLICIES, DualMap, DualMapSettings
from equipoise.serving.ray_config import RouterOptions, router_config


def test_options_of_router_and_policy_stand_side_by_side():
    options = RouterOptions.of({"cache_tokens": 4096, "block_tokens": 64, "slo": 2.0, "migration": "batch"})
    assert options == RouterOptions(
        cache_tokens=4096, block_tokens=64, dual_map=DualMapSettings(slo=2.0, migration="batch")
    )
    assert options.reader().block_tokens == 64
    router = options.build(["a", "b"])
    assert isinstance(router, DualMap)
    assert [replica.name for replica in router.fleet] == ["a", "b"]


def test_every_policy_can_be_set_and_ray_finds_its_router():
    """In a process of its own: Ray pickles the class, which checked annotations prevent."""
    program = """
from equipoise.serving import POLICIES
from equipoise.serving.ray_config import router_config
for policy in POLICIES:
    made = router_config(policy=policy, slo=3.0)
    print(made.get_request_router_class().__name__, made.request_router_kwargs, made.request_routing_stats_period_s)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    routers = {"dual_map": "DualMapRouter"}
    assert run.stdout.splitlines() == [
        f"{routers.get(policy, 'PolicyRouter')} {{'policy': '{policy}', 'slo': 3.0}} 0.5" for policy in POLICIES
    ]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"policy": "best"}, "There is no policy 'best'"),
        ({"slos": 5.0}, "no option 'slos'; there are allow_neighbor, block_tokens"),
        ({"dual_map": None}, "no option 'dual_map'"),
        ({"slo": -1.0}, "slo must be at least 0"),
        ({"patience": 0.0}, "patience must be above 0"),
        ({"block_tokens": 0}, "block_tokens must be above 0"),
        ({"bytes_per_token": -1.0}, "bytes_per_token must be above 0"),
        ({"down_wait": -1.0}, "down_wait must be at least 0"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_is_deployed(options, sentence):
    with pytest.raises(UserError, match=sentence):
        router_config(**options)
