"""Run the harness as its user does, against a server that misbehaves where it is told to."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
for folder in (ROOT / "vllm", ROOT / "tests" / "harness"):
    sys.path.insert(0, str(folder))

from fake_server import Behaviour, FakeServer, serving  # noqa: E402

COMMAND = [sys.executable, str(ROOT / "vllm" / "test_determinism.py")]
SHORT = ("--requests", "100", "--concurrency", "10", "--max-tokens", "16")
ONE_PROMPT_TOKENS = 64
ONE_PROMPT = ("--prompt", "one river two roads", "--background", "0", "--max-tokens", str(ONE_PROMPT_TOKENS))
"""With this load request 0 is the probe, 1 the prompt alone, and from 2 on each is a copy under load."""


def environment(**settings: str) -> dict[str, str]:
    """This process's, without what would change the harness's own defaults."""
    dropped = ("VLLM_PORT", "VLLM_API_KEY", "NO_COLOR")
    return {name: value for name, value in os.environ.items() if name not in dropped} | settings


@pytest.fixture
def serve() -> Iterator[Callable[..., FakeServer]]:
    """A function that starts a fake server with that behaviour; it ends with the test."""
    with contextlib.ExitStack() as stack:
        yield lambda **behaviour: stack.enter_context(serving(Behaviour(**behaviour)))


@pytest.fixture
def harness() -> Callable[..., subprocess.CompletedProcess[str]]:
    """A function that runs the command to its end against a server, or with no --url where that is None."""

    def run(server: FakeServer | str | None, *options: str, **settings: str) -> subprocess.CompletedProcess[str]:
        url = server.url if isinstance(server, FakeServer) else server
        address = () if url is None else ("--url", url)
        done = subprocess.run(
            [*COMMAND, *address, *options],
            env=environment(**settings),
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=120,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done

    return run
