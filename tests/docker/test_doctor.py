"""The doctor names each thing of the host that keeps a server from starting, and the command that mends it.

Every tool it asks is a script on a PATH of the test's own, so a failure is the one that was planted and no other.
"""

import json
import socket
import subprocess
import sys

import pytest
from fake_host import DOCTOR, ENGINE, serving, smi


def test_a_machine_where_all_is_well_has_nothing_to_mend(host):
    report = host.examine()
    assert report.status == 0
    assert {f["level"] for f in report.findings.values()} == {"ok"}


def test_the_text_form_shows_the_mending_command_under_the_line(host):
    host.without("nvidia-smi")
    done = subprocess.run([sys.executable, DOCTOR], env=host.env, capture_output=True, text=True, timeout=60)
    line, mend = [text for text in done.stdout.splitlines() if "GPU " in text or "->" in text]
    assert line.startswith("failure  GPU") and "-> install the driver" in mend
    assert done.returncode == 1 and "1 to mend" in done.stdout


def test_docker_that_is_not_installed(host):
    host.without("docker")
    report = host.examine(STACK="cpu")
    assert report.status == 1
    assert report["Docker"][:2] == ("failure", "docker is not installed")
    assert report["Compose"][0] == "failure"


@pytest.mark.parametrize(
    "message, mend",
    [
        ("permission denied while trying to connect", "usermod"),
        ("Cannot connect to the Docker daemon", "systemctl start"),
    ],
)
def test_an_engine_out_of_reach(host, message, mend):
    host.tool("docker", f'case "$*" in *Client*) echo 24.0.7 ;; *) echo "{message}" >&2; exit 1 ;; esac')
    report = host.examine(STACK="cpu")
    assert report["Docker"][0] == "failure" and mend in report["Docker"][2]
    assert report.status == 1


def test_an_engine_that_is_too_old(host):
    host.tool("docker", ENGINE.replace("*Server.Version*) echo 24.0.7", "*Server.Version*) echo 19.03.15"))
    assert "19.03.15" in host.examine(STACK="cpu").only_problem("Docker")[0]


def test_a_new_client_without_buildx(host):
    host.tool("docker", ENGINE.replace("echo github.com/docker/buildx v0.12.0", "exit 1"))
    assert "docker-buildx" in host.examine().only_problem("BuildKit")[1]


def test_no_compose_at_all(host):
    host.tool("docker", ENGINE.replace("echo 2.24.1", "exit 1"))
    assert "docker-compose-plugin" in host.examine().only_problem("Compose")[1]


@pytest.mark.parametrize("version, level", [("1.29.2", "ok"), ("1.25.0", "failure")])
def test_the_old_compose_counts_where_it_can_reserve_gpus(host, version, level):
    host.tool("docker", ENGINE.replace("echo 2.24.1", "exit 1"))
    host.tool("docker-compose", f"echo {version}")
    assert host.examine()["Compose"][0] == level


def test_no_driver(host):
    host.without("nvidia-smi")
    detail, mend = host.examine().only_problem("GPU")
    assert "no NVIDIA driver" in detail and "nvidia-driver" in mend


def test_the_cpu_stack_asks_for_no_gpu(host):
    host.without("nvidia-smi")
    assert host.examine(STACK="cpu").status == 0


def test_a_driver_whose_library_is_newer_than_its_kernel_module(host):
    host.tool("nvidia-smi", "echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18")
    assert host.examine().only_problem("GPU")[1] == "sudo reboot"


@pytest.mark.parametrize(
    "stack, driver, level",
    [
        ("cuda12", "525.60.13", "ok"),
        ("cuda12", "470.256.02", "failure"),
        ("cuda13", "580.65.06", "ok"),
        ("cuda13", "575.57.08", "failure"),
    ],
)
def test_the_driver_is_held_against_the_stack(host, stack, driver, level):
    host.tool("nvidia-smi", smi(driver=driver))
    report = host.examine(STACK=stack)
    assert report["Driver"][0] == level
    assert ("STACK=cuda12" in report["Driver"][2]) == (stack == "cuda13" and level == "failure")


def test_a_toolkit_that_docker_was_not_told_of(host):
    host.tool("docker", ENGINE.replace("nvidia", "other"))
    host.tool("nvidia-ctk", "echo NVIDIA Container Toolkit CLI version 1.17.4")
    assert "nvidia-ctk runtime configure" in host.examine().only_problem("Container toolkit")[1]


def test_a_missing_toolkit(host):
    host.tool("docker", ENGINE.replace("nvidia", "other"))
    assert host.examine().only_problem("Container toolkit")[0] == "not installed"


