"""The demo itself: what it refuses before it starts anything, and the whole of it with two real servers."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from demo import measure
from local_server import Failure, Programs

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


def parents() -> dict[int, tuple[int, int]]:
    """Every process that runs: its parent and its session; a zombie is none."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent, _group, session = stat.read_text().rpartition(")")[2].split()[:4]
            if state != "Z":
                found[int(stat.parent.name)] = (int(parent), int(session))
    return found


def name_of(process: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


class Watch:
    """What a demo has started so far. Sessions are kept, as a process may lose its parent, but never its session."""

    def __init__(self, demo: int) -> None:
        self.demo = demo
        self.sessions: set[int] = set()
        self.engine_cores: set[int] = set()

    def look(self) -> None:
        running = parents()
        family = {self.demo}
        while more := {child for child, (parent, _) in running.items() if parent in family} - family:
            family |= more
        started = family - {self.demo}
        self.sessions |= {running[process][1] for process in started if process in running}
        self.sessions -= {os.getsid(0)}
        self.engine_cores |= {process for process in started if "EngineCore" in name_of(process)}

    def left(self) -> dict[int, str]:
        return {process: name_of(process) for process, (_, session) in parents().items() if session in self.sessions}


def test_the_watch_sees_a_process_whose_parent_has_gone():
    """The twin of every check below that nothing is left: it can fail."""
    # Popen returns once the child has become `sleep`, so that its name is there when its parent ends.
    script = (
        "import subprocess, sys; print('ready', flush=True); sys.stdin.readline();"
        "none = subprocess.DEVNULL; subprocess.Popen(['sleep', '600'], stdin=none, stdout=none, stderr=none)"
    )
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, start_new_session=True) as starter:
        assert starter.stdout.readline()
        watch = Watch(os.getpid())
        watch.look()
        starter.stdin.close()
        starter.wait()
        left = watch.left()
        for process in left:
            os.kill(process, signal.SIGKILL)
    assert [name.strip() for name in left.values()] == ["sleep 600"]


@pytest.mark.server
@pytest.mark.timeout(SECONDS)
def test_plain_vllm_is_caught_and_the_batch_invariant_server_passes(root):
    """The control and the proof: two real servers, one load, compared down to the logprobs' bits."""
    command, env = demo_command(root, VLLM_PORT=free_port())
    demo = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    watch, lines = Watch(demo.pid), []
    for line in demo.stdout:
        lines.append(line)
        watch.look()
    output = "".join(lines)
    print(output)
    status = demo.wait()
    assert len(watch.engine_cores) == 2
    assert not watch.left()
    results = {name: json.loads((root / ".demo" / f"{name}.json").read_text()) for name in ("plain", "batch-invariant")}
    for result in results.values():
        assert result["level"] == "logprobs"
        assert len(result["logprob_differences"]) == result["requests"]
    plain, ours = results["plain"], results["batch-invariant"]
    assert plain["identical_to_solo"] < plain["requests"]
    assert plain["logprob_variants"] > 1
    assert (ours["token_variants"], ours["logprob_variants"]) == (1, 1)
    assert ours["identical_to_solo"] == ours["requests"]
    assert status == 0
    assert "PASS:" in output
    assert "<h1>PASS</h1>" in (root / "report.html").read_text()


@pytest.mark.server
@pytest.mark.timeout(SECONDS)
def test_interrupting_the_demo_while_it_starts_ends_its_servers(root):
    command, env = demo_command(root, VLLM_PORT=free_port())
    demo = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    watch = Watch(demo.pid)
    for _ in demo.stdout:
        watch.look()
        if len(watch.engine_cores) == 2:
            break
    assert watch.left(), "both engine cores should run before they are interrupted"
    demo.send_signal(signal.SIGINT)
    output = demo.stdout.read()
    assert demo.wait(timeout=120) == 130
    assert "interrupted" in output
    assert not watch.left()


def test_a_harness_that_cannot_reach_the_server_is_a_failure_with_the_end_of_the_servers_log(root, tmp_path, capfd):
    code = "import signal; print('ValueError: out of memory', flush=True); signal.pause()"
    with Programs() as programs:
        server = programs.start("stand-in", [sys.executable, "-c", code], os.environ, tmp_path / "log")
        while "memory" not in server.log.read_text():
            assert server.process.poll() is None
        with pytest.raises(Failure, match=r"(?s)stand-in: the harness ended with status 2.*out of memory"):
            measure(programs, server, int(free_port()), (), tmp_path / "result.json")
    assert "nothing answers" in capfd.readouterr().err
