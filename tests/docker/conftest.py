"""Fixtures of the deployment's tests: a faked host for the doctor, and the kit on a real engine."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # importlib mode puts no test folder on the path

from fake_host import Host
from kit import NAME, Kit, inspect
from monitors import build_images


@pytest.fixture
def host(tmp_path):
    """A machine on which everything is well, until a test replaces a tool."""
    return Host(tmp_path)


@pytest.fixture(scope="session")
def engine():
    """A Docker engine that answers; without one, what needs it is skipped and says so."""
    if shutil.which("docker") is None:
        pytest.skip("docker is not installed")
    answer = subprocess.run(["docker", "info"], capture_output=True, text=True, timeout=60)
    if answer.returncode != 0:
        pytest.skip("no Docker engine answers")


@pytest.fixture(scope="session")
def kit(engine, measured, tmp_path_factory):
    """The kit with the CPU stack's image built."""
    kit = Kit(tmp_path_factory.mktemp("kit"))
    kit.clean()
    began = time.monotonic()
    kit.make("vllm-build", timeout=1500)
    measured(f"make vllm-build STACK=cpu: {time.monotonic() - began:.0f} s (what was built before is kept)")
    yield kit
    kit.clean()


@pytest.fixture(scope="session")
def monitors(kit, tmp_path_factory):
    """The settings with which Compose starts Prometheus beside the server; none where the package is missing."""
    if shutil.which("prometheus") is None:
        return {}
    return build_images(tmp_path_factory.mktemp("monitors"))


@pytest.fixture
def server(kit, monitors):
    """The kit with its Compose server ready; one server serves all tests, and is started again where one ended it."""
    if inspect(NAME, "{{.State.Running}}") != "true":
        kit.make("vllm-stop")
        kit.make("vllm-compose-up-detached", "NO_BUILD=1", **monitors)
    kit.wait_ready()
    return kit


@pytest.fixture
def nothing_running(kit):
    """The kit with no container of its own."""
    kit.make("vllm-compose-down")
    kit.make("vllm-stop")
    yield kit
    kit.make("vllm-stop")
