"""A really running Ray Serve: replicas of a small model behind OpenAI's API, clients in processes of their own."""

import asyncio
import json
import os
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray.serve", reason="needs Ray: pip install 'equipoise[serve]'")

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # the examples are no part of the package

from examples.serving.engine import Engine, EngineSettings  # noqa: E402
from examples.serving.load import Answer, send  # noqa: E402
from examples.serving.process import ServerProcess  # noqa: E402

pytestmark = pytest.mark.xdist_group("ray")  # one cluster

ENGINE = EngineSettings(width=64, layers=1, heads=2, block_tokens=16, context_tokens=2048)
PATIENCE = 2.0  # and three more seconds in which a silent replica is asked
READY_SECONDS = 120


class Server(ServerProcess):
    """Three replicas, and what tests ask them."""

    def __init__(self, folder: Path) -> None:
        router = {"slo": 1.0, "prefill_seconds": 2e-4, "max_wait": 0.6, "patience": PATIENCE}
        super().__init__(folder / "log.txt", 3, "dual_map", ENGINE, router, routers=2)

    def processes(self) -> dict[str, int]:
        """The live replicas' processes by name, as their answers name them."""
        found: dict[str, int] = {}
        deadline = time.monotonic() + READY_SECONDS
        while len(found) < 3 and time.monotonic() < deadline:
            name, process = self.chat(f"{uuid.uuid4()} begins unlike the others", 1)["system_fingerprint"].split("/")
            found[name] = int(process)
        return found

    def chat(self, text: str, max_tokens: int, **more: Any) -> dict[str, Any]:
        return self.post({"messages": [{"role": "user", "content": text}], "max_tokens": max_tokens, **more})

    def post(self, body: Any) -> dict[str, Any]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/v1/chat/completions", data)
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)

    def refusal(self, body: Any) -> tuple[int, str]:
        with pytest.raises(urllib.error.HTTPError) as caught:
            self.post(body)
        with caught.value as error:
            return error.code, json.load(error)["error"]["message"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("serve"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def alone() -> Iterator[Engine]:
    """The same model in this process: what every replica must answer."""
    engine = Engine(ENGINE)
    yield engine
    engine.close()


def expected(engine: Engine, text: str, max_tokens: int) -> str:
    async def answer() -> str:
        prompt = f"user\n{text}\n".encode()
        return "".join([chr(token.id) async for token in engine.stream("", prompt, max_tokens)])

    return asyncio.run(answer())


def prompts(count: int, beginnings: int) -> list[str]:
    """So many beginnings of 20 blocks, one after the other, and for each prompt an end of its own."""
    return [f"{place % beginnings:<16}" * 20 + f"{place} Now go on!" + "x" * (place % 97) for place in range(count)]


def test_streamed_or_not_the_answer_is_the_models_and_a_known_beginning_is_cached(server, alone):
    """Of 406 tokens 25 blocks of 16. There are two routers, which may begin with either replica of the pair."""
    text = "Tell me of the sea. " * 20
    answer = expected(alone, text, 23)
    known = set()
    for _ in range(6):
        reply = server.chat(text, 23)
        assert reply["choices"][0]["message"]["content"] == answer
        cached = 400 if reply["system_fingerprint"] in known else 0
        assert reply["usage"] == {
            "prompt_tokens": 406,
            "completion_tokens": 23,
            "prompt_tokens_details": {"cached_tokens": cached},
        }
        known.add(reply["system_fingerprint"])
    assert len(known) <= 2
    [streamed] = send(server.url, [(0.0, text, 23)], processes=1)
    assert (streamed.text, streamed.ends, streamed.error, streamed.cached_tokens) == (answer, 1, "", 400)


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"{", "Expecting"),
        ([], "The request is no JSON object."),
        ({"messages": []}, "messages must be a list of at least one."),
        ({"messages": [{"role": "user"}]}, "Each message must have a role and a content, both text."),
        ({"messages": [{"role": "user", "content": ""}]}, "All messages are empty."),
        ({"messages": [{"role": "user", "content": "x" * 3000}]}, "may have 2048 tokens together, not 3022"),
        (
            {"messages": [{"role": "user", "content": "x"}], "max_tokens": 0},
            "max_tokens must be a whole number of at least 1, not 0",
        ),
        ({"messages": [{"role": "user", "content": "x"}], "max_tokens": None}, "max_tokens must be a whole number"),
        ({"messages": [{"role": "user", "content": "x"}], "temperature": 1}, "temperature must be 0"),
    ],
)
def test_a_bad_request_is_one_sentence_and_status_400(server, body, sentence):
    status, message = server.refusal(body)
    assert status == 400
    assert sentence in message
    assert "\n" not in message


