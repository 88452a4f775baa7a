import json
import sys

import datasets
import huggingface_hub
import pytest
import torch

from equipoise.errors import UserError
from equipoise.training.batches import TokenSet
from equipoise.training.documents import Document
from equipoise.training.stream import StreamBatches, TextStream, held_out
from equipoise.training.tokenizer import ByteTokenizer

ROWS = [
    {"text": f"row {number}: " + "word " * (number % 7), "domain": "ab"[number % 2], "rank": number}
    for number in range(301)
]


def write(folder, rows, files=2):
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(files):
        lines = (json.dumps(row) + "\n" for row in rows[index::files])
        (folder / f"part{index}.jsonl").write_text("".join(lines))
    return f"hf:{folder}"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write(tmp_path_factory.mktemp("rows"), ROWS)


def batches_of(data, batch_size=6, seq_len=17):
    return StreamBatches(TextStream(data), ByteTokenizer(), batch_size, seq_len)


def read_back(stream, batches, steps):
    """The documents that the batches' windows hold, one after the other, as (text, domain)."""
    token, domain = [], []
    for step in range(steps):
        for token_S1, domain_S1 in zip(*batches.batch(step)):
            assert not token or token[-1] == token_S1[0]  # windows overlap by one token
            skip = bool(token)
            token += token_S1[skip:].tolist()
            domain += domain_S1[skip:].tolist()
    documents, start = [], 0
    while 0 in token[start:]:
        end = token.index(0, start)
        names = {stream.domains[place] for place in domain[start : end + 1]}
        assert len(names) == 1
        documents.append((bytes(token[start:end]).decode(), names.pop()))
        start = end + 1
    return documents


