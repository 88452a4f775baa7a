import asyncio
from contextlib import closing

import pytest
from engine_runs import TINY, Gate, Watch, answer, expect, random_prompt, run, stream

from equipoise.errors import UserError
from examples.serving.engine import Engine, EngineSettings, Token


@pytest.fixture
def engine():
    with closing(Engine(TINY)) as engine:
        yield engine


def test_requests_at_once_get_the_answers_they_get_alone(engine):
    stem = random_prompt(40)
    prompts = [random_prompt(53), [*stem, 1], random_prompt(3), [*stem, 2, 3, 4], random_prompt(30)]

    async def at_once() -> list[list[Token]]:
        return await asyncio.gather(*(stream(engine, prompt, 11 + index) for index, prompt in enumerate(prompts)))

    answers = run(at_once())
    for index, (prompt, tokens) in enumerate(zip(prompts, answers)):
        assert [token.id for token in tokens] == expect(prompt, 11 + index)
    assert [tokens[0].cached_tokens for tokens in answers] == [0, 0, 0, 35, 0]


def test_pending_tokens_and_prefilled_at_every_step(engine):
    shared = random_prompt(23)
    answer(engine, shared, 1)
    gate = Gate(engine)
    first, second = random_prompt(29), shared[:21] + random_prompt(5)

    async def watched() -> list[tuple[int, int, list[str]]]:
        def moment(length: int) -> tuple[int, int, list[str]]:
            stats = engine.stats()
            return length, stats["pending_tokens"], stats["prefilled"]

        tasks = [
            asyncio.create_task(stream(engine, first, 3, "a")),
            asyncio.create_task(stream(engine, second, 2, "b")),
        ]
        await asyncio.sleep(0)
        moments = [moment(await gate.arrival())]
        moments += [moment(await gate.step()) for _ in range(6)]
        gate.open()
        answers = await asyncio.gather(*tasks)
        assert [[token.id for token in tokens] for tokens in answers] == [expect(first, 3), expect(second, 2)]
        return moments

    assert run(watched()) == [
        (11, 29 + 5, []),  # the second prompt's 21 tokens in the cache do not count
        (11, 18 + 5, []),
        (7, 7 + 5, []),
        (1, 5, ["a"]),  # one chunk, then one token of every running answer
        (5, 5, ["a"]),
        (1, 0, ["a", "b"]),
        (1, 0, ["b"]),
    ]
    assert engine.stats() == {"pending_tokens": 0, "prefilled": []}


def test_a_prompt_that_nobody_waits_for_leaves(engine):
    gate = Gate(engine)

    async def cancelled() -> list[Token]:
        gone = asyncio.create_task(stream(engine, random_prompt(29), 3, "gone"))
        stays = asyncio.create_task(stream(engine, random_prompt(8), 2, "stays"))
        await asyncio.sleep(0)
        assert await gate.arrival() == 11
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        assert await gate.step() == 8
        assert engine.stats() == {"pending_tokens": 8, "prefilled": []}
        assert gate.pasts[0].get_seq_length() == 0  # its keys and values are free
        gate.open()
        return await stays

    assert [token.id for token in run(cancelled())] == expect(random_prompt(8), 2)


def test_an_answer_that_nobody_waits_for_stops(engine):
    gate = Gate(engine)

    async def closed() -> list[Token]:
        tokens = engine.stream("gone", random_prompt(8), 100)
        first = asyncio.create_task(anext(tokens))
        assert await gate.arrival() == 8
        assert await gate.step() == 1
        assert (await first).id == expect(random_prompt(8), 1)[0]
        assert engine.stats()["prefilled"] == ["gone"]
        await tokens.aclose()
        stays = asyncio.create_task(stream(engine, random_prompt(9), 2, "stays"))
        await asyncio.sleep(0)
        assert await gate.step() == 9
        assert engine.stats() == {"pending_tokens": 9, "prefilled": []}
        assert gate.pasts[0].get_seq_length() == 0
        gate.open()
        return await stays

    assert [token.id for token in run(closed())] == expect(random_prompt(9), 2)


