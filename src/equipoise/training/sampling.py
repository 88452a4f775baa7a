"""Text from a trained run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_model

from equipoise.config import TrainConfig
from equipoise.errors import UserError
from equipoise.models.decoder import Decoder
from equipoise.models.generation import generate
from equipoise.toml import load
from equipoise.training import tokenizer
from equipoise.training.loop import WEIGHTS_FILE
from equipoise.training.run import CONFIG_FILE
from equipoise.training.tokenizer import Tokenizer


def load_run(folder: Path) -> tuple[Decoder, Tokenizer]:
    """The trained model, in evaluation mode, and its tokenizer. Fails: UserError where the run is not finished."""
    weights = folder / WEIGHTS_FILE
    if not weights.exists():
        raise UserError(f"{folder} holds no finished run ({WEIGHTS_FILE} is missing); finish `equipoise train` first.")
    config = load(TrainConfig, folder / CONFIG_FILE)
    encoder = tokenizer.load(folder)
    model = Decoder(config.model, encoder.vocab_size, max_seq_len=config.data.seq_len)
    try:
        load_model(model, weights)  # knows weights that layers share, which the file holds once
    except (SafetensorError, RuntimeError) as error:
        reason = str(error).partition("\n")[0].rstrip(":. ")
        raise UserError(f"{weights} does not hold this model's weights ({reason}); train it again.") from error
    return model.eval(), encoder


def continue_text(
    folder: Path, prompt: str, num_tokens: int, temperature: float, top_p: float, seed: int
) -> Iterator[str]:
    """Continue a prompt piece by piece; a character whose bytes are not complete yet waits for them.

    Fails: UserError as in ``load_run`` and ``generate``, before the first piece.
    """
    model, encoder = load_run(folder)
    prompt_ids = [tokenizer.SEPARATOR, *encoder.encode(prompt).tolist()]
    return _pieces(encoder, generate(model, prompt_ids, num_tokens, temperature, top_p, seed))


def _pieces(encoder: Tokenizer, tokens: Iterator[int]) -> Iterator[str]:
    """The text of tokens, in pieces."""
    ids: list[int] = []
    shown = ""
    for token in tokens:
        ids.append(token)
        text = encoder.decode(ids).rstrip("\N{REPLACEMENT CHARACTER}")
        yield text[len(shown) :]
        shown = text