def test_fewer_gpus_than_tensor_parallel_ranks(host):
    host.tool("nvidia-smi", smi(count=2))
    detail, mend = host.examine(TENSOR_PARALLEL_SIZE="4").only_problem("GPUs")
    assert "2 " in detail and mend == "TENSOR_PARALLEL_SIZE=2"


@pytest.mark.parametrize("capability, level", [("7.5", "failure"), ("8.0", "warning"), ("12.0", "warning")])
def test_a_gpu_that_is_too_old_or_was_never_measured(host, capability, level):
    host.tool("nvidia-smi", smi(capability=capability))
    host.examine().only_problem("Compute capability", level)


def test_weights_larger_than_the_gpu(host, tmp_path):
    model = host.add_model(tmp_path / "large", 140 * 2**30)
    detail, mend = host.examine(VLLM_MODEL=str(model)).only_problem("GPU memory")
    assert "weights 140.0 GiB" in detail and "TENSOR_PARALLEL_SIZE=2" in mend


def test_a_context_too_long_for_the_memory_names_one_that_fits(host, tmp_path):
    host.tool("nvidia-smi", smi(total=24576, free=24576))
    model = host.add_model(tmp_path / "eight", 16 * 2**30)
    mend = host.examine(VLLM_MODEL=str(model), MAX_MODEL_LEN="131072").only_problem("GPU memory")[1]
    length = mend.removeprefix("MAX_MODEL_LEN=")
    assert host.examine(VLLM_MODEL=str(model), MAX_MODEL_LEN=length)["GPU memory"][0] == "ok"


def test_a_gpu_in_use_by_others(host):
    host.tool("nvidia-smi", smi(free=20000))
    assert "GPU_MEMORY_UTILIZATION=0.2" in host.examine().only_problem("GPU memory in use", "warning")[1]


def test_too_small_a_disk_for_the_image(host):
    host.tool("docker", ENGINE.replace("ROOT", "/proc").replace("echo sha256:1", "exit 1"))
    detail, mend = host.examine().only_problem("Disk for the image")
    assert "/proc" in detail and "docker system prune" in mend


def test_a_port_in_use_by_something_else(host):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert host.examine(VLLM_PORT=str(port)).only_problem("Port")[1].startswith(f"VLLM_PORT={port + 1}")


def test_a_port_where_the_server_already_answers(host):
    with serving(lambda path, _: (200 if path == "/health" else 404, {})) as url:
        assert "already running" in host.examine(VLLM_PORT=url.rsplit(":")[-1])["Port"][1]


@pytest.mark.parametrize("key, level", [("", "failure"), ("secret-key", "ok")])
def test_an_open_address_needs_a_key_and_the_key_is_not_shown(host, key, level):
    report = host.examine(VLLM_BIND="0.0.0.0", VLLM_API_KEY=key)
    assert report["API key"][0] == level
    assert "secret-key" not in json.dumps(report.findings)


def test_an_address_of_another_machine(host):
    assert host.examine(VLLM_BIND="192.0.2.1", VLLM_API_KEY="x").only_problem("Port")[1] == "VLLM_BIND=127.0.0.1"


@pytest.mark.parametrize("size, level", [("64m", "failure"), ("9000g", "warning")])
def test_shared_memory_too_small_or_more_than_there_is(host, size, level):
    host.examine(VLLM_SHM_SIZE=size).only_problem("Shared memory", level)


@pytest.mark.parametrize(
    "name, value",
    [
        ("STACK", "cuda11"),
        ("VLLM_PORT", "abc"),
        ("VLLM_PORT", "99999"),
        ("MAX_MODEL_LEN", "long"),
        ("VLLM_SHM_SIZE", "x"),
    ],
)
def test_a_setting_that_cannot_be_understood_is_named(host, name, value):
    report = host.examine(**{name: value})
    assert report.status == 2 and name in report.stderr and value in report.stderr
    assert len(report.stderr.splitlines()) == 1


def test_a_tool_that_answers_nonsense_is_a_failure_and_no_traceback(host):
    host.tool("nvidia-smi", "echo '<unintelligible>'")
    host.examine().only_problem("GPU")


def test_this_machine_as_it_is():
    """No faked tool: the doctor finishes with one of its own statuses and says something of each part."""
    done = subprocess.run([sys.executable, DOCTOR, "--json"], capture_output=True, text=True, timeout=120)
    assert done.returncode in (0, 1), done.stderr
    subjects = {finding["subject"] for finding in json.loads(done.stdout)}
    assert {"Docker", "Compose", "Model", "Shared memory", "Port", "API key"} <= subjects
