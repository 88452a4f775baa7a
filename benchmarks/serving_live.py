"""Which replica gets a request, on a running Ray Serve: four replicas of a small model, all policies, and faults.

``python benchmarks/serving_live.py`` writes ``benchmarks/results/serving_live.json``, from it
``docs/evidence/serving_live.md``, and ``runs/serving_live/faults.html``. ``--tables`` makes the pages again from the
JSON. A policy is measured on a server of its own, at every rate, with other prompts at each; all policies see equal
requests. Needs ``equipoise[serve,hf,report]``.
"""

import argparse
import json
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import serving_live_pages
from rich.progress import Progress

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the examples are no part of the package

from equipoise.serving import POLICIES, Costs, ReplaySettings, Request, SkewedWorkload  # noqa: E402
from equipoise.serving.replay import hit_tokens_bound, measured  # noqa: E402
from equipoise.serving.simulator import Outcome  # noqa: E402
from equipoise.training.environment import environment  # noqa: E402
from examples.serving.app import RAY_POLICY  # noqa: E402
from examples.serving.engine import EngineSettings  # noqa: E402
from examples.serving.load import Answer, prompt_text, send  # noqa: E402
from examples.serving.process import ServerProcess  # noqa: E402

REPLICAS, CLIENTS, WARMUP = 4, 3, 40
SHORTER, SHORTER_ANSWERS = 4, 16  # times, than the generated requests
ENGINE = EngineSettings(block_tokens=128, cache_tokens=131_072)
# Prompts of 2,150 tokens on average instead of 8,596, and 8e-5 s per token, doubled where four replicas share two
# cores: the SLO keeps its proportion to the time that a prompt takes, and the longest wait its proportion to the SLO.
ROUTER = {"slo": 1.5, "prefill_seconds": 1.6e-4, "max_wait": 0.9}
FAULT_RATE, FAULT_SECONDS = 2.5, 100
PATIENCE = 4.0  # a hung replica is given up so soon in the fault run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", default=",".join([*POLICIES, RAY_POLICY]))
    parser.add_argument("--rates", default="3.5,5", help="requests per second")
    parser.add_argument("--seconds", type=float, default=30, help="of each measurement, after the warm-up")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--tables", action="store_true", help="only make the pages again")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/serving_live.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/evidence/serving_live.md")
    options = parser.parse_args()
    folder = ROOT / "runs/serving_live"
    folder.mkdir(parents=True, exist_ok=True)
    if not options.tables:
        rates = [float(rate) for rate in options.rates.split(",")]
        found = {"benchmark": "serving_live", "environment": environment(threads=1), "settings": settings()}
        found["runs"] = measure(options.policies.split(","), rates, options.seconds, options.rounds, folder)
        found["faults"] = faults(folder)
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    found = json.loads(options.out.read_text(encoding="utf-8"))
    options.page.write_text(serving_live_pages.tables(found), encoding="utf-8")
    (folder / "faults.html").write_text(serving_live_pages.picture(found["faults"]), encoding="utf-8")


def settings() -> dict[str, Any]:
    return {
        "replicas": REPLICAS,
        "clients": CLIENTS,
        "warmup": WARMUP,
        "shorter": SHORTER,
        "shorter_answers": SHORTER_ANSWERS,
        "engine": asdict(ENGINE),
        "router": ROUTER,
    }


