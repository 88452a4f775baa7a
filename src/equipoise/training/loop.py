"""The reference training loop: step, log, validate, save; killed at any moment it continues, on a CPU bit for bit."""

from __future__ import annotations

import json
import math
import resource
import sys
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import torch

from equipoise.balancing.load_stats import load_stats
from equipoise.config import TrainConfig
from equipoise.errors import Interrupted
from equipoise.methods import find
from equipoise.models.decoder import Decoder
from equipoise.training import checkpoint
from equipoise.training.metrics import Metrics, read
from equipoise.training.progress import Progress
from equipoise.training.run import (
    CHECKPOINTS,
    FREE,
    RESULT_FILE,
    agreed_stop,
    claim,
    fingerprint,
    refuse_inexact,
    signals,
    world,
    write_json,
)
from equipoise.training.text import read_text
from equipoise.training.trainer import Trainer

WEIGHTS_FILE = "model.safetensors"


def train(config: TrainConfig) -> dict[str, Any]:
    """Train a decoder and return its result, one entry of the ``runs`` of ``results.json``.

    The folder ``config.out`` gets the resolved configuration, the tokenizer, metrics, checkpoints, the weights and the
    result. Called again with the same configuration it resumes, or returns the finished result.

    Fails: UserError for whatever the user can mend; Interrupted after SIGINT or SIGTERM, when the state is saved.
    """
    config.check()
    with torch.device("meta"):
        Decoder(config.model, vocab_size=256)  # says what is wrong with method and settings before anything is read
    folder = Path(config.out)
    with world(config) as ranks, signals() as received, claim(folder, config, FREE) if ranks.leads else nullcontext():
        if (folder / RESULT_FILE).exists():
            return json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
        text = read_text(config.data, config.optimizer, config.seed)
        with closing(Trainer(config, ranks, text)) as trainer, closing(Run(trainer)) as run:
            with Progress(trainer, shown=ranks.leads) as progress:
                while not trainer.finished:
                    progress.show(run.step())
                    if stop := agreed_stop(received, ranks):
                        run.save()
                        raise Interrupted(stop, folder)
            return run.finish()


