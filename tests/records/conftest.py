"""Record and verify as a user does, against a server that has a fingerprint and misbehaves where it is told to."""

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
for folder in (ROOT / "vllm", ROOT / "tests" / "harness", ROOT / "tests" / "records"):
    sys.path.insert(0, str(folder))

from fake_server import Behaviour, FakeServer  # noqa: E402
from harness_kit import COMMAND, environment  # noqa: E402
from record_server import FIELDS, PROMPTS, Fingerprinted, running  # noqa: E402


@pytest.fixture
def serve() -> Iterator[Callable[..., Fingerprinted]]:
    """A function that starts a server with that behaviour, whose fields are FIELDS and those given; it ends with
    the test."""
    with contextlib.ExitStack() as stack:

        def start(
            changed: dict | None = None,
            digest: str | None = "bi-0123456789abcdef",
            says: bool = True,
            **behaviour: object,
        ) -> FakeServer:
            fields = FIELDS | (changed or {}) if says else None
            made = Fingerprinted(Behaviour(**behaviour), fields, digest)  # type: ignore[arg-type]
            return stack.enter_context(running(made))

        yield start


@pytest.fixture
def prompts(tmp_path: Path) -> tuple[str, str]:
    """The options that ask the twenty prompts."""
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS))
    return ("--prompt-file", str(file))


@pytest.fixture
def harness() -> Callable[..., subprocess.CompletedProcess[str]]:
    """A function that runs the command to its end against a server; a traceback fails the test."""

    def run(server: FakeServer, *options: object, **popen: object) -> subprocess.CompletedProcess[str]:
        command = [*COMMAND, "--url", server.url, *map(str, options)]
        done = subprocess.run(
            command,
            env=environment(),
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=120,
            **popen,  # type: ignore[call-overload]
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done

    return run


@pytest.fixture
def record(harness, prompts, tmp_path) -> Callable[..., Path]:
    """A function that records the twenty prompts from a server into a whole file."""

    def make(server: FakeServer, *options: object, name: str = "record.jsonl") -> Path:
        path = tmp_path / name
        done = harness(server, "--record", path, *prompts, "--max-tokens", "8", *options)
        assert done.returncode == 0, done.stdout + done.stderr
        return path

    return make
