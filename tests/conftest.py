"""What every test can rely on, wherever the suite was started from, and the real servers that tests share."""

import contextlib
import functools
import importlib.util
import signal
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent))

from real_server import PRESET, ROOT, SMALL_BATCHES, RealServer, running

# A shell without job control starts what it puts in the background with SIGINT ignored, and every child inherits that:
# the tests of Ctrl-C would then wait for an end that never comes.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

with contextlib.suppress(ModuleNotFoundError):  # the GPU tests do without
    import hypothesis

    # how long an example takes says more of the machine than of the code
    hypothesis.settings.register_profile("any machine", deadline=None)
    hypothesis.settings.load_profile("any machine")


MEASURED = pytest.StashKey[list[str]]()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Where processes share the tests (``pytest -n 2``), each file goes to one of them.

    Files that share what takes minutes to make go to the same: the image of the kit, and the two real servers.
    """
    from xdist.scheduler import LoadFileScheduling

    class Together(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return shared_by(super()._split_scope(nodeid))

    return Together(config, log)


@functools.cache
def shared_by(file: str) -> str:
    """What a file of tests shares with others, or its name."""
    if file.startswith("tests/docker/"):
        return "docker"
    text = (ROOT / file).read_text(encoding="utf-8")
    return "servers" if "batch_invariant_server" in text or "plain_server" in text else file


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Send what was measured along with the report, as the process that sums up may be another."""
    report = yield
    lines = item.config.stash.setdefault(MEASURED, [])
    report.user_properties = [*report.user_properties, *(("measured", line) for line in lines)]
    lines.clear()
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [report for of_a_kind in terminalreporter.stats.values() for report in of_a_kind]
    named = [pair for report in reports for pair in getattr(report, "user_properties", ())]
    lines = [line for name, line in named if name == "measured"]
    if lines:
        terminalreporter.section("measured")
        terminalreporter.write_line("\n".join(lines))


@pytest.fixture(scope="session")
def measured(pytestconfig: pytest.Config) -> Callable[[str], None]:
    """Keep a line with a figure for the end of the run: no test judges by it."""
    return pytestconfig.stash.setdefault(MEASURED, []).append


@pytest.fixture
def benchmark_module(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """benchmark_module(name): one of the benchmarks, imported anew, for as long as the test lasts."""

    def load(name: str) -> ModuleType:
        folder = ROOT / "benchmarks"
        monkeypatch.syspath_prepend(str(folder))
        spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the random model that real servers serve."""
    folder = tmp_path_factory.mktemp("model") / "tiny-llama"
    command = [sys.executable, ROOT / "vllm" / "tiny_model.py", folder, "--preset", PRESET]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder


@pytest.fixture(scope="session")
def batch_invariant_server(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    logs = tmp_path_factory.mktemp("logs")
    with running(RealServer("batch-invariant", small_model, logs, True, SMALL_BATCHES)) as server:
        yield server


@pytest.fixture(scope="session")
def plain_server(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    logs = tmp_path_factory.mktemp("logs")
    with running(RealServer("plain", small_model, logs, False, SMALL_BATCHES)) as server:
        yield server
