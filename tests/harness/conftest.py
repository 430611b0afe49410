"""Run the harness as its user does, against a server that misbehaves where it is told to."""

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
for folder in (ROOT / "vllm", ROOT / "tests" / "harness"):
    sys.path.insert(0, str(folder))

from fake_server import Behaviour, FakeServer, serving  # noqa: E402
from harness_kit import COMMAND, environment  # noqa: E402


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
