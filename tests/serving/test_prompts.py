from hashlib import blake2b
from types import SimpleNamespace

import pytest

from equipoise import UserError
from equipoise.serving.prompts import Prompt, PromptReader

READER = PromptReader(block_tokens=5, bytes_per_token=2.0)


def chained(*parts: bytes) -> tuple[int, ...]:
    numbers, before = [], b""
    for part in parts:
        before = blake2b(before + part, digest_size=8).digest()
        numbers.append(int.from_bytes(before))
    return tuple(numbers)


def test_text_is_cut_into_blocks_of_bytes_each_with_all_before_it():
    """Ten bytes a block; 23 bytes are 11.5 tokens."""
    text = "abcdefghijklmnopqrstuvw"
    prompt = READER.read([{"prompt": text}])
    assert prompt == Prompt(12, chained(b"abcdefghij", b"klmnopqrst", b"uvw"))


def test_equal_beginnings_give_equal_blocks_and_no_others():
    one = READER.read([{"prompt": "0123456789" * 3 + "x"}]).blocks
    other = READER.read([{"prompt": "0123456789" * 2 + "012345678_" + "x"}]).blocks
    assert [a == b for a, b in zip(one, other)] == [True, True, False, False]
    assert len(set(one)) == 4


def test_token_numbers_are_cut_exactly():
    tokens = [7, 11, 13, 17, 19, 23, 29]
    parts = [b"".join(token.to_bytes(4) for token in part) for part in (tokens[:5], tokens[5:])]
    assert READER.read([{"prompt": tokens}]) == Prompt(7, chained(*parts))


def test_several_prompts_are_one():
    assert READER.read([{"prompt": ["abc", "def"]}]) == READER.read([{"prompt": "abcdef"}])
    assert READER.read([{"prompt": [[2, 3], [5]]}]) == READER.read([{"prompt": [2, 3, 5]}])


def test_messages_count_with_their_roles_and_tools_stand_before_them():
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    rendered = "\nsystem\nBe brief.\nuser\nHello"
    assert READER.read([{"messages": messages}]) == READER.read([{"prompt": rendered}])
    tools = [{"name": "search"}]
    assert READER.read([{"messages": messages, "tools": tools}]) == READER.read(
        [{"prompt": '[{"name": "search"}]' + rendered}]
    )


def test_objects_are_read_like_mappings_and_other_arguments_are_passed_over():
    message = SimpleNamespace(role="user", content=[{"type": "text", "text": "Hello"}])
    call = SimpleNamespace(messages=[message], model="any")
    expected = READER.read([{"messages": [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]}])
    assert READER.read([3, None, call]) == expected


def test_calls_of_tools_count_too():
    def blocks(**parts):
        message = {"role": "assistant", "content": None} | parts
        return READER.read([{"messages": [message]}]).blocks

    calls = [blocks(tool_calls=[{"name": name}]) for name in ("search", "delete")]
    assert len({blocks(), *calls, blocks(tool_call_id="1"), blocks(name="Ann")}) == 5


def test_input_is_a_prompt_and_bytes_are_text():
    assert (
        READER.read([{"input": "abcdef"}])
        == READER.read([{"prompt": b"abcdef"}])
        == READER.read([{"prompt": "abcdef"}])
    )


@pytest.mark.parametrize("nothing", [{"prompt": ""}, {"prompt": []}, {"messages": []}, {"input": [""]}])
def test_what_holds_nothing_to_compare_has_no_blocks(nothing):
    assert READER.read([nothing]) == Prompt(1, ())


def test_a_text_that_is_no_unicode_is_still_read():
    assert READER.read([{"prompt": "a\ud800"}]).tokens == 2


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "neither messages nor a prompt"),
        ([{"question": "x"}], "neither messages nor a prompt"),
        ([{"messages": 7}], "messages must be a list, not int"),
        ([{"messages": [{"role": "user", "content": [{1: 2, "a": 3}]}]}], "no JSON value"),
        ([{"prompt": 3.5}], "text or token numbers, not float"),
        ([{"prompt": [-1]}], "from 0 to 2"),
    ],
)
def test_a_call_without_a_prompt_is_refused(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        READER.read(arguments)


@pytest.mark.parametrize("setting", [{"block_tokens": 0}, {"bytes_per_token": 0.0}])
def test_settings_must_be_positive(setting):
    with pytest.raises(UserError, match=f"{next(iter(setting))} must be above 0"):
        PromptReader(**setting)
