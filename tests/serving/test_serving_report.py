import json
import re

import pytest

from equipoise.serving import SkewedWorkload, replay
from equipoise.serving.report import headline, table, write_page


@pytest.fixture(scope="module")
def results():
    requests = list(SkewedWorkload(num_requests=60, rate=20.0).requests())
    return replay(requests, ["dual_map", "round_robin"], 2)


def test_the_page_needs_nothing_from_outside_and_has_every_figure(results, tmp_path):
    write_page(results, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert len(page) < 6e6
    head = page[: page.index("<script")]
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", head)
    assert "default-src 'none'" in head
    for policy in results["policies"].values():
        assert f"<td>{policy['ttft_p90']:.2f}</td>" in page
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    traces = data["plots"]["ttft"]["views"][""]["traces"]
    assert [trace["meta"]["method"] for trace in traces] == ["dual_map", "round_robin"]
    assert traces[0]["x"] == results["policies"]["dual_map"]["ttft_percentiles"]
    assert data["plots"]["ttft"]["layout"]["shapes"][0]["x0"] == 5.0
    for name in data["plots"]:
        assert f'class="plot" id="{name}"' in page


def test_the_headline_names_the_best_by_capacity_then_by_p90(results):
    made_up = {
        "slow": {"capacity": 0.9, "ttft_p90": 3.0},
        "fast": {"capacity": 0.9, "ttft_p90": 2.0},
        "worst": {"capacity": 0.1, "ttft_p90": 1.0},
    }
    sentence = headline(results | {"policies": made_up})
    assert sentence == "fast gives 90.0% of the requests their first token within 5 s; slow follows with 90.0%."
    one = headline(results | {"policies": {"worst": made_up["worst"]}})
    assert one == "worst gives 10.0% of the requests their first token within 5 s."


def test_the_table_has_a_row_per_policy(results):
    assert list(table(results).columns[0].cells) == ["dual_map", "round_robin"]