def workload(rate: float, count: int, seed: int) -> list[Request]:
    """Generated requests, shorter; block numbers differ between seeds, so that no prompt is known from before."""
    drawn = SkewedWorkload(num_requests=count, rate=rate, seed=seed).requests()
    return [
        replace(
            request,
            input_tokens=-(-request.input_tokens // SHORTER),
            output_tokens=-(-request.output_tokens // SHORTER_ANSWERS),
            blocks=tuple(block + 10**7 * seed for block in request.blocks),
        )
        for request in drawn
    ]


def calls(requests: list[Request]) -> list[tuple[float, str, int]]:
    return [
        (request.arrival, prompt_text(request, ENGINE.block_tokens, request.input_tokens), request.output_tokens)
        for request in requests
    ]


def measure(policies: list[str], rates: list[float], seconds: float, rounds: int, folder: Path) -> list[dict[str, Any]]:
    """Every policy at every rate; the order of the policies turns around from round to round."""
    runs = []
    with Progress() as bar:
        task = bar.add_task("Policies", total=rounds * len(policies) * len(rates))
        for turn in range(rounds):
            for policy in policies if turn % 2 == 0 else reversed(policies):
                server = ServerProcess(folder / f"{policy}.log", REPLICAS, policy, ENGINE, ROUTER)
                for place, rate in enumerate(rates):
                    requests = workload(rate, WARMUP + round(rate * seconds), 1 + len(rates) * turn + place)
                    load = os.getloadavg()[0]
                    answers = send(server.url, calls(requests), CLIENTS)
                    runs.append({"policy": policy, "rate": rate, "round": turn, "load_before": load})
                    runs[-1] |= worth(requests, answers)
                    bar.advance(task)
                server.close()
    return runs


def worth(requests: list[Request], answers: list[Answer]) -> dict[str, Any]:
    """The figures of a replay, from what the clients saw."""
    lost = [answer for answer in answers if answer.ends != 1 or answer.error]
    assert not lost, f"{len(lost)} requests were lost, the first with: {lost[0].error}"
    sizes = [replace(request, input_tokens=answer.prompt_tokens) for request, answer in zip(requests, answers)]
    outcome = Outcome(
        ttft=[answer.first - answer.due for answer in answers],
        hit_tokens=[answer.cached_tokens for answer in answers],
        served_by=[answer.replicas[0] for answer in answers],
        load_cv=load_cv(answers),
    )
    kept = ReplaySettings(slo=ROUTER["slo"], warmup=WARMUP, costs=Costs(block_tokens=ENGINE.block_tokens))
    found = measured(sizes, outcome, kept, hit_tokens_bound(sizes, ENGINE.block_tokens))
    del found["ttft_percentiles"], found["capacity_over_time"]
    return found


def load_cv(answers: list[Answer]) -> list[float]:
    """At every second at which any prompt was not yet computed: spread of the replicas' such tokens over their mean.

    A prompt counts, with what was not cached, from its arrival to its first token, for the replica that gave it.
    """
    names = sorted({answer.replicas[0] for answer in answers})
    found = []
    for second in range(int(answers[WARMUP].due), int(answers[-1].due)):
        loads = dict.fromkeys(names, 0)
        for answer in answers:
            if answer.due <= second < answer.first:
                loads[answer.replicas[0]] += answer.prompt_tokens - answer.cached_tokens
        if any(loads.values()):
            found.append(statistics.pstdev(loads.values()) / statistics.fmean(loads.values()))
    return found


def faults(folder: Path) -> dict[str, Any]:
    """Replicas die, hang, come and all die, under load; Ray starts new ones by itself."""
    server = ServerProcess(folder / "faults.log", REPLICAS, "dual_map", ENGINE, ROUTER | {"patience": PATIENCE})
    requests = workload(FAULT_RATE, round(FAULT_RATE * FAULT_SECONDS), 99)
    known = {answer.replicas[0] for answer in send(server.url, calls(workload(8.0, 60, 98)), CLIENTS)}
    done: list[tuple[float, str]] = []
    start = time.time() + 1.0
    happens = threading.Thread(
        target=_happen, args=(start, server, known, lambda what: done.append((time.time(), what)))
    )
    happens.start()
    answers = send(server.url, calls(requests), CLIENTS)
    happens.join()
    server.close()
    begin = answers[0].due
    return {
        "rate": FAULT_RATE,
        "patience": PATIENCE,
        "slo": ROUTER["slo"],
        "faults": [{"time": at - begin, "what": what} for at, what in done],
        "answers": [
            {
                "due": round(answer.due - begin, 3),
                "ttft": round(answer.first - answer.due, 3),
                "complete": answer.ends == 1 and len(answer.text) == request.output_tokens and not answer.error,
                "ends": answer.ends,
                "refused": answer.refused,
                "replicas": answer.replicas,
            }
            for request, answer in zip(requests, answers)
        ],
    }


def _happen(start: float, server: ServerProcess, known: set[str], note: Callable[[str], None]) -> None:
    processes = sorted(int(name.split("/")[1]) for name in known)
    one, other = processes[:2]

    def at(seconds: float) -> None:
        time.sleep(max(start + seconds - time.time(), 0.0))

    at(10)
    server.scale(REPLICAS + 1)
    note("a fifth is there")
    at(30)
    os.kill(one, signal.SIGKILL)
    note("one is killed")
    at(45)
    os.kill(other, signal.SIGSTOP)
    note("one hangs")
    at(70)
    for process in server.replica_processes():
        os.kill(process, signal.SIGKILL)
    note("all are killed")


if __name__ == "__main__":
    main()
