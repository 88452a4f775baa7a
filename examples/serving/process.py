"""The server in a process of its own, for measurements and tests."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from examples.serving.app import APPLICATION
from examples.serving.engine import EngineSettings

ROOT = Path(__file__).parents[2]
QUIET = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0", "OMP_NUM_THREADS": "1"}


class ServerProcess:
    """``python -m examples.serving`` on a free port; made once all replicas are ready.

    Attributes:
        url: where it answers.
        port: of the url.
        log: what it and its replicas wrote.
    """

    def __init__(
        self, log: Path, replicas: int, policy: str, engine: EngineSettings, router: dict[str, Any], routers: int = 1
    ) -> None:
        with socket.socket() as free:
            free.bind(("", 0))
            self.port = free.getsockname()[1]
        self.url, self.log = f"http://localhost:{self.port}", log
        options = {"replicas": replicas, "policy": policy, "routers": routers, "port": self.port}
        options |= {"router": json.dumps(router), "engine": json.dumps(asdict(engine))}
        command = [sys.executable, "-m", "examples.serving"]
        command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
        with log.open("w") as written:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | QUIET,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=written,
                text=True,
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self._process.kill()
            raise

    def scale(self, replicas: int) -> None:
        """Run so many replicas, and wait until they do."""
        self._write(f"{replicas}\n")
        self._wait_until_ready()

    def replica_processes(self) -> list[int]:
        """The processes of all its replicas that run or start, hang or not."""
        listed = subprocess.run(
            ["pgrep", "-f", f"^ray::ServeReplica:{APPLICATION}"], capture_output=True, text=True, check=False
        )
        return [int(number) for number in listed.stdout.split()]

    def close(self) -> None:
        """End the server and all that belongs to it."""
        self._write("\n")
        self._process.communicate(timeout=60)

    def _write(self, text: str) -> None:
        assert self._process.stdin
        self._process.stdin.write(text)
        self._process.stdin.flush()

    def _wait_until_ready(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith("ready"):
                return
            if line.startswith("not changed"):
                raise RuntimeError(line.strip())
        raise RuntimeError(f"The server ended; see {self.log}.")
