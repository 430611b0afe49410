"""The container's main process refuses a cache that cannot serve, in one line, and makes the demo model once."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ENTRYPOINT = Path(__file__).resolve().parents[2] / "vllm" / "entrypoint.py"
SERVE = "import os, sys; print('serve', sys.argv[1:], os.environ['MODEL_NAME'], os.environ.get('SERVED_MODEL_NAME'))"
MAKE_MODEL = """
import pathlib, sys
folder = pathlib.Path(sys.argv[1])
folder.mkdir()
(folder / 'config.json').write_text('{}')
print('made', sys.argv[3])
"""


HUB = """
import os
from huggingface_hub import errors

def hf_hub_download(model, name):
    kind = os.environ.get('HUB_ANSWERS')
    if kind:
        raise getattr(errors, kind)('the hub said ' + kind)
"""
ERRORS = """
class HfHubHTTPError(Exception): pass
class RepositoryNotFoundError(HfHubHTTPError): pass
class GatedRepoError(RepositoryNotFoundError): pass
class EntryNotFoundError(Exception): pass
class LocalEntryNotFoundError(EntryNotFoundError): pass
"""


@pytest.fixture
def start(tmp_path):
    """Run the entry point beside a serve.py and a tiny_model.py that only say that they ran, and a hub that answers
    as HUB_ANSWERS tells."""
    hub = tmp_path / "site" / "huggingface_hub"
    hub.mkdir(parents=True)
    (hub / "__init__.py").write_text(HUB)
    (hub / "errors.py").write_text(ERRORS)
    for name, text in (("serve.py", SERVE), ("tiny_model.py", MAKE_MODEL)):
        (tmp_path / name).write_text(text)
    for name in ("entrypoint.py", "supervisor.py"):
        (tmp_path / name).write_text((ENTRYPOINT.parent / name).read_text())

    def run(**env):
        caches = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "hf")}
        caches |= {"PYTHONPATH": str(tmp_path / "site")}
        command = [sys.executable, tmp_path / "entrypoint.py", "--check"]
        return subprocess.run(command, env=caches | env, capture_output=True, text=True, timeout=60)

    return run


@pytest.fixture
def nvidia_smi(tmp_path):
    """nvidia_smi(driver): a folder whose nvidia-smi gives that driver's version."""

    def make(driver: str) -> str:
        tool = tmp_path / "bin" / "nvidia-smi"
        tool.parent.mkdir()
        tool.write_text(f"#!/bin/sh\necho {driver}\n")
        tool.chmod(0o755)
        return str(tool.parent)

    return make


