"""Layers that are broken on purpose, and the law that must reject each: the faults that other libraries shipped."""

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from equipoise import MoE, Scores
from equipoise.balancing.bias import Bias
from equipoise.balancing.flat import pack
from equipoise.balancing.window import Window
from laws.cases import E, build
from laws.fault import Fault, breaking


class CountsPadding(MoE):
    def call(self, x, mask):
        return replace(super().call(x, mask), mask_T=None)


class Aside(Window):
    """Counts added up beside the tap."""

    def add(self, statistics):
        aside = vars(self).setdefault("aside", {})
        aside |= {name: aside.get(name, 0) + value for name, value in statistics.items()}

    @property
    def sums(self):
        tapped = super().sums
        return tapped | self.aside if tapped else tapped


class CountsInForward(MoE):
    """Statistics leave with the forward pass, which recomputation repeats."""

    def statistics(self, call, scores, routing):
        found = super().statistics(call, scores, routing)
        self.window.add(found)
        return found


class CountsEveryBackward(MoE):
    """A hook on the weights, which knows no ticket."""

    def statistics(self, call, scores, routing):
        found = super().statistics(call, scores, routing)
        routing.weight_N.register_hook(lambda _: self.window.add(found))
        return found


class LearnsInEvaluation(MoE):
    def forward(self, x, mask=None):
        y = super().forward(x, mask)
        if not self.training:
            self.balancers["bias"].update({"demand_E": self.routing.demand_E()})
        return y


class LearnsAtOnce(Window):
    """The state moves with every micro-batch, before the step."""

    def record(self, *told):
        gradient = super().record(*told)
        self.balancers["bias"].update({"demand_E": self.sums["bias.demand_E"]})
        return gradient


class CountsInBfloat16(Window):
    @property
    def sums(self):
        return {name: value.to(torch.bfloat16).to(value.dtype) for name, value in super().sums.items()}


class DividesByAllTokens(Window):
    """The mean probability over the tokens of the whole window, though the loop takes a mean over micro-batches."""

    def record(self, *told):
        before = self.sums.get("tokens", 0)
        gradient = super().record(*told)
        return gradient * (1 - before / self.sums["tokens"])


class IgnoresTheScale(Window):
    def _scale(self, *told):
        return 1.0


class CountsInABuffer(Window):
    """The demand is added up in a buffer of the layer, where DDP finds it."""

    owner: MoE

    def record(self, *told):
        before = super().sums.get("bias.demand_E", 0)
        gradient = super().record(*told)
        self.owner.counter_E += super().sums["bias.demand_E"] - before
        return gradient

    @property
    def sums(self):
        tapped = super().sums
        return tapped | {"bias.demand_E": self.owner.counter_E} if tapped else tapped


class CastBias(Bias):
    """The bias follows the model's dtype."""

    _apply = nn.Module._apply


class WeighsWithBias(Bias):
    def adjust(self, call, scores):
        choice_TE = scores.choice_TE + self.bias_E
        return Scores(scores.logit_TE, scores.prob_TE, choice_TE, choice_TE)


class OutputTap(torch.autograd.Function):
    """An identity on the output, in whose backward the window is told: the output is an alias of what is below it."""

    @staticmethod
    def forward(ctx, y, anchor, carrier, count, amount, key, layout):
        ctx.save_for_backward(carrier, count, amount, key)
        ctx.layout = layout
        return y.view_as(y)

    @staticmethod
    def backward(ctx, grad):
        carrier, count, amount, key = ctx.saved_tensors
        ticket = torch.zeros((), dtype=torch.int64)
        told = torch.ops.equipoise.tap_backward(grad, carrier, count, amount, ticket, key, ctx.layout)
        return *told, None, None, None, None


class TapsTheOutput(MoE):
    def forward(self, x, mask=None):
        call = self.call(x, mask)
        scores = self.scorer(call)
        routing = self.selector(call, scores)
        told = self.losses(call, scores, routing), self.statistics(call, scores, routing), {}
        (carrier, count, amount), layouts = zip(*(pack(tensors, scores.gate_TE) for tensors in told))
        y_TD = self.experts(call.x_TD, routing)
        y_TD = OutputTap.apply(y_TD, self.window.anchor, carrier, count, amount, self.window.key, ";".join(layouts))
        return y_TD.view(x.shape)


def counts_in_a_buffer(method: str) -> MoE:
    layer = breaking(window=CountsInABuffer)(method)
    layer.register_buffer("counter_E", torch.zeros(E, dtype=torch.int64))
    layer.window.owner = layer
    return layer


def taps_the_output(method: str, **changes: Any) -> MoE:
    return breaking(layer=TapsTheOutput)(method, **changes)


class Pooled:
    """Builds layers that share one window, as if their logits were concatenated."""

    def __init__(self):
        self.window: Window | None = None

    def __call__(self, method: str, **changes: Any) -> MoE:
        layer = build(method, **changes)
        self.window = layer.window = self.window or layer.window
        return layer


FAULTS = {
    "padding is counted": Fault(
        "test_padding.test_padding_changes_nothing", breaking(layer=CountsPadding), {"method": "quantile", "fill": 0.0}
    ),
    "layers are pooled": Fault("test_losses.test_mirrored_layers_score_badly", Pooled(), {"method": "global_batch"}),
    "recomputation doubles the load": Fault(
        "test_counting.test_what_wraps_a_layer_changes_nothing",
        breaking(layer=CountsInForward, window=Aside),
        {"method": "loss_free", "wrap": "non_reentrant"},
    ),
    "every backward counts": Fault(
        "test_counting.test_a_second_backward_is_not_counted",
        breaking(layer=CountsEveryBackward, window=Aside),
        {"method": "loss_free", "wrap": "plain"},
    ),
    "evaluation moves the bias": Fault(
        "test_state.test_evaluation_changes_nothing",
        breaking(layer=LearnsInEvaluation),
        {"method": "loss_free", "grad": True},
    ),
    "the state moves within a window": Fault(
        "test_state.test_selection_state_stands_still_between_steps",
        breaking(window=LearnsAtOnce),
        {"method": "loss_free"},
    ),
    "counters are bf16": Fault(
        "test_counting.test_counts_are_exact", breaking(window=CountsInBfloat16), {"method": "unbalanced"}
    ),
    "the bias is bf16": Fault(
        "test_state.test_state_survives", breaking(bias=CastBias), {"method": "loss_free", "journey": "bfloat16"}
    ),
    "weights are read from biased scores": Fault(
        "test_symmetry.test_weights_ignore_the_selection_state", breaking(bias=WeighsWithBias), {"method": "loss_free"}
    ),
    "the loss is divided by all tokens": Fault(
        "test_foreign_loops.test_every_loop_gives_the_same",
        breaking(window=DividesByAllTokens),
        {"method": "switch", "loop": "accumulation"},
    ),
    "the loss's scale is ignored": Fault(
        "test_foreign_loops.test_every_loop_gives_the_same",
        breaking(window=IgnoresTheScale),
        {"method": "unbalanced", "loop": "scaler"},
    ),
    "the counter is a buffer": Fault(
        "test_ranks.test_accumulation_over_ranks",
        "laws.faults:counts_in_a_buffer",
        {"method": "loss_free", "sync": True, "wrap": "plain"},
    ),
    "the tap is on the output": Fault("test_compiled.test_compiled_keeps_the_tap", "laws.faults:taps_the_output"),
}
for path in sorted(Path(__file__).parent.glob("faults_*.py")):
    FAULTS |= importlib.import_module(f"laws.{path.stem}").FAULTS
