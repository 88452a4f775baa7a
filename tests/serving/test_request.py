import json

import pytest

from equipoise import UserError
from equipoise.serving import Request, read_requests, truncated

GOOD = {"timestamp": 1500, "input_length": 1025, "output_length": 7, "hash_ids": [3, 4, 5]}


@pytest.fixture
def write(tmp_path):
    def write(*lines):
        path = tmp_path / "requests.jsonl"
        path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
        return path

    return write


def test_a_line_is_a_request(write):
    path = write(GOOD, GOOD | {"timestamp": 2500.5, "hash_ids": [3, 4, 9]})
    assert read_requests(path) == [Request(0, 1.5, 1025, 7, (3, 4, 5)), Request(1, 2.5005, 1025, 7, (3, 4, 9))]
    assert read_requests(path, limit=1) == [Request(0, 1.5, 1025, 7, (3, 4, 5))]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{not json", "line 2 is no JSON object"),
        ("", "line 2 is no JSON object"),
        ("[1, 2]", "line 2 is no JSON object"),
        ({"timestamp": 1, "input_length": 5}, "line 2 is no JSON object with timestamp, input_length"),
        (GOOD | {"hash_ids": 3}, "line 2 is no JSON object"),
        (GOOD | {"input_length": "many"}, "line 2 holds something else than numbers"),
        (GOOD | {"hash_ids": [3, 4, None]}, "line 2 holds something else than numbers"),
        (GOOD | {"output_length": True}, "line 2 holds something else than numbers"),
        (GOOD | {"timestamp": 1499}, "line 2 has time 1499 ms, before the line above"),
        (GOOD | {"timestamp": float("nan")}, "line 2 has time nan ms"),
        (GOOD | {"input_length": 0, "hash_ids": []}, "line 2 has an empty prompt"),
        (GOOD | {"output_length": 0}, "line 2 has an empty answer"),
        (GOOD | {"hash_ids": [3, 4]}, "line 2 has 2 blocks; 1025 tokens in blocks of 512 make 3"),
        (GOOD | {"hash_ids": [3, 5, 4]}, "line 2 has block 5 after other blocks than an earlier line"),
    ],
)
def test_a_bad_line_is_named(write, line, words):
    path = write(GOOD, line)
    with pytest.raises(UserError) as caught:
        read_requests(path)
    assert str(caught.value).startswith(f"{path}, {words}")


def test_a_missing_an_empty_and_a_binary_file_are_one_sentence(tmp_path, write):
    with pytest.raises(UserError, match="There is no file"):
        read_requests(tmp_path / "nothing.jsonl")
    with pytest.raises(UserError, match="holds no requests"):
        read_requests(write())
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not a text file"):
        read_requests(binary)


def test_prompts_are_cut_to_whole_tokens_and_their_blocks():
    cut = list(truncated([Request(0, 1.5, 1025, 7, (3, 4, 5)), Request(1, 2.0, 512, 7, (3,))], 513))
    assert cut == [Request(0, 1.5, 513, 7, (3, 4)), Request(1, 2.0, 512, 7, (3,))]
