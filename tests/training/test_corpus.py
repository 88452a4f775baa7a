import hashlib
import json

import pytest

from equipoise.errors import UserError
from equipoise.training import cache, corpus, default_corpus
from equipoise.training.documents import Document, cut


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def texts(documents):
    return [document.text for document in documents]


def prose_of(size, seed):
    """Paragraphs of words that are the same in every run."""
    words, number = [], 0
    while sum(map(len, words)) < size:
        number += 1
        words.append(hashlib.sha256(f"{seed} {number}".encode()).hexdigest() * 3 + "\n\n")
    return "".join(words)


def test_load_keeps_the_default_corpus(monkeypatch):
    built = [Document("c", "a.h", "int f();"), Document("prose", "b", "Gr\u00fc\u00dfe\r\n")]
    monkeypatch.setattr(default_corpus, "build", lambda: built)
    assert corpus.load("default") == built
    monkeypatch.setattr(default_corpus, "build", lambda: pytest.fail("not taken from the cache"))
    assert corpus.load("default") == built


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-100],
        lambda text: text.replace("def ", "fed ", 1),
        lambda text: "[]",
        lambda text: '{"sha256": 3, "documents": null}',
        lambda text: "\x00",
    ],
)
def test_a_damaged_cache_is_built_anew(damage, monkeypatch):
    right = [Document("python", "a.py", "def f(): pass"), Document("c", "a.h", "int f();")]
    monkeypatch.setattr(default_corpus, "build", lambda: right)
    corpus.load("default")
    (file,) = cache.folder().iterdir()
    whole = file.read_text()
    file.write_text(damage(whole))
    assert corpus.load("default") == right
    assert file.read_text() == whole


def test_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    assert cache.folder() == tmp_path / "cache" / "equipoise"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.folder() == tmp_path / "home" / ".cache" / "equipoise"


def test_a_cache_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot be written .* set XDG_CACHE_HOME"):
        cache.write(tmp_path / "file" / "sub" / "name", "text")


def test_a_text_file_is_cut_at_blank_lines(tmp_path):
    text = prose_of(50_000, "cut")
    (tmp_path / "novel.txt").write_text("\ufeff" + text, encoding="utf-8")
    documents = corpus.load(str(tmp_path / "novel.txt"))
    assert {d.domain for d in documents} == {"novel"}
    assert "".join(texts(documents)) == text
    assert len(documents) > 5
    for document in documents[:-1]:
        assert 4_000 <= len(document.text) <= 16_000
        assert document.text.endswith("\n\n")


def test_cut_of_long_paragraphs_and_lines():
    lines = ("a" * 79 + "\n") * 500
    assert [len(piece) for piece in cut(lines)] == [16_000, 16_000, 8_000]
    assert [len(piece) for piece in cut("b" * 33_333)] == [16_000, 16_000, 1_333]
    odd = ("c" * 96 + "\n") * 300
    assert [len(piece) % 97 for piece in cut(odd)] == [0, 0]
    assert "".join(cut(odd)) == odd


def test_jsonl_lines_are_documents(tmp_path):
    path = tmp_path / "mixed.jsonl"
    rows = [{"text": "one"}, {"text": "two\u2028lines", "domain": "letters"}, {"text": "  "}]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n", encoding="utf-8")
    documents = corpus.load(str(path))
    assert [(d.domain, d.name, d.text) for d in documents] == [
        ("mixed", "mixed.jsonl:1", "one"),
        ("letters", "mixed.jsonl:2", "two\u2028lines"),
    ]


def test_each_sub_folder_is_a_domain(tmp_path):
    for name, text in {
        "top.txt": "top",
        "english/a.txt": "hello",
        "english/deep/b.md": "world",
        "french/c.jsonl": '{"text": "monde"}',
        "french/empty.txt": "",
        ".git/config": "hidden",
        "english/.swap": "hidden",
    }.items():
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    documents = corpus.load(str(tmp_path / "data"))
    assert sorted((d.domain, d.text) for d in documents) == [
        ("data", "top"),
        ("english", "hello"),
        ("english", "world"),
        ("french", "monde"),
    ]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", r"file .*x\.txt is empty; name a file with text"),
        (b" \n\n ", r"is empty"),
        (b"text\0more", r"x\.txt is not UTF-8 text; save it as UTF-8, leave it out"),
        (b"\xff\xfe\x00a", r"x\.txt is not UTF-8 text"),
        (b"caf\xe9", r"x\.txt is not UTF-8 text"),
    ],
)
def test_files_that_are_no_text(tmp_path, content, sentence):
    (tmp_path / "x.txt").write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        corpus.load(str(tmp_path / "x.txt"))


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '"text"',
        "{}",
        '{"text": 3}',
        '{"text": "a\\u0000b"}',
        '{"text": "\\ud800"}',
        '{"text": "a", "domain": 5}',
        "[" * 100_000,
    ],
)
def test_a_bad_jsonl_line_is_named(tmp_path, line):
    (tmp_path / "x.jsonl").write_text(f'{{"text": "fine"}}\n{line}\n')
    with pytest.raises(UserError, match=r"x\.jsonl, line 2: a line of a \.jsonl file must be .* mend or remove"):
        corpus.load(str(tmp_path / "x.jsonl"))


def test_places_without_text(tmp_path):
    with pytest.raises(UserError, match="no file or folder '/nowhere/at/all'; data is 'default', a text or"):
        corpus.load("/nowhere/at/all")
    (tmp_path / "blank.txt").write_text("\n")
    with pytest.raises(UserError, match="has no text files; put UTF-8 text"):
        corpus.load(str(tmp_path))


def some(count, domain="d"):
    return [Document(domain, str(number), f"{domain} text {number}") for number in range(count)]


def test_split_is_by_content_and_stays():
    documents = some(400)
    train, validation = corpus.split(documents, 0.1)
    assert sorted(texts(train + validation)) == sorted(texts(documents))
    assert 25 <= len(validation) <= 55  # 40, and 2.5 times the deviation of 6
    more_train, more_validation = corpus.split(some(800), 0.1)
    assert set(texts(train)) <= set(texts(more_train))
    assert set(texts(validation)) <= set(texts(more_validation))


@pytest.mark.parametrize("validation", [0.001, 0.999])
def test_every_domain_is_on_both_sides(validation):
    documents = some(2, "two") + some(7, "seven") + some(1, "one")
    sides = corpus.split(documents, validation)
    domains = [{d.domain for d in side} for side in sides]
    assert domains == [{"two", "seven", "one"}, {"two", "seven"}]
    assert len(sides[0] + sides[1]) == 10


def test_the_same_text_is_on_one_side():
    documents = some(30) + [Document("other", "copy", d.text) for d in some(30)] + some(30)
    train, validation = corpus.split(documents, 0.3)
    assert not set(texts(train)) & set(texts(validation))
    assert len(train) + len(validation) == 90


def test_split_refuses_what_cannot_be_split():
    with pytest.raises(UserError, match="The corpus is a single document, so nothing can be held out"):
        corpus.split(some(1))
    for share in (0.0, 1.0, -3.0):
        with pytest.raises(UserError, match=f"must be above 0 and below 1, not {share}"):
            corpus.split(some(9), share)