def test_a_closed_event_loop_does_not_stop_the_others(engine):
    loop = asyncio.new_event_loop()
    tokens = engine.stream("left", random_prompt(8), 200)
    loop.run_until_complete(anext(tokens))
    loop.close()
    assert answer(engine, random_prompt(9), 5)[0] == expect(random_prompt(9), 5)
    assert engine.stats()["prefilled"] == []
    run(tokens.aclose())


@pytest.mark.parametrize(
    ("call", "computed"), [(1, 11), (2, 20), (3, 21)], ids=["first chunk", "last chunk", "second token"]
)
def test_an_error_of_the_model_reaches_its_consumer_alone(engine, call, computed):
    watch, prompts = Watch(engine), [random_prompt(20), random_prompt(40)]

    def fail(*_) -> None:
        if len(watch.computed) == call:
            raise MemoryError("no memory left")

    async def at_once() -> list:
        return await asyncio.gather(*(stream(engine, prompt, 5) for prompt in prompts), return_exceptions=True)

    engine.model.register_forward_pre_hook(fail)
    error, tokens = run(at_once())
    assert (type(error), str(error)) == (MemoryError, "no memory left")
    assert [token.id for token in tokens] == expect(prompts[1], 5)
    assert sum(watch.computed) == computed + 40 + 4  # nothing is tried again
    assert watch.pasts[0].get_seq_length() == 0
    assert engine.stats() == {"pending_tokens": 0, "prefilled": []}
    assert answer(engine, prompts[0], 5)[0] == expect(prompts[0], 5)


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "sentence"),
    [
        ([], 1, "A prompt must have at least one token"),
        ([65, 256], 1, "from 0 to 255"),
        ([-1], 1, "from 0 to 255"),
        ([1.5], 1, "whole numbers"),
        ("text", 1, "whole numbers"),
        ([65], 0, "max_tokens must be at least 1, not 0"),
        ([65] * 200, 12, "may have 211 tokens together, not 212"),
    ],
)
def test_a_prompt_that_cannot_be_answered_is_refused(engine, prompt, max_tokens, sentence):
    watch = Watch(engine)
    with pytest.raises(UserError, match=sentence):
        answer(engine, prompt, max_tokens)
    assert engine.stats() == {"pending_tokens": 0, "prefilled": []}
    assert answer(engine, [65], 1)[1] == 0
    assert watch.computed == [1]


def test_the_longest_prompt_with_its_answer_fits(engine):
    assert answer(engine, random_prompt(200), 11)[0] == expect(random_prompt(200), 11)


def test_closing_ends_the_thread_and_every_answer():
    engine = Engine(TINY)

    async def close_within() -> None:
        tokens = engine.stream("cut", random_prompt(8), 200)
        await anext(tokens)
        waits = asyncio.create_task(stream(engine, random_prompt(9), 200))
        await asyncio.sleep(0)
        engine.close()
        assert not engine._worker.is_alive()
        for rest in (stream_rest(tokens), waits):
            with pytest.raises(UserError, match="closed before the answer was complete"):
                await rest
        with pytest.raises(UserError, match="The engine is closed"):
            await stream(engine, random_prompt(8), 1)

    async def stream_rest(tokens) -> None:
        async for _ in tokens:
            pass

    run(close_within())
    assert engine.stats() == {"pending_tokens": 0, "prefilled": []}
    engine.close()


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ({"width": 0}, "width must be at least 1, not 0"),
        ({"layers": 0}, "layers must be at least 1"),
        ({"heads": 0}, "heads must be at least 1"),
        ({"heads": 3}, "width must be a multiple of 6, twice the heads, not 256"),
        ({"block_tokens": 0}, "block_tokens must be at least 1"),
        ({"cache_tokens": -1}, "cache_tokens must be at least 0"),
        ({"chunk_tokens": 0}, "chunk_tokens must be at least 1"),
        ({"context_tokens": 1}, "context_tokens must be at least 2"),
        ({"seed": -1}, "seed must be at least 0"),
    ],
)
def test_bad_settings_are_refused(setting, sentence):
    with pytest.raises(UserError, match=sentence):
        EngineSettings(**setting)
