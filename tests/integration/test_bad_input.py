"""What a user may get wrong before a server starts, by serve.py and by make: one line, no traceback, nothing started.

The settings' own values are in test_serve_settings.py, the demo's in tests/demo, the container's in tests/docker.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SERVE = ROOT / "vllm" / "serve.py"
OURS = ("VLLM_", "BATCH_", "MODEL_NAME", "MAX_MODEL_LEN")
POSITIONS = {"max_position_embeddings": 2048}


@pytest.fixture
def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.fixture
def site(tmp_path):
    """A folder for PYTHONPATH in which a vLLM for GPUs looks installed; nothing of it is imported by --check."""
    info = tmp_path / "site" / "vllm-0.26.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.26.0\n")
    (tmp_path / "site" / "triton.py").write_text("")
    return tmp_path / "site"


@pytest.fixture
def check(tmp_path, site, free_port):
    """check(content, **environment): what serve.py says of a model whose config.json has that content."""

    def run(content, **env):
        (tmp_path / "config.json").write_text(content if isinstance(content, str) else json.dumps(content))
        env = {"MODEL_NAME": str(tmp_path), "VLLM_PORT": free_port, "PYTHONPATH": str(site)} | env
        # -S: no site-packages, so that only the vLLM of the test looks installed
        command = [sys.executable, "-S", str(SERVE), "--check"]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)

    return run


def only_line(done):
    assert done.returncode == 2 and done.stdout == "", done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    return line


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", '{"text_config": 7}', "\x00\xff"])
@pytest.mark.parametrize("env", [{}, {"MAX_MODEL_LEN": "16"}], ids=["", "with a length"])
def test_a_config_that_is_none_is_refused(check, content, env):
    line = only_line(check(content, **env))
    assert line.startswith("serve: MODEL_NAME=") and "config.json cannot be read" in line


def test_a_folder_without_config_is_refused_whatever_else_it_holds(check, tmp_path):
    folder = tmp_path / "weights alone"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"")
    assert "the folder holds no config.json" in only_line(check(POSITIONS, MODEL_NAME=str(folder)))


@pytest.mark.parametrize("name", ["/none", "./none", "../none", "~/none", "/none/config.json"])
def test_a_folder_that_is_not_there_is_refused(check, name):
    assert "there is no such folder" in only_line(check(POSITIONS, MODEL_NAME=name))


@pytest.mark.parametrize(
    "config",
    [
        POSITIONS,
        {"text_config": POSITIONS},
        POSITIONS | {"rope_parameters": {"rope_type": "default"}},
        POSITIONS | {"rope_scaling": {"rope_type": "llama3", "factor": 8}},
        POSITIONS | {"rope_scaling": {"type": "longrope", "factor": 8}},
    ],
    ids=["plain", "nested", "default", "llama3", "longrope"],
)
def test_a_length_beyond_the_model_is_refused_with_the_models_own(check, config):
    line = only_line(check(config, MAX_MODEL_LEN="2049"))
    assert line.startswith("serve: MAX_MODEL_LEN='2049' is not valid") and "at most 2048 is needed" in line
    assert check(config, MAX_MODEL_LEN="2048").returncode == 0


@pytest.mark.parametrize(
    "config",
    [
        POSITIONS | {"rope_scaling": {"rope_type": "linear", "factor": 2}},
        POSITIONS | {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2}}},
        POSITIONS | {"model_max_length": 4096},
        {},
    ],
    ids=["stretched", "stretched by layer", "two lengths", "unknown"],
)
def test_a_length_that_the_model_may_have_is_vllms_to_judge(check, config):
    assert check(config, MAX_MODEL_LEN="4096").returncode == 0


@pytest.fixture
def make_serve(free_port):
    """make_serve(**environment): `make serve` as its user runs it, where what it refuses keeps it from serving."""

    def run(**env):
        if shutil.which("make") is None or not (ROOT / ".venv" / "bin" / "python").exists():
            pytest.skip("make, or the .venv that it installs, is not here")
        env = {name: value for name, value in os.environ.items() if not name.startswith(OURS)} | env
        command = ["make", "--no-print-directory", "-C", str(ROOT), "serve"]
        process = subprocess.Popen(
            command,
            env={"VLLM_PORT": free_port} | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            out, err = process.communicate(timeout=120)
        finally:
            with contextlib.suppress(ProcessLookupError):  # a server that was not refused must not stay
                os.killpg(process.pid, signal.SIGKILL)
        assert process.returncode != 0 and "Traceback" not in err, out + err
        # make adds a line of its own
        (line,) = [line for line in err.splitlines() if not line.startswith("make")]
        return line

    return run


@pytest.mark.parametrize(
    "env, words",
    [
        ({"MODEL_NAME": "/none"}, "MODEL_NAME='/none' is not valid: there is no such folder"),
        ({"VLLM_MODEL": str(ROOT / "tests")}, "the folder holds no config.json"),
        ({"VLLM_ATTENTION_BACKEND": "FAST"}, "VLLM_ATTENTION_BACKEND='FAST' is not valid: one of auto"),
        ({"VLLM_ATTENTION_BACKEND": "FLASH_ATTN"}, "this is vLLM's CPU build: auto or CPU_ATTN is needed"),
        ({"MAX_MODEL_LEN": "abc"}, "MAX_MODEL_LEN='abc' is not valid: a whole number of tokens from 1"),
        ({"MAX_MODEL_LEN": "1000000"}, "MAX_MODEL_LEN='1000000' is not valid: the model in"),
        ({"VLLM_PORT": "0"}, "VLLM_PORT='0' is not valid: a port number from 1 to 65535 is needed"),
    ],
    ids=["no folder", "no config", "unknown backend", "backend of a GPU", "no length", "too long", "no port"],
)
def test_make_serve_refuses_it_in_one_line(make_serve, env, words):
    assert words in make_serve(**env)


@pytest.mark.parametrize("name", [{}, {"MODEL_NAME": "some/model"}], ids=["the demo's model", "a named model"])
def test_make_serve_refuses_a_port_in_use(make_serve, name):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        line = make_serve(VLLM_PORT=port, **name)
    assert f"VLLM_PORT={port}" in line.replace("'", "") and "cannot be listened on" in line
