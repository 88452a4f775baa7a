"""Reading runs: what is read, and what is refused with its line."""

import json

import numpy as np
import pytest

from equipoise.errors import UserError
from equipoise.scaling import Runs, read_runs

ROWS = [(1e6, 2e9, 3.5), (2e6, 1e9, 3.4), (1e7, 2e8, 3.6), (3e6, 4e9, 3.1)]


def csv_of(tmp_path, head="params,tokens,loss", rows=ROWS):
    path = tmp_path / "runs.csv"
    path.write_text("\n".join([head, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return path


def test_csv(tmp_path):
    runs = read_runs(csv_of(tmp_path))[""]
    assert runs.params.tolist() == [1e6, 2e6, 1e7, 3e6]
    assert runs.loss.tolist() == [3.5, 3.4, 3.6, 3.1]
    assert runs.flops.tolist() == [6 * n * d for n, d, _ in ROWS]
    assert runs.flops_per_product == pytest.approx(6)


def test_methods_and_optional_columns(tmp_path):
    rows = [("b" if place % 2 else "a", *row, 7 * row[0] * row[1], 8 * row[0]) for place, row in enumerate(ROWS * 2)]
    found = read_runs(csv_of(tmp_path, "method, params, tokens, loss, flops, total", rows))
    assert list(found) == ["a", "b"]
    assert found["b"].params.tolist() == [2e6, 3e6, 2e6, 3e6]
    assert found["a"].flops_per_product == pytest.approx(7)
    assert found["a"].features()["density"].tolist() == [0.125] * 4


@pytest.mark.parametrize("wrapped", [True, False])
def test_json(tmp_path, wrapped):
    records = [{"params": n, "tokens": d, "loss": loss, "seed": 1} for n, d, loss in ROWS]
    path = tmp_path / "runs.json"
    path.write_text(json.dumps({"runs": records} if wrapped else records))
    assert read_runs(path)[""].tokens.tolist() == [2e9, 1e9, 2e8, 4e9]


@pytest.mark.parametrize(
    ("position", "row", "sentence"),
    [
        (1, (2e6, 1e9, "nan"), "Line 3 of .* has no finite loss"),
        (2, (1e7, "", 3.6), "Line 4 of .* has no finite tokens"),
        (0, (-1e6, 2e9, 3.5), "Line 2 of .* has params that is not positive"),
        (3, (3e6, 4e9, 0), "Line 5 of .* has loss that is not positive"),
        (1, (2e6, 1e9, "three"), "The loss of line 3 of .* must be a number, not 'three'"),
        (2, (1e7, 2e8, 36.0), "Line 4 of .* has a loss above 20: give nats per token"),
    ],
)
def test_a_bad_line_is_named(tmp_path, position, row, sentence):
    rows = [*ROWS]
    rows[position] = row
    with pytest.raises(UserError, match=sentence):
        read_runs(csv_of(tmp_path, rows=rows))


@pytest.mark.parametrize(
    ("head", "rows", "sentence"),
    [
        ("params,loss", [(1e6, 3.0)] * 4, "lacks tokens; its columns are params, loss"),
        ("params,tokens,loss", ROWS[:3], "at least 4 runs, better 15; there are 3"),
        ("params,tokens,loss", [], "holds no runs"),
        ("params,tokens,loss", [(n / 1e6, d, loss) for n, d, loss in ROWS], "params reach only 10: give counts"),
        ("params,tokens,loss", [(n, d / 1e9, loss) for n, d, loss in ROWS], "tokens reach only 4: give counts"),
        ("params,tokens,loss,flops", [(*row, 1e3) for row in ROWS], "flops that do not fit its params and tokens"),
        ("params,tokens,loss,total", [(*row, 1e5) for row in ROWS], "Line 2 .* fewer parameters in total than params"),
    ],
)
def test_a_bad_file_is_refused(tmp_path, head, rows, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        read_runs(csv_of(tmp_path, head, rows))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("runs.json", b"{", "neither CSV nor JSON"),
        ("runs.json", b'{"runs": 3}', "must hold a list of runs"),
        ("runs.csv", b"params,tokens,loss\n\xff\xfe\n", "neither CSV nor JSON"),
    ],
)
def test_what_is_not_a_table_is_refused(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        read_runs(tmp_path / name)


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"Cannot read the runs .*: No such file"):
        read_runs(tmp_path / "none.csv")


def test_arrays_of_unequal_length():
    with pytest.raises(UserError, match="there are 4 params, 3 tokens, 4 loss"):
        Runs.of(params=[1e6] * 4, tokens=[1e9] * 3, loss=[3.0] * 4)
    with pytest.raises(UserError, match="one number per run"):
        Runs.of(params=np.ones((2, 2)), tokens=[1e9] * 4, loss=[3.0] * 4)
    with pytest.raises(UserError, match="must be numbers"):
        Runs.of(params=["a"] * 4, tokens=[1e9] * 4, loss=[3.0] * 4)