def test_batches_hold_the_stream_without_what_is_held_out(data):
    stream = TextStream(data)
    batches = StreamBatches(stream, ByteTokenizer(), 6, 17)
    order = ROWS[0::2] + ROWS[1::2]  # file after file
    passed = list(stream.read(stream.dataset()))
    assert [(d.text, d.domain) for d in passed] == [(row["text"], row["domain"]) for row in order]
    expected = [(d.text, d.domain) for d in passed if not held_out(d)]
    size = sum(len(text) + 1 for text, _ in expected)
    documents = read_back(stream, batches, size // (6 * 17))
    assert len(documents) > 280
    assert documents == expected[: len(documents)]


def test_one_document_in_fifty_is_held_out(data):
    stream = TextStream(data)
    validation, sample = stream.validation(10**9), stream.sample(10**9)
    assert 1 <= len(validation) <= 14
    assert len(validation) + len(sample) == len(ROWS)
    assert all(map(held_out, validation))
    assert not any(map(held_out, sample))
    assert stream.validation(1) == validation[:1]
    assert stream.sample(100) == sample[: len(stream.sample(100))]
    assert 100 <= sum(len(d.text) for d in stream.sample(100)) < 150
    tokens = TokenSet.build(validation, ByteTokenizer(), tuple(stream.domains))
    assert len(tokens.token_M) == sum(len(d.text) + 1 for d in validation)


def test_the_second_pass_reads_everything_again(data):
    stream = TextStream(data)
    trained = sorted((d.text, d.domain) for d in stream.sample(10**9))
    size = sum(len(text) + 1 for text, _ in trained)
    documents = read_back(stream, StreamBatches(stream, ByteTokenizer(), 6, 17), 2 * size // (6 * 17))
    assert sorted(documents[: len(trained)]) == trained
    assert len(documents) > 1.9 * len(trained)
    assert len(set(documents[len(trained) :])) == len(documents) - len(trained)


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_resuming_equals_going_on(tmp_path, form):
    if form == "parquet":
        (tmp_path / "rows").mkdir()
        for index in range(3):
            table = datasets.Dataset.from_list(ROWS[index::3])
            table.to_parquet(tmp_path / "rows" / f"{index}.parquet", batch_size=13)
        data = f"hf:{tmp_path / 'rows'}"
    else:
        data = write(tmp_path / "rows", ROWS, files=3)
    straight, states, expected = batches_of(data), [], []
    for step in range(125):  # more than one pass
        expected.append(straight.batch(step))
        states.append(json.dumps(straight.state_dict()))
    assert straight.documents > len(ROWS)
    state, stream = states[0], TextStream(data)
    for step in range(1, 125):  # a new start before every step
        resumed = StreamBatches(stream, ByteTokenizer(), 6, 17)
        resumed.load_state_dict(json.loads(state))
        for part, other in zip(resumed.batch(step), expected[step]):
            assert torch.equal(part, other)
        state = json.dumps(resumed.state_dict())
        assert json.loads(state)["documents"] == json.loads(states[step])["documents"]
    for saved in (0, 41, 89, 93, 110):  # a start from the middle
        resumed.load_state_dict(json.loads(states[saved]))
        for step in range(saved + 1, min(saved + 31, 125)):
            assert torch.equal(resumed.batch(step)[0], expected[step][0])


def test_a_position_before_the_first_step(data):
    fresh = batches_of(data)
    state = json.loads(json.dumps(fresh.state_dict()))
    assert state["documents"] == 0
    resumed = batches_of(data)
    resumed.load_state_dict(state)
    assert torch.equal(resumed.batch(0)[0], fresh.batch(0)[0])


def test_validation_while_training_does_not_move_the_stream(data):
    stream = TextStream(data)
    batches, undisturbed = StreamBatches(stream, ByteTokenizer(), 6, 17), batches_of(data)
    for step in range(9):
        assert torch.equal(batches.batch(step)[0], undisturbed.batch(step)[0])
        validation = stream.validation(100)
    assert batches.state_dict()["dataset"] == undisturbed.state_dict()["dataset"]
    batches.load_state_dict(undisturbed.state_dict())
    assert stream.validation(100) == validation


@pytest.mark.parametrize(("micros", "world"), [(2, 3), (3, 1), (1, 6)])
def test_micro_batches_and_ranks_divide_the_same_global_batch(data, micros, world):
    whole = batches_of(data)
    ranks = [batches_of(data) for _ in range(world)]
    for step in range(5):
        parts = [
            ranks[rank].batch(step, micro, micros, rank, world) for micro in range(micros) for rank in range(world)
        ]
        for part, expected in zip(zip(*parts), whole.batch(step)):
            assert torch.equal(torch.cat(part), expected)
    with pytest.raises(UserError, match="global batch of 6 sequences does not divide by 4 micro-batches"):
        whole.batch(5, micros=4)


def test_steps_come_one_after_the_other(data):
    batches = batches_of(data)
    first = batches.batch(0)[0]
    assert torch.equal(batches.batch(0)[0], first)
    with pytest.raises(AssertionError, match="read step by step: 0 cannot be followed by 2"):
        batches.batch(2)
    batches.batch(1)
    resumed = batches_of(data)
    resumed.load_state_dict(batches.state_dict())
    with pytest.raises(AssertionError, match="cannot be read again"):
        resumed.batch(1)


def test_domain_columns(tmp_path):
    rows = [{"text": "one", "source": "web"}, {"text": "two", "source": None}, {"text": " "}, {"text": "t\0ree"}]
    stream = TextStream(write(tmp_path / "mixed", rows, files=1))
    assert [(d.domain, d.text) for d in stream.read(stream.dataset())] == [
        ("web", "one"),
        ("mixed", "two"),
        ("mixed", "tree"),
    ]
    assert stream.domains == ["web", "mixed"]


def test_many_domains_end_in_other(tmp_path):
    rows = [{"text": f"text {number}", "source": f"https://{number % 300}"} for number in range(600)]
    stream = TextStream(write(tmp_path / "pages", rows, files=1))
    domains = [document.domain for document in stream.read(stream.dataset())]
    assert domains == [f"https://{number % 300}" if number % 300 < 255 else "other" for number in range(600)]
    assert len(stream.domains) == 256


def test_split_and_column_can_be_named(tmp_path):
    folder = tmp_path / "named"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"body": "to train", "id": 1}\n')
    (folder / "test.jsonl").write_text('{"body": "to test", "id": 2}\n')
    stream = TextStream(f"hf:{folder}:test:body")
    assert [d.text for d in stream.read(stream.dataset())] == ["to test"]
    with pytest.raises(UserError, match=r"no text in a column 'text' \(its columns of text: body\); name one as hf:"):
        TextStream(f"hf:{folder}")
    with pytest.raises(UserError, match=r"no text in a column 'id'"):
        TextStream(f"hf:{folder}:test:id")
    with pytest.raises(UserError, match=r"with split 'other' cannot be opened \(Bad split: other"):
        TextStream(f"hf:{folder}:other")


@pytest.mark.parametrize("data", ["hf:", "hf:a:b:c:d", "hf:a::c", "a"])
def test_names_that_are_none(data):
    with pytest.raises(UserError, match=f"no data '{data}'; write hf:NAME, hf:NAME:SPLIT or"):
        TextStream(data)


def test_places_without_data(tmp_path):
    with pytest.raises(UserError, match=r"cannot be opened \(Couldn't find any data file at .*\); check its name"):
        TextStream(f"hf:{tmp_path / 'nowhere'}")
    with pytest.raises(UserError, match=r"cannot be opened \(.*; check its name and the connection, or name a folder"):
        TextStream(f"hf:{tmp_path}")
    (tmp_path / "broken.jsonl").write_text("{nothing")
    with pytest.raises(UserError, match="cannot be opened"):
        TextStream(f"hf:{tmp_path}")


def test_a_hub_without_connection(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name in ("nobody/nothing", "nobody/nothing/english"):
        with pytest.raises(
            UserError, match=f"^The data set {name} with split 'train' cannot be opened .*; check its name"
        ):
            TextStream(f"hf:{name}")


def test_a_stream_with_too_little_text(tmp_path):
    texts = [f"text {number}" for number in range(200)]
    held = [{"text": text} for text in texts if held_out(Document("any", "name", text))]
    free = [{"text": text} for text in texts if not held_out(Document("any", "name", text))]
    trained = TextStream(write(tmp_path / "trained", free[:1], files=1))
    with pytest.raises(UserError, match="too small to validate with: one document in 50 is held out"):
        trained.validation(100)
    batches, again = (StreamBatches(trained, ByteTokenizer(), 2, 5) for _ in range(2))
    batches.batch(0)
    again.load_state_dict(batches.state_dict())  # the end of a pass, not of the text
    assert bytes(again.batch(1)[0].flatten().tolist()) == bytes(batches.batch(1)[0].flatten().tolist())
    with pytest.raises(UserError, match="holds no text to train on; name a larger data set"):
        batches_of(write(tmp_path / "held", held[:1], files=1)).batch(0)


def test_a_position_is_for_its_data(data, tmp_path):
    other = write(tmp_path / "other", ROWS[:9])
    batches = batches_of(data)
    batches.batch(0)
    with pytest.raises(
        UserError, match=r"The checkpoint was trained on 'hf:.*, not on 'hf:.*other'; name the same data"
    ):
        batches_of(other).load_state_dict(batches.state_dict())


def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"needs the package datasets: pip install 'equipoise\[hf\]'"):
        TextStream("hf:anything")
