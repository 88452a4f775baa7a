"""Text from a decoder, one token at a time."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from equipoise.errors import UserError
from equipoise.models.cache import Cache
from equipoise.models.decoder import Decoder


def generate(
    model: Decoder,
    prompt: Sequence[int],
    num_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[int]:
    """Continue a prompt; each token is handed out as soon as it is drawn.

    The model is in evaluation mode until the last token (or until the iterator is closed), then in its former one.
    There is no limit to the length: past ``model.max_seq_len`` attention's window slides along.

    Args:
        prompt: the token ids to go on from, at least one.
        num_tokens: how many tokens to draw.
        temperature: 0 takes the likeliest token; 1 draws from the model's own distribution.
        top_p: draw from the fewest likeliest tokens that hold at least this probability together; 1 is all of them.
        seed: equal seeds draw equal tokens.
    Fails: UserError for an empty prompt, an unknown token, and values out of range.
    """
    vocab_size = model.embedding.num_embeddings
    if not prompt:
        raise UserError("The prompt is empty; give at least one token to go on from.")
    unknown = next((token for token in prompt if not 0 <= token < vocab_size), None)
    if unknown is not None:
        raise UserError(f"Token {unknown} of the prompt is unknown; this model's tokens are 0 to {vocab_size - 1}.")
    if num_tokens < 0:
        raise UserError(f"num_tokens={num_tokens} is negative; give the number of tokens to draw.")
    if not temperature >= 0:
        raise UserError(f"temperature={temperature} is no temperature; give 0 for the likeliest token, or more.")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p={top_p} is no probability; give a value above 0, up to 1.")
    generator = torch.Generator().manual_seed(seed)
    return _stream(model, list(prompt), num_tokens, partial(_draw, temperature, top_p, generator))


def _stream(model: Decoder, token_S: list[int], num_tokens: int, draw: Callable[[Tensor], int]) -> Iterator[int]:
    """Read the prompt, then draw and read one token after the other."""
    cache = model.cache(batch=1, capacity=len(token_S) + num_tokens)
    was_training = model.training
    model.eval()
    try:
        for _ in range(num_tokens):
            token = draw(_read(model, token_S, cache))
            yield token
            token_S = [token]
    finally:
        model.train(was_training)


@torch.no_grad()
def _read(model: Decoder, token_S: list[int], cache: Cache) -> Float[Tensor, " V"]:
    """Let the model read tokens; its logits for the next one, in fp64 on the CPU."""
    token_BS = torch.tensor([token_S], device=model.embedding.weight.device)
    return model(token_BS, cache)[0, -1].double().cpu()


def _draw(temperature: float, top_p: float, generator: torch.Generator, logit_V: Float[Tensor, " V"]) -> int:
    """Draw one token from the likeliest that hold ``top_p`` together."""
    if temperature == 0:
        return int(logit_V.argmax())
    prob_V, token_V = (logit_V / temperature).softmax(0).sort(descending=True, stable=True)
    prob_V = prob_V.masked_fill(prob_V.cumsum(0) - prob_V >= top_p, 0)
    return int(token_V[torch.multinomial(prob_V, 1, generator=generator)])
