"""Cluster files: those that come along, and what is refused."""

import re

import pytest
from tiny_machine import tiny

from equipoise.errors import UserError
from equipoise.simulator import Cluster, Link, Software, machines, read_cluster

FILE = """
name = "mine"
ranks_per_node = 4
[rank]
flops = 1e12
memory = { value = 2e9, source = "a label" }
memory_bandwidth = 3e9
[[links]]
name = "near"
reach = 4
bandwidth = { value = 5e9, source = "a cable" }
[[links]]
name = "far"
bandwidth = 6e8
ranks_per_port = 2
hops = 3
[software]
efficiency = 0.5
"""


def written(tmp_path, text=FILE):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return f"{path}:12"


def test_a_file_says_what_it_says(tmp_path):
    cluster = read_cluster(written(tmp_path))
    assert (cluster.num_ranks, cluster.flops, cluster.memory, cluster.memory_bandwidth) == (12, 1e12, 2e9, 3e9)
    assert cluster.links == (
        Link(name="near", reach=4, bandwidth=5e9),
        Link(name="far", bandwidth=6e8, ranks_per_port=2, hops=3),
    )
    assert cluster.software == Software(efficiency=0.5)
    assert cluster.sources["memory"] == "a label"
    assert cluster.sources["flops"] == "no source given"


@pytest.mark.parametrize("name", machines())
def test_every_figure_of_the_machines_that_come_along_has_a_source(name):
    cluster = read_cluster(f"{name}:64")
    assert cluster.name == name
    assert len(cluster.sources) == 3 + len(cluster.links)
    assert all(len(source) > 10 and source != "no source given" for source in cluster.sources.values())


def test_the_slowest_link_that_is_needed():
    assert tiny(2).far_bandwidth == 100
    assert tiny(4).far_bandwidth == 10
    assert tiny(4, ranks_per_port=2).far_bandwidth == 5


@pytest.mark.parametrize(
    ("wrong", "right", "sentence"),
    [
        ("flops = 1e12", "flop = 1e12", "unknown key 'flop' (did you mean 'flops'?)"),
        ("flops = 1e12", "", "flops must be given"),
        ("efficiency = 0.5", "eficiency = 0.5", "unknown key 'eficiency' (did you mean 'efficiency'?)"),
        ("efficiency = 0.5", "efficiency = 1.5", "efficiency must be above 0, at most 1, not 1.5"),
        ("hops = 3", "hop = 3", "unknown key 'hop' (did you mean 'hops'?)"),
        ("ranks_per_node = 4", "ranks_per_nod = 4", "unknown key 'ranks_per_nod' (did you mean 'ranks_per_node'?)"),
        ("ranks_per_node = 4", "ranks_per_node = 4.5", "ranks_per_node must be a whole number"),
        ("flops = 1e12", 'flops = "fast"', "flops must be a number, not 'fast'"),
        ("flops = 1e12", "flops = -1", "must be above 0 and finite"),
        ("flops = 1e12", "flops = nan", "must be above 0 and finite"),
        ('source = "a label"', 'sauce = "a label"', "unknown key 'sauce' (did you mean 'source'?)"),
        ("reach = 4", "", "must reach farther"),
        ("[[links]]", "[links]", "no valid TOML"),
        ("[rank]", "rank", "no valid TOML"),
    ],
)
def test_a_file_that_makes_no_sense_is_refused(tmp_path, wrong, right, sentence):
    assert wrong in FILE
    with pytest.raises(UserError, match=re.escape(sentence)):
        read_cluster(written(tmp_path, FILE.replace(wrong, right)))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("h200x9:16", "did you mean 'h200x8'"),
        ("h200x8", "machine:ranks"),
        ("h200x8:0", "whole number above 0"),
        ("h200x8:many", "whole number above 0"),
        ("absent.toml:8", "Cannot read the cluster file absent.toml"),
    ],
)
def test_a_cluster_that_is_none_is_refused(text, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        read_cluster(text)


def test_a_cluster_needs_a_link():
    with pytest.raises(UserError, match="needs a link"):
        Cluster(name="x", num_ranks=1, ranks_per_node=1, flops=1.0, memory=1.0, memory_bandwidth=1.0, links=())
