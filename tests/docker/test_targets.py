"""Every vllm-* target does what its help line says; test_server.py has those that ask a running server."""

import os
import re
import shutil
import signal
import subprocess

import pytest
from kit import IMAGE, NAME, TOKEN, docker, free_port, inspect, wait_until

pytestmark = [pytest.mark.docker, pytest.mark.timeout(1800)]
TARGETS = [
    "vllm-build",
    "vllm-run",
    "vllm-run-detached",
    "vllm-compose-up",
    "vllm-compose-up-detached",
    "vllm-compose-down",
    "vllm-compose-logs",
    "vllm-test",
    "vllm-stop",
    "vllm-logs",
    "vllm-shell",
    "vllm-info",
    "vllm-push",
    "vllm-doctor",
    "help",
]


def test_help_is_the_default_and_lists_every_target(kit):
    shown = kit.make()
    assert shown == kit.make("help")
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown)
    for target in TARGETS:
        assert re.search(rf"^\s*(make )?{target}\s+\w.+", plain, re.MULTILINE), f"{target} has no help line"


def test_vllm_run_detached_serves_and_vllm_stop_ends_it(nothing_running):
    kit = nothing_running
    kit.make("vllm-run-detached")
    kit.wait_ready()
    assert kit.bits()
    assert inspect(NAME, "{{.HostConfig.ReadonlyRootfs}} {{.HostConfig.CapDrop}} {{.Config.User}}") == (
        f"true [ALL] {os.getuid()}:{os.getgid()}"
    )
    assert inspect(NAME, "{{.HostConfig.RestartPolicy.Name}} {{.HostConfig.ShmSize}}") == f"unless-stopped {16 * 2**30}"
    assert f"stopped {NAME}" in kit.make("vllm-stop")
    assert "No such object" in inspect(NAME, "{{.Id}}")


@pytest.mark.parametrize("target", ["vllm-run", "vllm-compose-up"])
def test_a_server_in_the_foreground_ends_with_ctrl_c(nothing_running, target):
    kit = nothing_running
    make = kit.start_in_foreground(target)
    try:
        wait_until(lambda: "command " in docker("logs", NAME, check=False), "serve.py says what it runs", 300)
        os.killpg(make.pid, signal.SIGINT)
        make.wait(timeout=60)
        wait_until(lambda: inspect(NAME, "{{.State.Running}}") != "true", "the container ended", 30)
    finally:
        if make.poll() is None:
            os.killpg(make.pid, signal.SIGKILL)


def test_vllm_compose_down_removes_the_container_and_keeps_the_caches(nothing_running):
    nothing_running.make("vllm-compose-up-detached", "NO_BUILD=1")
    assert inspect(NAME, "{{.State.Running}}") == "true"
    nothing_running.make("vllm-compose-down")
    assert "No such object" in inspect(NAME, "{{.Id}}")
    assert {f"{NAME}_compiled", f"{NAME}_huggingface"} <= set(docker("volume", "ls", "--quiet").split())


def test_vllm_info_and_vllm_stop_without_a_server(nothing_running):
    shown = nothing_running.make("vllm-info")
    assert "none answers at" in shown and "0.32.0" in shown
    assert "there is no container" in nothing_running.make("vllm-stop")


def test_vllm_shell_without_a_server_opens_one_in_a_new_container(nothing_running):
    shown = nothing_running.make("vllm-shell", stdin="echo in $PWD\n")
    assert "in /opt/batch-invariant/vllm" in shown


def test_vllm_test_stops_waiting_for_a_container_that_ended(nothing_running):
    docker("run", "--name", NAME, IMAGE, "python", "-c", "raise SystemExit('the reason')", check=False)
    shown = nothing_running.make("vllm-test", check=False)
    assert nothing_running.status != 0 and "ended; its last line: the reason" in shown


@pytest.mark.parametrize("target", ["vllm-run-detached", "vllm-compose-up-detached"])
def test_an_address_for_other_machines_needs_a_key(nothing_running, target):
    shown = nothing_running.make(target, "VLLM_BIND=0.0.0.0", "VLLM_API_KEY=", check=False)
    assert nothing_running.status != 0 and "set VLLM_API_KEY" in shown


@pytest.mark.parametrize("setting", ["STACK=cuda11", "VLLM_PORT=abc"])
def test_a_setting_that_cannot_work_is_named(kit, setting):
    shown = kit.make("vllm-run-detached", setting, check=False)
    name, value = setting.split("=")
    assert kit.status != 0 and name in shown and value in shown and "is not valid" in shown


@pytest.mark.parametrize("target", ["vllm-run", "vllm-run-detached", "vllm-compose-up-detached", "vllm-build"])
def test_no_command_line_holds_a_token(kit, target):
    assert TOKEN not in kit.make("--dry-run", target)
    assert TOKEN not in kit.make("--dry-run", target, HF_TOKEN=TOKEN)


def test_vllm_push_refuses_without_a_registry(kit):
    assert "VLLM_REGISTRY" in kit.make("vllm-push", check=False) and kit.status != 0


@pytest.mark.skipif(shutil.which("docker-registry") is None, reason="needs the package docker-registry")
def test_vllm_push_pushes(kit, tmp_path):
    """A small image under the kit's name, to a real registry."""
    address = f"127.0.0.1:{free_port()}"
    config = tmp_path / "config.yml"
    config.write_text(
        f"version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: {tmp_path}/data\nhttp:\n  addr: {address}\n"
    )
    (tmp_path / "Dockerfile").write_text("FROM scratch\nLABEL of=tests\n")
    docker("build", "--tag", f"{NAME}:small", str(tmp_path))
    registry = subprocess.Popen(
        ["docker-registry", "serve", config], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        kit.make("vllm-push", f"VLLM_REGISTRY={address}", f"VLLM_IMAGE={NAME}:small")
        docker("rmi", f"{NAME}:small", f"{address}/{NAME}:small")
        docker("pull", f"{address}/{NAME}:small")
    finally:
        registry.terminate()
        registry.wait(timeout=30)
        docker("rmi", f"{address}/{NAME}:small", check=False)
