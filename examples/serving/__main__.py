"""A small language model behind OpenAI's API on Ray Serve, its requests routed by a policy of Equipoise.

    python -m examples.serving --replicas 4 --policy dual_map
    curl localhost:8000/v1/chat/completions \\
        -d '{"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 16, "stream": true}'

Type a number of replicas while it runs, and it runs so many; an empty line, or the end of input, ends it. The model's
weights are random: what it says is noise, what it costs to compute is real.
"""

import argparse
import json
import sys

import ray
from ray import serve

from examples.serving.app import Ingress, run_model
from examples.serving.engine import EngineSettings


def main() -> None:
    """Serve until the input ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--policy", default="dual_map")
    parser.add_argument("--routers", type=int, default=1)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--router", type=json.loads, default={}, help="settings of the router, as JSON")
    parser.add_argument("--engine", type=json.loads, default={}, help="settings of the model, as JSON")
    options = parser.parse_args()
    ray.init(num_cpus=1, include_dashboard=False, logging_level="warning")
    serve.start(http_options={"port": options.port})
    engine = EngineSettings(**options.engine)

    run_model(options.replicas, options.policy, engine, options.router)
    serve.run(Ingress.options(num_replicas=options.routers).bind(), name="api")
    print(f"ready: {options.replicas} replicas on port {options.port}", flush=True)
    for line in sys.stdin:
        if not line.strip():
            break
        try:
            run_model(int(line), options.policy, engine, options.router)
            print(f"ready: {int(line)} replicas", flush=True)
        except (ValueError, RuntimeError) as error:  # no number, or replicas died while they were started
            print(f"not changed: {error}", flush=True)
    serve.shutdown()
    ray.shutdown()


main()
