"""Nothing that the demo starts outlives it: tried with small stand-ins for a server and its workers."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import local_server
import pytest
from local_server import Failure, Programs, check_free, free_port, members, wait_until_ready

# A server that starts a worker, which starts another; `deaf` makes all of them ignore SIGTERM. It says who they are.
TREE = """
import os, signal, subprocess, sys, time
depth, deaf = int(sys.argv[1]), sys.argv[2] == "deaf"
if deaf:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if depth:
    subprocess.Popen([sys.executable, "-c", os.environ["TREE"], str(depth - 1), sys.argv[2]])
print("running", os.getpid(), flush=True)
if len(sys.argv) > 3 and sys.argv[3] == "leave":
    sys.exit(0)
signal.pause()
"""


def wait_for_lines(log, count: int) -> list[int]:
    """The processes that have said that they run, once there are `count`."""
    begin = local_server.time.monotonic()
    while len(found := re.findall(r"running (\d+)", log.read_text())) < count:
        assert local_server.time.monotonic() - begin < 60, "the stand-ins did not start"
    return [int(number) for number in found]


def runs(process: int) -> bool:
    with contextlib.suppress(OSError), open(f"/proc/{process}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] != "Z"
    return False


def start_tree(programs, tmp_path, *arguments):
    command = [sys.executable, "-c", TREE, *arguments]
    return programs.start("stand-in", command, {**os.environ, "TREE": TREE}, tmp_path / "log")


@pytest.fixture(autouse=True)
def short_patience(monkeypatch):
    monkeypatch.setattr(local_server, "PATIENCE", 1.0)


@pytest.mark.parametrize("arguments", [("2", "polite"), ("2", "deaf"), ("2", "polite", "leave")])
def test_ending_the_block_ends_grandchildren_too(tmp_path, arguments):
    with Programs() as programs:
        program = start_tree(programs, tmp_path, *arguments)
        processes = wait_for_lines(program.log, 3)
        assert sum(map(runs, processes)) >= 2
    assert not any(map(runs, processes))
    assert not members(program.process.pid)


def test_a_failure_in_the_block_ends_them_too(tmp_path):
    with pytest.raises(Failure), Programs() as programs:
        processes = wait_for_lines(start_tree(programs, tmp_path, "1", "polite").log, 2)
        raise Failure("stop")
    assert not any(map(runs, processes))


def test_each_is_asked_to_end_once(monkeypatch, tmp_path):
    """They are deaf, so that each still runs whenever a second signal could be sent."""
    asked, send = [], subprocess.Popen.send_signal
    monkeypatch.setattr(
        subprocess.Popen, "send_signal", lambda process, number: (asked.append(process.pid), send(process, number))
    )
    with Programs() as programs:
        for name in ("first", "second"):
            (tmp_path / name).mkdir()
            wait_for_lines(start_tree(programs, tmp_path / name, "0", "deaf").log, 1)
    assert asked == [program.process.pid for program in programs.started]


DEMO = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import local_server
from pathlib import Path
local_server.PATIENCE = 1.0
def interrupt(*_): raise KeyboardInterrupt
for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, interrupt)
with local_server.Programs() as programs:
    programs.start("stand-in", [sys.executable, "-c", os.environ["TREE"], "2", "polite"], os.environ, Path(sys.argv[2]))
    signal.pause()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_demo_leaves_no_process_behind(root, tmp_path, number):
    log = tmp_path / "log"
    log.touch()
    command = [sys.executable, "-c", DEMO, str(root / "vllm"), str(log)]
    demo = subprocess.Popen(command, env={**os.environ, "TREE": TREE}, stderr=subprocess.DEVNULL)
    processes = wait_for_lines(log, 3)
    demo.send_signal(number)
    demo.wait(timeout=60)
    assert not any(map(runs, processes))


class Healthy(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


def test_a_server_is_ready_when_it_says_so(tmp_path):
    with HTTPServer(("127.0.0.1", 0), Healthy) as http, Programs() as programs:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        server = start_tree(programs, tmp_path, "0", "polite")
        told: list[str] = []
        assert "stand-in" in wait_until_ready({server: http.server_port}, 60, told.append)
        assert "ready" in told[-1]
        http.shutdown()


def test_a_server_that_ends_is_reported_with_the_end_of_its_log(tmp_path):
    command = [sys.executable, "-c", "print('starting'); raise ValueError('no such model')"]
    with Programs() as programs:
        server = programs.start("stand-in", command, os.environ, tmp_path / "log")
        with pytest.raises(Failure, match=r"(?s)ended with status 1.*ValueError: no such model"):
            wait_until_ready({server: free_port()}, 60, print)


def test_a_server_that_never_answers_is_given_up(tmp_path):
    with Programs() as programs:
        server = start_tree(programs, tmp_path, "0", "polite")
        with pytest.raises(Failure, match="not ready within 0 s"):
            wait_until_ready({server: free_port()}, 0, print)


def test_a_system_without_a_compiler_is_told_what_to_install(monkeypatch):
    local_server.check_machine()
    monkeypatch.setattr(local_server.shutil, "which", lambda _: None)
    with pytest.raises(Failure, match=r"apt-get install g\+\+"):
        local_server.check_machine()


def test_a_port_in_use_is_refused_and_a_free_one_is_not():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(Failure, match="VLLM_PORT="):
            check_free(taken.getsockname()[1])
    check_free(free_port())