class Run:
    """A trainer with its folder: what is logged, validated and saved on the way, and where it resumes."""

    def __init__(self, trainer: Trainer):
        self.trainer, self.config, self.leads = trainer, trainer.config, trainer.ranks.leads
        self.folder = Path(self.config.out)
        self.fingerprint = fingerprint(self.config, trainer.ranks, trainer.text.digest)
        self.validation: list[dict[str, Any]] = []
        self.interval: dict[str, float] = {"loss": 0.0, "max_vio": 0.0, "seconds": 0.0, "steps": 0}
        self._resume()
        if self.leads:
            trainer.text.tokenizer.save(self.folder)
        self.metrics = Metrics(self.folder, trainer.done, self.config.tensorboard) if self.leads else None

    def step(self) -> dict[str, float]:
        """One step, and whatever is due after it."""
        values = self.trainer.step()
        self._log(values)
        if not self.trainer.finished:  # at the end both come anyway
            if self._due(self.config.validate_every):
                self._validate()
            if self._due(self.config.checkpoint_every):
                self.save()
        return values

    def save(self) -> None:
        """Write a checkpoint."""
        trainer = self.trainer
        state = {
            "fingerprint": self.fingerprint,
            "flops": trainer.flops,
            "tokens": trainer.tokens,
            "seconds": trainer.seconds,
            "text": trainer.text.state(),
            "interval": self.interval,
            "validation": self.validation,
        }
        tensors = checkpoint.flatten(trainer.model, trainer.optimizer) | checkpoint.rng_tensors(trainer.ranks.device)
        checkpoint.save(self.folder / CHECKPOINTS, trainer.done, tensors, state, self.config.keep)

    def finish(self) -> dict[str, Any]:
        """Validate, write weights and result, and return the result."""
        evaluation = self._validate()
        trainer, method = self.trainer, find(self.config.model.method)
        curve = list(read(self.folder))
        per_layer = evaluation.per_layer()
        result = {
            "method": method.name,
            "seed": self.config.seed,
            "steps": trainer.done,
            "tokens": trainer.tokens,
            "flops": trainer.flops,
            "loss": evaluation.loss,
            "perplexity": math.exp(evaluation.loss),
            "max_vio_global": _mean(per_layer, "max_vio"),
            "max_vio_batch": _mean(curve[-max(1, len(curve) // 10) :], "max_vio"),
            "dead_experts": sum(layer["dead_experts"] for layer in per_layer),
            "load_cv": _mean(per_layer, "load_cv"),
            "load_entropy": _mean(per_layer, "load_entropy"),
            "specialisation": _mean(per_layer, "specialisation"),
            "tokens_per_second": trainer.tokens / trainer.seconds,
            "peak_memory_bytes": _peak_memory(trainer.ranks.device),
            "causal": not any(layer.looks_ahead for layer in trainer.layers.values()),
            "settings": next(iter(trainer.layers.values())).settings if trainer.layers else {},
            "kernel": next(iter(trainer.layers.values())).experts.kernel_used if trainer.layers else "",
            "text": {
                "tokenizer": self.config.data.tokenizer,
                "vocab_size": trainer.text.tokenizer.vocab_size,
                "digest": trainer.text.digest,
                "domains": trainer.text.tokens,
            },
            "per_layer": per_layer,
            "curve": [{key: point[key] for key in ("step", "tokens", "flops", "loss", "max_vio")} for point in curve],
            "validation": self.validation,
        }
        if self.leads:
            checkpoint.export_weights(trainer.model, self.folder / WEIGHTS_FILE)
            write_json(self.folder / RESULT_FILE, result)
        return result

    def close(self) -> None:
        """Let go of the files."""
        if self.metrics is not None:
            self.metrics.close()

    def _resume(self) -> None:
        trainer, folder = self.trainer, self.folder / CHECKPOINTS
        if checkpoint.latest(folder) is None:
            return
        tensors = checkpoint.flatten(trainer.model, trainer.optimizer) | checkpoint.rng_tensors(trainer.ranks.device)
        loaded = checkpoint.load(folder, tensors, self.config.allow_previous, self.config.allow_inexact)
        for path, reason in loaded.skipped:
            print(f"equipoise: passed over {path.name}: {reason}", file=sys.stderr)
        refuse_inexact(loaded.state["fingerprint"], self.fingerprint, self.config.allow_inexact)
        checkpoint.restore_rng(tensors)
        for layer in trainer.layers.values():
            layer.follow_sparsity()  # the tensors were filled in place
        trainer.done = loaded.step
        trainer.flops, trainer.tokens = loaded.state["flops"], loaded.state["tokens"]
        trainer.seconds = loaded.state["seconds"]
        trainer.text.restore(loaded.state["text"])
        self.interval, self.validation = loaded.state["interval"], loaded.state["validation"]

    def _validate(self) -> Any:
        evaluation = self.trainer.evaluate()
        point = {"step": self.trainer.done, "flops": self.trainer.flops, "loss": evaluation.loss}
        self.validation.append(point)
        return evaluation

    def _log(self, values: dict[str, float]) -> None:
        for name in ("loss", "max_vio", "seconds"):
            self.interval[name] += values[name]
        self.interval["steps"] += 1
        if not (self._due(self.config.log_every) or self.trainer.finished):
            return
        steps = self.interval["steps"]
        record = {
            "step": self.trainer.done,
            "tokens": self.trainer.tokens,
            "flops": self.trainer.flops,
            "loss": self.interval["loss"] / steps,
            "max_vio": self.interval["max_vio"] / steps,
            "learning_rate": values["learning_rate"],
            "gradient_norm": values["gradient_norm"],
            "tokens_per_second": self.trainer.step_tokens * steps / self.interval["seconds"],
        }
        if self.metrics is not None:
            self.metrics.write(record, load_stats(self.trainer.model) if self.trainer.layers else {})
        self.interval = dict.fromkeys(self.interval, 0)

    def _due(self, every: int | None) -> bool:
        return every is not None and self.trainer.done % every == 0


def _mean(records: list[dict[str, Any]], key: str) -> float:
    return sum(record[key] for record in records) / max(1, len(records))


def _peak_memory(device: torch.device) -> int:
    """Bytes at the peak: of the device's tensors on CUDA, of the whole process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
