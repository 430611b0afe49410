"""A pytest fixture for your own suite: prompts whose answers may not depend on the load, and records to verify.

    # conftest.py, with this repository's vllm/ on the path
    pytest_plugins = ["determinism.pytest_plugin"]

    # test_prompts.py
    def test_our_prompts(deterministic_server):
        deterministic_server.check(["What is the capital of France?"], max_tokens=64)

The server's address is `--determinism-url` or DETERMINISM_URL, its key VLLM_API_KEY. Without an address the tests that
use the fixture are skipped, and say so. A failure shows what the harness printed, as it is run as a command.
"""

import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from .errors import EXIT_INCONCLUSIVE, EXIT_PASS
from .identity import HEADER

HARNESS = Path(__file__).resolve().parent.parent / "test_determinism.py"
VARIABLE = "DETERMINISM_URL"


class DeterministicServer:
    """A server, and what must hold of it. Each method fails the test where it does not."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")

    @property
    def fingerprint(self) -> str | None:
        """The digest that the server bears; None where it tells none. Raises httpx.HTTPError if nothing answers."""
        return httpx.get(f"{self.url}/health", timeout=30).headers.get(HEADER)

    def check(
        self,
        prompts: Sequence[str],
        *,
        copies: int = 20,
        concurrency: int = 10,
        max_tokens: int = 64,
        level: str | None = None,
        control_url: str | None = None,
        allow_inconclusive: bool = False,
    ) -> dict[str, Any]:
        """Ask each prompt alone, then that many copies of each, so many at once; returns the harness's JSON report.

        Args:
            level: text, tokens or logprobs; the strictest that the server offers where it is None.
            control_url: a plain server of the same model, which the same load must catch.
            allow_inconclusive: warn, instead of failing, where nothing differs and it could not be shown that a
                difference would have been seen.
        """
        with tempfile.TemporaryDirectory() as folder:
            file, result = Path(folder, "prompts.jsonl"), Path(folder, "result.json")
            file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts), encoding="utf-8")
            options = ["--prompt-file", str(file), "--json", str(result), "--max-tokens", str(max_tokens)]
            options += ["--requests", str(copies * len({*prompts})), "--concurrency", str(concurrency)]
            options += ["--level", level] if level else []
            options += ["--control-url", control_url] if control_url else []
            self._run(options, allow_inconclusive)
            return dict(json.loads(result.read_text(encoding="utf-8")))

    def verify(self, record: str | os.PathLike[str], *, level: str | None = None, concurrency: int = 10) -> None:
        """Ask again what the record holds: every answer must be equal."""
        options = ["--verify", os.fspath(record), "--concurrency", str(concurrency)]
        self._run(options + (["--level", level] if level else []), allow_inconclusive=False)

    def _run(self, options: list[str], allow_inconclusive: bool) -> None:
        done = subprocess.run(
            [sys.executable, str(HARNESS), "--url", self.url, *options],
            capture_output=True,
            text=True,
            encoding="utf-8",
            env=os.environ | {"PYTHONIOENCODING": "utf-8"},
        )
        if done.returncode == EXIT_INCONCLUSIVE and allow_inconclusive:
            warnings.warn(UserWarning(done.stdout + done.stderr), stacklevel=3)
        elif done.returncode != EXIT_PASS:
            pytest.fail(f"{done.stdout}{done.stderr}".rstrip(), pytrace=False)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("determinism").addoption(
        "--determinism-url", metavar="URL", help=f"the server that `deterministic_server` asks (default: {VARIABLE})"
    )


@pytest.fixture(scope="session")
def deterministic_server(request: pytest.FixtureRequest) -> DeterministicServer:
    """The server at `--determinism-url` or DETERMINISM_URL."""
    url = request.config.getoption("--determinism-url") or os.environ.get(VARIABLE)
    if not url:
        pytest.skip(f"no server: --determinism-url URL or {VARIABLE} is needed")
    return DeterministicServer(url)