def refusal(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 2
    assert "serve" not in done.stdout
    (line,) = done.stderr.splitlines()
    return line


def test_it_becomes_serve_with_its_arguments(start):
    done = start(MODEL_NAME="org/name")
    assert done.returncode == 0 and done.stdout == "serve ['--check'] org/name None\n"


def test_the_demo_model_is_made_once_and_served_under_its_name(start, tmp_path):
    first, second = start(MODEL_NAME="demo"), start(MODEL_NAME="demo")
    line = f"serve ['--check'] {tmp_path}/cache/demo-model demo"
    assert first.stdout.splitlines()[1:] == ["made tiny", line]
    assert second.stdout.splitlines() == [line]


@pytest.mark.skipif(os.path.exists("/dev/nvidiactl"), reason="this machine has a GPU: its driver would be asked")
def test_the_demo_model_on_a_gpu_is_one_that_its_attention_is_proven_with(start, nvidia_smi, tmp_path):
    done = start(MODEL_NAME="demo", BATCH_INVARIANT_STACK="cuda12 vllm==1", PATH=nvidia_smi("525.60.13"))
    assert done.stdout.splitlines()[1:] == [
        "made tiny-wide-heads",
        f"serve ['--check'] {tmp_path}/cache/demo-model-gpu demo",
    ]


def test_a_demo_model_that_fails_leaves_nothing_that_looks_complete(start, tmp_path):
    (tmp_path / "tiny_model.py").write_text(MAKE_MODEL + "\nsys.exit(3)")
    assert "exit status 3" in start(MODEL_NAME="demo").stderr
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize(
    "stack, driver, words",
    [
        ("cuda12", None, "no NVIDIA GPU is in this container: start it with --gpus all"),
        ("cuda12", "470.256.02", "the NVIDIA driver is 470.256.02, the cuda12 stack needs 525 or newer: update it"),
        ("cuda13", "570.86.15", "the cuda13 stack needs 580 or newer: update it, or use STACK=cuda12"),
        ("cuda12", "525.60.13", None),
        ("cuda13", "580.65.06", None),
        ("cpu", None, None),
    ],
)
@pytest.mark.skipif(os.path.exists("/dev/nvidiactl"), reason="this machine has a GPU: none cannot be shown")
def test_a_gpu_is_there_for_a_stack_that_needs_one(start, nvidia_smi, tmp_path, stack, driver, words):
    path = nvidia_smi(driver) if driver else str(tmp_path)
    done = start(MODEL_NAME="org/name", BATCH_INVARIANT_STACK=f"{stack} vllm==1", PATH=path)
    if words:
        assert words in refusal(done)
    else:
        assert done.stdout.startswith("serve")


@pytest.mark.parametrize("variable, what", [("XDG_CACHE_HOME", "compile cache"), ("HF_HOME", "Hugging Face cache")])
def test_an_unwritable_cache_is_named(start, variable, what):
    line = refusal(start(MODEL_NAME="org/name", **{variable: "/proc/here"}))
    assert f"/proc/here ({what}) cannot be written" in line and "mount a volume" in line


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small file system")
@pytest.mark.parametrize("filled", [False, True], ids=["nearly-full", "full"])
def test_a_full_disk_is_named(start, tmp_path, filled):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a small file system")
    try:
        if filled:
            (small / "filler").write_bytes(b"\0" * 2**20)
        line = refusal(start(MODEL_NAME="org/name", XDG_CACHE_HOME=str(small)))
        assert ("is full" if filled else "MiB are needed") in line and str(small) in line
    finally:
        subprocess.run(["umount", small], check=True)


def test_a_model_already_in_the_cache_may_be_on_a_read_only_volume(start, tmp_path):
    assert "cannot be written" in start(MODEL_NAME="org/name", HF_HOME="/proc/hf").stderr
    model = tmp_path / "model"
    model.mkdir()
    assert start(MODEL_NAME=str(model), HF_HOME="/proc/hf").returncode == 0


@pytest.mark.parametrize(
    "answer, words",
    [
        ("GatedRepoError", "set HF_TOKEN"),
        ("RepositoryNotFoundError", "not at the hub"),
        ("LocalEntryNotFoundError", "cannot be reached"),
        ("HfHubHTTPError", "the hub said HfHubHTTPError"),
    ],
)
def test_a_model_that_the_hub_does_not_give_is_refused_in_one_line(start, answer, words):
    line = refusal(start(MODEL_NAME="org/name", HUB_ANSWERS=answer))
    assert words in line and "org/name" in line


def test_a_model_without_config_json_is_for_vllm_to_judge(start):
    assert start(MODEL_NAME="org/name", HUB_ANSWERS="EntryNotFoundError").returncode == 0


@pytest.mark.parametrize("reachable", [True, False])
def test_a_downloaded_model_is_served_while_the_hub_is_away(start, tmp_path, reachable):
    (tmp_path / "serve.py").write_text("import os; print('offline', os.environ.get('HF_HUB_OFFLINE'))")
    snapshot = tmp_path / "hf" / "hub" / "models--org--name" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    with socket.socket() as hub:
        hub.bind(("127.0.0.1", 0))
        if reachable:
            hub.listen()
        done = start(MODEL_NAME="org/name", HF_ENDPOINT=f"http://127.0.0.1:{hub.getsockname()[1]}")
    assert ("the hub cannot be reached, org/name is served from the cache" in done.stdout) != reachable
    assert done.stdout.splitlines()[-1] == f"offline {None if reachable else 1}"


def test_the_hub_is_not_asked_for_a_downloaded_model(start, tmp_path):
    snapshot = tmp_path / "hf" / "hub" / "models--org--name" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    assert start(MODEL_NAME="org/name", HUB_ANSWERS="LocalEntryNotFoundError").returncode == 0


@pytest.mark.parametrize(
    "setting", [{"DRAIN_SECONDS": "soon"}, {"DRAIN_SECONDS": "0"}, {"VLLM_EXTRA_ARGS": "--shutdown_timeout=9"}]
)
def test_a_drain_that_cannot_be_understood_is_refused(start, setting):
    assert "DRAIN_SECONDS" in refusal(start(MODEL_NAME="org/name", **setting))


def test_serve_is_told_how_long_to_drain(start, tmp_path):
    (tmp_path / "serve.py").write_text("import os; print(os.environ['VLLM_EXTRA_ARGS'])")
    assert start(MODEL_NAME="org/name", VLLM_EXTRA_ARGS="--foo 1").stdout == "--shutdown-timeout 5 --foo 1\n"
