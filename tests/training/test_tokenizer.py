import json
import subprocess
import sys

import numpy as np
import pytest

from equipoise.errors import UserError
from equipoise.training import tokenizer
from equipoise.training.documents import Document
from equipoise.training.tokenizer import BPETokenizer, ByteTokenizer

STRANGE = "Grüße, 世界! \t\n  two  spaces <|end|> and \U0001f600 end\r\n"
DOCUMENTS = [Document("d", str(n), f"the cat number {n} sat on the mat; the mat was flat") for n in range(23)]


@pytest.fixture(scope="module")
def bpe():
    return BPETokenizer.train(DOCUMENTS, 283)


def test_bytes_are_utf8():
    ids = ByteTokenizer().encode("aé")
    assert ids.tolist() == [97, 195, 169]
    assert ids.dtype == np.uint16
    assert ByteTokenizer().decode([97, 195, 169, 195]) == "aé\ufffd"
    assert ByteTokenizer().vocab_size == 256


@pytest.mark.parametrize("text", [STRANGE, "", "the cat sat", " ", "a\n\n\nb"])
def test_text_comes_back(bpe, text):
    for encoder in (ByteTokenizer(), bpe):
        assert encoder.decode(encoder.encode(text)) == text
        assert 0 not in encoder.encode(text)


def test_bytes_refuse_the_separator():
    with pytest.raises(UserError, match="holds the character NUL, which separates documents; remove it"):
        ByteTokenizer().encode("a\0b")


def test_bpe_joins_frequent_pairs(bpe):
    assert (bpe.vocab_size, bpe.name) == (283, "bpe:283")
    assert len(bpe.encode("the cat sat on the mat")) == 6
    assert bpe.encode("").dtype == np.uint16
    assert bpe.decode([0]) == "<|end|>"
    assert "\ufffd" in bpe.decode(bpe.encode("世")[:1])


def test_a_small_text_gives_a_smaller_vocabulary():
    encoder = BPETokenizer.train(DOCUMENTS[:1], 5_000)
    assert 257 < encoder.vocab_size < 400
    assert encoder.name == f"bpe:{encoder.vocab_size}"


def test_large_vocabularies_have_wider_ids(bpe):
    vocab = json.loads(bpe._tokenizer.to_str())["model"]["vocab"]
    extra = {f"token {number}": number for number in range(len(vocab), 70_000)}
    assert BPETokenizer(vocab | extra, []).encode("cat").dtype == np.uint32


def test_bpe_is_the_same_in_another_process(bpe, tmp_path):
    bpe.save(tmp_path / "here")
    code = (
        "from equipoise.training.documents import Document; from equipoise.training.tokenizer import BPETokenizer;"
        f"import pathlib; BPETokenizer.train({DOCUMENTS!r}, 283).save(pathlib.Path({str(tmp_path / 'there')!r}))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert (tmp_path / "there/tokenizer.json").read_text() == (tmp_path / "here/tokenizer.json").read_text()


def test_save_and_load(bpe, tmp_path):
    for encoder in (ByteTokenizer(), bpe):
        encoder.save(tmp_path / encoder.name)
        loaded = tokenizer.load(tmp_path / encoder.name)
        assert type(loaded) is type(encoder)
        assert (loaded.name, loaded.vocab_size) == (encoder.name, encoder.vocab_size)
        assert loaded.encode(STRANGE).tolist() == encoder.encode(STRANGE).tolist()
        assert loaded.decode(loaded.encode(STRANGE)) == STRANGE


def changed(**parts):
    def change(document):
        return document | {"model": document["model"] | parts}

    return change


@pytest.mark.parametrize(
    "damage",
    [
        lambda document: [],
        lambda document: {"model": 3},
        lambda document: {},
        changed(vocab=[]),
        changed(vocab={}),
        changed(merges=[["a", "nowhere"]]),
        changed(merges=[["a", "q"]]),
        changed(merges=["a b c"]),
        changed(merges=[[["a"], ["b"]]]),
        changed(merges=7),
        lambda document: changed(vocab=dict.fromkeys(document["model"]["vocab"], 1))(document),
        lambda document: changed(vocab=document["model"]["vocab"] | {"<|end|>": 1, "!": 0})(document),
        lambda document: changed(vocab=document["model"]["vocab"] | {"extra": 10**9})(document),
        lambda document: changed(vocab=document["model"]["vocab"] | {"!": "1"})(document),
        lambda document: changed(
            vocab={("xx" if token == "q" else token): id for token, id in document["model"]["vocab"].items()}
        )(document),
    ],
)
def test_a_damaged_tokenizer_is_refused(bpe, tmp_path, damage):
    bpe.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(damage(json.loads(file.read_text()))))
    with pytest.raises(UserError, match=r"tokenizer\.json is absent, damaged or not a tokenizer of ours; name"):
        tokenizer.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\x00", b"[" * 100_000])
def test_a_file_that_is_no_json_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match="absent, damaged or not a tokenizer"):
        tokenizer.load(tmp_path)


def test_only_vocabulary_and_merges_are_taken_from_a_file(bpe, tmp_path):
    bpe.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"normalizer": {"type": "Lowercase"}}))
    assert tokenizer.load(tmp_path).decode(tokenizer.load(tmp_path).encode("ABC")) == "ABC"


def test_build_by_name(tmp_path, monkeypatch):
    assert tokenizer.build("bytes", DOCUMENTS, tmp_path).name == "bytes"
    assert tokenizer.build("bpe:271", DOCUMENTS, tmp_path).vocab_size == 271
    monkeypatch.setattr(BPETokenizer, "train", lambda *_: pytest.fail("not taken from the cache"))
    assert tokenizer.build("bpe:271", DOCUMENTS, tmp_path).vocab_size == 271


def test_the_cache_is_for_one_size_and_one_text(tmp_path):
    for name, documents in [("bpe:271", DOCUMENTS), ("bpe:277", DOCUMENTS), ("bpe:271", DOCUMENTS[:5])]:
        tokenizer.build(name, documents, tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_damaged_cache_is_trained_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tokenizer.build("bpe:271", DOCUMENTS)
    (file,) = tmp_path.glob("equipoise/*/tokenizer.json")
    whole = file.read_text()
    file.write_text(whole[:900])
    assert tokenizer.build("bpe:271", DOCUMENTS).vocab_size == 271
    assert file.read_text() == whole


@pytest.mark.parametrize("name", ["words", "bpe", "bpe:256", "bpe:-3", "bpe:4096x", "bpe:99999999", ""])
def test_other_names_are_refused(tmp_path, name):
    with pytest.raises(UserError, match=f"no tokenizer '{name}'; name 'bytes', or 'bpe:4096'"):
        tokenizer.build(name, DOCUMENTS, tmp_path)


def test_without_the_extra(tmp_path, monkeypatch, bpe):
    bpe.save(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    for attempt in (lambda: tokenizer.build("bpe:300", DOCUMENTS, tmp_path), lambda: tokenizer.load(tmp_path)):
        with pytest.raises(UserError, match=r"pip install 'equipoise\[hf\]'"):
            attempt()
