"""The demo itself: what it refuses before it starts anything, and the whole of it with two real servers."""

import json
import os
import re
import signal
import socket
import subprocess
import sys

import pytest

SECONDS = 900


def demo_command(root, **settings: str) -> tuple[list[str], dict[str, str]]:
    others = {name: value for name, value in os.environ.items() if name not in ("BATCH_INVARIANT", "VLLM_PORT")}
    return [sys.executable, str(root / "vllm" / "demo.py")], others | settings


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.mark.parametrize("arguments", [[], ["--serve"]])
@pytest.mark.parametrize(("name", "value"), [("VLLM_PORT", "abc"), ("VLLM_PORT", "70000"), ("BATCH_INVARIANT", "yes")])
def test_a_setting_that_cannot_work_gets_one_line(root, name, value, arguments):
    command, env = demo_command(root, **{"VLLM_PORT": free_port(), name: value})
    done = subprocess.run([*command, *arguments], env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert f"{name}='{value}' is not valid" in done.stderr


def test_a_port_in_use_is_told_before_anything_starts(root):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        command, env = demo_command(root, VLLM_PORT=str(taken.getsockname()[1]))
        done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "cannot be listened on" in done.stderr


def ended(processes: str) -> bool:
    return not subprocess.run(["pgrep", "-f", processes], capture_output=True, text=True).stdout.split()


@pytest.mark.server
@pytest.mark.timeout(SECONDS)
def test_plain_vllm_is_caught_and_the_batch_invariant_server_passes(root):
    """The control and the proof: two real servers, one load, compared down to the logprobs' bits."""
    port = free_port()
    command, env = demo_command(root, VLLM_PORT=port)
    done = subprocess.run(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=SECONDS
    )
    print(done.stdout)
    results = {name: json.loads((root / ".demo" / f"{name}.json").read_text()) for name in ("plain", "batch-invariant")}
    for result in results.values():
        assert result["level"] == "logprobs"
        assert len(result["logprob_differences"]) == result["requests"]
    assert results["plain"]["identical_to_solo"] < results["plain"]["requests"]
    assert results["plain"]["logprob_variants"] > 1
    ours = results["batch-invariant"]
    assert (ours["token_variants"], ours["logprob_variants"]) == (1, 1)
    assert ours["identical_to_solo"] == ours["requests"]
    assert done.returncode == 0
    assert "PASS:" in done.stdout
    assert "<h1>PASS</h1>" in (root / "report.html").read_text()
    assert ended(f"--port {port}"), "a server outlived the demo"


@pytest.mark.server
@pytest.mark.timeout(SECONDS)
def test_interrupting_the_demo_while_it_starts_ends_its_servers(root):
    port = free_port()
    command, env = demo_command(root, VLLM_PORT=port)
    demo = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in demo.stdout:
        if re.match(r" +\d+ s", line):
            break
    demo.send_signal(signal.SIGINT)
    output = demo.stdout.read()
    assert demo.wait(timeout=120) == 130
    assert "interrupted" in output
    assert ended(f"--port {port}"), "a server outlived the demo"