def test_what_begins_alike_stays_with_two_replicas_and_the_rest_uses_all(server):
    """Fewer than would make a router take a longer key."""
    alike = send(server.url, [(0.05 * place, text, 2) for place, text in enumerate(prompts(12, 1))])
    assert len({answer.replicas[0] for answer in alike}) <= 2
    assert sum(answer.cached_tokens for answer in alike) > 0.6 * sum(answer.prompt_tokens for answer in alike)
    different = send(server.url, [(0.02 * place, f"{place} " * 100, 2) for place in range(30)])
    assert len({answer.replicas[0] for answer in different}) == 3


def test_the_next_prompt_is_computed_while_answers_are_still_coming(server):
    """A replica gets it after the first token, not after the last."""
    texts = [f"{'We begin alike. ' * 20}{place}" for place in range(6)]
    answers = send(server.url, [(0.0, text, 400) for text in texts])
    assert max(answer.first for answer in answers) < min(answer.last for answer in answers)


def test_a_client_that_goes_away_leaves_no_load_behind(server):
    """Were its place still taken, the replica, which is sent one prompt at a time, would get no other."""
    for place in range(6):
        body = json.dumps(
            {"messages": [{"role": "user", "content": f"{place} " * 200}], "max_tokens": 1000, "stream": True}
        )
        with socket.create_connection(("localhost", server.port)) as connection:
            connection.sendall(
                f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
            )
            connection.recv(100)
    assert all(answer.ends == 1 for answer in send(server.url, [(0.0, f"{n} " * 50, 3) for n in range(12)]))


def assert_nothing_lost(answers: list[Answer], texts: list[str], tokens: int, engine: Engine) -> None:
    assert [answer.error for answer in answers if answer.error] == []
    assert [answer.ends for answer in answers] == [1] * len(answers)
    for answer, text in zip(answers, texts, strict=True):
        assert answer.text == expected(engine, text, tokens), f"request {answer.id}, by {answer.replicas}"


def used(server: Server, count: int) -> set[int]:
    """The processes that answer so many prompts that begin differently."""
    answers = send(server.url, [(0.01 * place, f"{uuid.uuid4()} " * 3, 2) for place in range(count)])
    return {int(answer.replicas[0].split("/")[1]) for answer in answers}


def test_replicas_that_come_die_and_hang_lose_nothing_and_answer_nothing_twice(server, alone):
    """Three client processes; answers last long enough that some break off, and must go on elsewhere.

    The replica that hangs is let go on when all is answered: what it was asked then comes a second time, too late.
    """
    texts, tokens = prompts(170, 30), 40
    dies, hangs, _ = server.processes().values()

    def faults() -> None:
        server.scale(4)
        os.kill(dies, signal.SIGKILL)
        time.sleep(3)
        os.kill(hangs, signal.SIGSTOP)

    with ThreadPoolExecutor() as pool:
        happened = pool.submit(faults)
        answers = send(server.url, [(0.12 * place, text, tokens) for place, text in enumerate(texts)])
        happened.result()
    assert_nothing_lost(answers, texts, tokens, alone)
    assert Path(f"/proc/{hangs}/stat").read_text().split(") ")[1][0] == "T", "it must not have been needed"
    os.kill(hangs, signal.SIGCONT)
    assert any(hangs in used(server, 30) for _ in range(20))
    assert any(len(used(server, 60)) == 4 for _ in range(20))


def test_without_a_replica_requests_are_refused_with_503_and_the_next_replicas_answer(server, alone):
    """Ray starts new ones by itself."""
    for process in server.processes().values():
        os.kill(process, signal.SIGKILL)
    status, message, wait = 0, "", ""
    while status != 503:
        try:
            server.chat("Is anybody there?", 1)
            for process in server.replica_processes():
                os.kill(process, signal.SIGKILL)
        except urllib.error.HTTPError as error:
            with error:
                status, message, wait = error.code, json.load(error)["error"]["message"], error.headers["retry-after"]
    assert wait == "1"
    assert "No replica of" in message
    assert "try again soon" in message
    text = "And now?"
    [answer] = send(server.url, [(0.0, text, 5)], processes=1)
    assert_nothing_lost([answer], [text], 5, alone)
