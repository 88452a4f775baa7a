"""One run's state between two steps, and the step that moves it."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from equipoise.balancing.attach import attach
from equipoise.balancing.balanced import balanced_layers
from equipoise.config import TrainConfig
from equipoise.contracts import NonFiniteError
from equipoise.errors import UserError
from equipoise.models.decoder import Decoder, loss
from equipoise.training.evaluation import Evaluation, evaluate
from equipoise.training.flops import Ledger
from equipoise.training.run import World, precision
from equipoise.training.schedule import learning_rate
from equipoise.training.text import Text

LARGEST_LOSS = math.log(sys.float_info.max)


class Trainer:
    """A decoder in training.

    Attributes:
        done: steps so far.
        flops: spent so far over all ranks, by the ledger, with the rows that experts really computed.
        tokens: trained on so far.
        seconds: spent in steps so far.
    """

    def __init__(self, config: TrainConfig, ranks: World, text: Text):
        self.config, self.ranks, self.text = config, ranks, text
        torch.manual_seed(config.seed)
        self.model = Decoder(config.model, text.tokenizer.vocab_size).to(ranks.device)
        self.layers = balanced_layers(self.model)
        self.parallel: Any = DistributedDataParallel(self.model) if ranks.size > 1 else self.model
        self.optimizer = _optimizer(self.model, config)
        self.handle = attach(self.model, self.optimizer) if self.layers else None
        self.ledger = Ledger.of(self.model, config.data.seq_len)
        self.step_tokens = config.optimizer.batch_size * config.data.seq_len
        self.done, self.flops, self.tokens, self.seconds = 0, 0, 0, 0.0
        self._refuse_unevaluable()

    @property
    def steps(self) -> int:
        """Steps of the whole run; an estimate where the budget is in FLOPs and rows may be dropped."""
        if self.config.steps is not None:
            return self.config.steps
        assert self.config.flops is not None
        return max(1, self.ledger.steps(self.config.flops - self.flops, self.step_tokens, self.done))

    @property
    def finished(self) -> bool:
        """Whether the budget is spent, to the nearest whole step."""
        return self.done >= self.steps

    def step(self) -> dict[str, float]:
        """One optimizer step.

        Returns:
            loss (nats per token), max_vio (mean over layers), learning_rate, gradient_norm, seconds.
        Fails: UserError for a loss, gradient or logit that is not finite; the weights are those before the step.
        """
        start = time.perf_counter()
        rate = learning_rate(self.config.optimizer, (self.done + 1) / self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        micros = self.config.optimizer.grad_accumulation
        step_loss = torch.stack([self._micro_batch(micro, micros) for micro in range(micros)]).sum()
        parameters = list(self.model.parameters())
        norm = nn.utils.get_total_norm([weight.grad for weight in parameters if weight.grad is not None])
        value = self._mean_over_ranks(step_loss)
        self._refuse_nonfinite(value, float(norm))
        nn.utils.clip_grads_with_norm_(parameters, self.config.optimizer.clip, norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.done += 1
        self.tokens += self.step_tokens
        seconds = time.perf_counter() - start
        self.seconds += seconds
        return {
            "loss": value,
            "max_vio": self._max_vio(),
            "learning_rate": rate,
            "gradient_norm": float(norm),
            "seconds": seconds,
        }

    def _micro_batch(self, micro: int, micros: int) -> Tensor:
        """Forward and backward of one micro-batch; returns its share of the step's loss."""
        token_BS, _ = self.text.train.batch(self.done, micro, micros, self.ranks.rank, self.ranks.size)
        token_BS = token_BS.to(self.ranks.device, non_blocking=True)
        accumulates = self.ranks.size > 1 and micro < micros - 1
        with self.parallel.no_sync() if accumulates else contextlib.nullcontext():
            with precision(self.config, self.ranks.device), self._naming_layers(self.done + 1):
                micro_loss = loss(self.parallel(token_BS[:, :-1]), token_BS[:, 1:])
            scaled = (micro_loss if self.handle is None else self.handle.follow(micro_loss)) / micros
            scaled.backward()
        rows = [
            int(layer.routing.load_E[: layer.num_experts].sum())
            for layer in self.layers.values()
            if layer.routing is not None
        ]
        self.flops += self._sum_over_ranks(self.ledger.step_flops(token_BS[:, 1:].numel(), rows).total)
        return scaled.detach()

    def close(self) -> None:
        """Let go of DDP while its process group stands: a reducer that outlives the group can wait for ever.

        It would join gloo's thread while it holds the interpreter's lock, which that thread may need.
        """
        self.parallel = None

    def evaluate(self) -> Evaluation:
        """One pass over the validation text, on every rank alike.

        Fails: UserError for logits or a loss that are not finite, or a loss whose perplexity is too large for a float.
        """
        device, text = self.ranks.device, self.text
        with self._naming_layers(self.done):
            found = evaluate(self.model, text.validation, text.domains, device, precision(self.config, device))
        if not found.loss < LARGEST_LOSS:
            raise UserError(f"Step {self.done}: the validation loss is {found.loss:g}; lower the learning rate.")
        return found

    def _refuse_unevaluable(self) -> None:
        """Say before the training, not after it, that a method will not be evaluated left to right."""
        self.model.eval()
        with torch.no_grad():
            self.model(torch.zeros(1, 2, dtype=torch.int64, device=self.ranks.device))
        self.model.train()

    def _refuse_nonfinite(self, value: float, norm: float) -> None:
        for what, number in (("the loss", value), ("the gradient's norm", norm)):
            if not math.isfinite(number):
                raise UserError(
                    f"Step {self.done + 1}, {self._broken_place()}: {what} is {number}; lower the learning rate."
                )

    def _broken_place(self) -> str:
        """Where a step broke: the first layer whose router's logits are not finite, or else where gradients broke."""
        for name, layer in self.layers.items():
            if layer.logit_total is not None and not layer.logit_total.isfinite():
                return f"layer {name}"
        # Backward runs from the last layer to the first, so what broke first stands last.
        gradients = {name: weight.grad for name, weight in self.model.named_parameters() if weight.grad is not None}
        largest = {name: float(grad.abs().nan_to_num(math.inf, math.inf).max()) for name, grad in gradients.items()}
        return f"gradient of {max(reversed(largest), key=largest.__getitem__)}"

    @contextlib.contextmanager
    def _naming_layers(self, step: int) -> Iterator[None]:
        try:
            yield
        except NonFiniteError as error:
            name = next(name for name, layer in self.layers.items() if layer is error.layer)
            raise UserError(f"Step {step}, layer {name}: {error}") from error

    def _max_vio(self) -> float:
        """The step's MaxVio over all ranks, averaged over the layers."""
        loads = [layer.window.last["demand_E"][: layer.num_experts].double() for layer in self.layers.values()]
        return sum(float(load_E.max() / load_E.mean().clamp(min=1e-9)) - 1 for load_E in loads) / max(1, len(loads))

    def _sum_over_ranks(self, value: int) -> int:
        if self.ranks.size == 1:
            return value
        total = torch.tensor(value, dtype=torch.int64, device=self.ranks.device)
        dist.all_reduce(total)
        return int(total)

    def _mean_over_ranks(self, value: Tensor) -> float:
        if self.ranks.size > 1:
            value = value.double()
            dist.all_reduce(value)
            value = value / self.ranks.size
        return float(value)


def _optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW; matrices decay, norms do not."""
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    vectors = [weight for weight in model.parameters() if weight.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": config.optimizer.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.optimizer.learning_rate, betas=config.optimizer.betas, fused=True)
