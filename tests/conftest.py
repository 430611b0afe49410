"""What every test can rely on, wherever the suite was started from, and the real servers that tests share."""

import contextlib
import importlib.util
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

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
