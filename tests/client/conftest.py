"""The example client as a user runs it, against the harness's fake server and one that streams what a test says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # importlib mode puts no test folder on the path
sys.path.insert(0, str(Path(__file__).parents[1] / "harness"))

from client_kit import CLIENT, ROOT, environment, run_python
from fake_server import Behaviour, serving


@pytest.fixture
def client():
    """client(*arguments, **environment): the finished process."""
    return lambda *arguments, **env: run_python([CLIENT, *arguments], **env)


@pytest.fixture
def started():
    """started(*arguments): the client as a process that still runs; it is gone when the test is."""
    processes = []

    def start(*arguments):
        command = [sys.executable, str(CLIENT), *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
        processes.append(subprocess.Popen(command, env=environment(), **pipes))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def snippet():
    """snippet(code, url, **environment): run Python from the documentation against that server."""

    def run(code, url, **env):
        assert "http://127.0.0.1:8000" in code
        return run_python(["-c", code.replace("http://127.0.0.1:8000", url)], **env)

    return run


@pytest.fixture
def python_blocks():
    """python_blocks(file): the Python in a Markdown file, in order."""
    return lambda name: re.findall(
        r"^```python\n(.*?)^```$", (ROOT / name).read_text("utf-8"), re.DOTALL | re.MULTILINE
    )


@pytest.fixture
def server():
    with serving(Behaviour()) as running:
        yield running
