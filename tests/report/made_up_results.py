"""Made-up results of a comparison, consistent with themselves: test data, measured nowhere."""

import math
from typing import Any

import numpy as np

from equipoise.report.results import power

METHODS = {  # name: (change of the loss in nats, spread of the load, how much domains differ, parts' settings)
    "unbalanced": (0.0, 0.9, 0.5, {}),
    "switch": (-0.008, 0.12, 0.25, {"balance_loss.weight": 0.01, "balance_loss.scope": "micro"}),
    "global_batch": (-0.021, 0.06, 0.7, {"balance_loss.weight": 0.008, "balance_loss.scope": "global"}),
    "loss_free": (-0.016, 0.05, 0.8, {"bias.rate": 0.001, "bias.rule": "sign"}),
    "quantile": (-0.018, 0.02, 0.75, {"quantile.bins": 512}),
    "expert_choice": (-0.004, 0.0, 0.6, {"expert_choice.capacity": 1.0}),
}
DOMAINS = {"code": 0.35, "letters": 0.1, "prose": 0.4, "recipes": 0.15}
STEPS, TOKENS_PER_STEP, FLOPS, TOP_K = 600, 2048, 3.1e14, 2
VALIDATION_TOKENS = 65536


def made_up_results(seeds: int = 1, layers: int = 4, experts: int = 16, domains: dict[str, float] = DOMAINS) -> dict:
    """Results of six methods, `seeds` runs each, as `results.json` holds them."""
    results = {
        "environment": {
            "equipoise": "0.1.0",
            "python": "3.11.2",
            "torch": "2.13.0+cpu",
            "device": "cpu",
            "cpu": "an invented processor",
            "threads": 2,
            "platform": "Linux x86_64",
            "date": "2026-01-31T12:00:00+00:00",
            "commit": None,
        },
        "settings": _settings(seeds, layers, experts),
        "budget": {"flops": FLOPS, "minutes": 3.0, "flops_per_second": 3.4e10},
        "data": {
            "source": "default",
            "tokenizer": "bytes",
            "vocab_size": 256,
            "domains": {
                domain: {
                    "train_tokens": round(share * 4_000_000),
                    "validation_tokens": round(share * VALIDATION_TOKENS),
                }
                for domain, share in domains.items()
            },
        },
        "baseline": "unbalanced",
        "runs": [_run(method, seed, layers, experts, domains) for method in METHODS for seed in range(seeds)],
    }
    return results | {"power": power(results)}


def _settings(seeds: int, layers: int, experts: int) -> dict:
    return {
        "model": {"dim": 128, "num_layers": layers, "num_heads": 4, "num_experts": experts, "top_k": TOP_K},
        "data": {"source": "default", "tokenizer": "bytes", "seq_len": 128, "validation_tokens": VALIDATION_TOKENS},
        "optimizer": {"learning_rate": 0.003, "betas": [0.9, 0.95], "batch_size": 16},
        "minutes": 3.0,
        "methods": list(METHODS),
        "baseline": "unbalanced",
        "seeds": seeds,
        "device": "cpu",
        "dtype": "fp32",
    }


def _run(method: str, seed: int, layers: int, experts: int, domains: dict[str, float]) -> dict[str, Any]:
    change, spread, contrast, settings = METHODS[method]
    rng = np.random.default_rng([list(METHODS).index(method), seed])
    noise_of_seed = 0.01 * float(np.random.default_rng(seed).standard_normal())
    loss = 1.62 + change + noise_of_seed + 0.0025 * float(rng.standard_normal())
    per_layer = [_layer(index, rng, spread, contrast, experts, domains) for index in range(layers)]

    def mean(key: str) -> float:
        return float(np.mean([layer[key] for layer in per_layer]))

    curve = _curve(rng, loss, mean("max_vio"), None if method == "unbalanced" else spread)
    return {
        "method": method,
        "seed": seed,
        "steps": STEPS,
        "tokens": STEPS * TOKENS_PER_STEP,
        "flops": FLOPS,
        "loss": loss,
        "perplexity": math.exp(loss),
        "max_vio_global": mean("max_vio"),
        "max_vio_batch": float(np.mean([point["max_vio"] for point in curve[-50:]])),
        "dead_experts": sum(layer["dead_experts"] for layer in per_layer),
        "load_cv": mean("load_cv"),
        "load_entropy": mean("load_entropy"),
        "specialisation": mean("specialisation"),
        "tokens_per_second": 11_000.0 * (1 - spread / 10) + 120 * float(rng.standard_normal()),
        "peak_memory_bytes": 412_000_000 + 1_000_000 * int(rng.integers(30)),
        "causal": method != "expert_choice",
        "notes": ["evaluated with the top_k fall-back"] if method == "expert_choice" else [],
        "settings": settings,
        "kernel": "grouped_mm",
        "per_layer": per_layer,
        "curve": curve,
        "validation": [
            {"step": step, "flops": FLOPS * step / STEPS, "loss": _loss_at(step, loss)}
            for step in range(60, STEPS + 1, 60)
        ],
    }


def _layer(index: int, rng: np.random.Generator, spread: float, contrast: float, experts: int, domains: dict) -> dict:
    rows = VALIDATION_TOKENS * TOP_K
    preference = contrast * rng.standard_normal((len(domains), experts))
    chance = np.exp(preference)
    weight = np.array(list(domains.values()))[:, None]
    wanted = np.exp(spread * rng.standard_normal(experts))
    if spread > 0.5:
        wanted[rng.integers(experts, size=1 + index % 2)] = 0
    wanted *= rows / wanted.sum()
    for _ in range(50):  # alternate scaling: the rows are the domains' tokens, the columns the wanted load
        chance *= wanted / np.maximum((chance * weight).sum(0) * rows, 1e-9)
        chance /= chance.sum(1, keepdims=True)
    counts = np.rint(chance * weight * rows).astype(int)
    load = counts.sum(0)
    share = load / load.sum()
    joint = counts / counts.sum()
    independent = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    used = joint > 0
    information = float((joint[used] * np.log(joint[used] / independent[used])).sum())
    domain_entropy = float(-(joint.sum(1) * np.log(joint.sum(1))).sum())
    return {
        "name": f"layers.{index}.moe",
        "load": load.tolist(),
        "max_vio": float(load.max() / load.mean() - 1),
        "load_cv": float(load.std() / load.mean()),
        "load_entropy": float(-(share[share > 0] * np.log(share[share > 0])).sum() / math.log(experts)),
        "dead_experts": int((load == 0).sum()),
        "specialisation": information / domain_entropy,
        "domain_load": dict(zip(domains, counts.tolist())),
    }


def _loss_at(step: int, final: float) -> float:
    return final + 3.9 * math.exp(-step / 25) + 0.55 * (1 - step / STEPS) ** 1.5


def _curve(rng: np.random.Generator, loss: float, max_vio: float, spread: float | None) -> list[dict]:
    floor = 0.21
    points = []
    for step in range(1, STEPS + 1, 2):
        if spread is None:
            level = 0.6 + (max_vio + 0.2) * (1 - math.exp(-step / 60))
        else:
            level = floor * (spread > 0) + max_vio + 1.4 * math.exp(-step / (15 + 400 * spread))
        points.append(
            {
                "step": step,
                "tokens": step * TOKENS_PER_STEP,
                "flops": FLOPS * step / STEPS,
                "loss": _loss_at(step, loss) - 0.02 + 0.03 * float(rng.standard_normal()),
                "max_vio": max(0.0, level * (1 + 0.1 * float(rng.standard_normal()))),
            }
        )
    return points
