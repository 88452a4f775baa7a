"""OpenAI's API before replicas of a small language model, on Ray Serve, with a router of Equipoise between."""

import os
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from ray import serve
from ray.exceptions import RayTaskError
from ray.serve.config import RequestRouterConfig

from equipoise.errors import UserError
from equipoise.serving.ray_config import router_config
from equipoise.serving.ray_errors import NoReplicasError
from equipoise.serving.unbroken import LOST, unbroken
from examples.serving import openai_api
from examples.serving.engine import Engine, EngineSettings

APPLICATION = "equipoise-example"  # in Ray
RAY_POLICY = "power_of_two"  # Ray Serve's own router
api = FastAPI()


@serve.deployment(max_ongoing_requests=64, ray_actor_options={"num_cpus": 0})
class Replica:
    """One copy of the model, with its own prefix cache."""

    def __init__(self, settings: EngineSettings) -> None:
        self._engine = Engine(settings)
        self._name = serve.get_replica_context().replica_id.unique_id

    async def answer(self, call: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Tokens after ``call["prompt"]``, at most ``call["max_tokens"]``."""
        async for token in self._engine.stream(call["key"], call["prompt"], call["max_tokens"]):
            yield {"token": token.id, "cached": token.cached_tokens, "replica": self._name, "pid": os.getpid()}

    def record_routing_stats(self) -> dict[str, Any]:
        """Called by Ray now and then; all routers learn it."""
        return self._engine.stats()


@serve.deployment(max_ongoing_requests=10_000, ray_actor_options={"num_cpus": 0})
@serve.ingress(api)
class Ingress:
    """OpenAI's API. It holds the router, and goes on elsewhere when a replica is lost."""

    def __init__(self) -> None:
        self._replicas = serve.get_app_handle(APPLICATION).options(stream=True)

    @api.post("/v1/chat/completions")
    async def chat(self, request: Request) -> Response:
        """A chat completion, streamed or in one piece."""
        try:
            body = await request.json()
            prompt, max_tokens = openai_api.prompt(body), openai_api.max_tokens(body)
            tokens = self._tokens(prompt, max_tokens)
            first = await anext(tokens)
            streamed = body.get("stream")
            rest = [] if streamed else [token async for token in tokens]
        except RayTaskError as error:
            if isinstance(error.cause, UserError):
                return openai_api.error(400, str(error.cause))
            raise
        except (UserError, ValueError) as error:
            return openai_api.error(400, str(error))
        except (NoReplicasError, *LOST) as error:
            return openai_api.error(503, str(error), {"retry-after": "1"})
        if streamed:
            return StreamingResponse(openai_api.events(first, tokens, len(prompt)), media_type="text/event-stream")
        answer = [first, *rest]
        text = "".join(chr(token["token"]) for token in answer)
        return JSONResponse(
            openai_api.message("chat.completion", {"message": {"role": "assistant", "content": text}}, "length")
            | openai_api.usage(first, len(prompt), len(answer))
        )

    @api.get("/v1/models")
    async def models(self) -> dict[str, Any]:
        """What is served."""
        return {"object": "list", "data": [{"id": openai_api.MODEL, "object": "model"}]}

    def _tokens(self, prompt: list[int], max_tokens: int) -> AsyncIterator[dict[str, Any]]:
        async def ask(sofar: Sequence[dict[str, Any]]) -> AsyncIterator[dict[str, Any]]:
            if len(sofar) == max_tokens:
                return  # the replica was lost after the last token
            call = {
                "key": uuid.uuid4().hex,
                "prompt": prompt + [token["token"] for token in sofar],
                "max_tokens": max_tokens - len(sofar),
            }
            tokens = self._replicas.answer.remote(call)
            try:
                async for token in tokens:
                    yield token
            finally:
                tokens.cancel()

        return unbroken(ask)


def run_model(replicas: int, policy: str, engine: EngineSettings, router: dict[str, Any]) -> None:
    """Run so many replicas, or change their number; those that run go on.

    Args:
        policy: of Equipoise; or power_of_two, Ray Serve's own.
        router: settings of the router, such as ``slo``, ``prefill_seconds`` and ``patience``.
    """
    config = RequestRouterConfig()
    if policy != RAY_POLICY:
        config = router_config(
            policy=policy, block_tokens=engine.block_tokens, cache_tokens=engine.cache_tokens, **router
        )
    model = Replica.options(num_replicas=replicas, request_router_config=config)
    model._version = "1"  # a new one each time, as Ray would give it, replaces all replicas one after the other
    serve.run(model.bind(engine), name=APPLICATION, route_prefix=None)
