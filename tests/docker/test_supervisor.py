"""The container's main process ends when it is told to, whatever the server below it does."""

import subprocess
import sys
from pathlib import Path

import pytest

VLLM = Path(__file__).resolve().parents[2] / "vllm"
READY = "print('ready', flush=True)\n"
OBEYS = "import signal, sys\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n" + READY + "signal.pause()"
IGNORES = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + READY + "while True: signal.pause()"
SUPERVISE = f"import os, sys; sys.path.insert(0, {str(VLLM)!r}); import supervisor; supervisor.GRACE_SECONDS = 1\n"
SUPERVISE += "raise SystemExit(supervisor.run([sys.executable, '-c', sys.argv[1]], dict(os.environ), 1))"


def supervise(server: str) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", SUPERVISE, server], **pipes)


def test_its_status_is_the_servers():
    assert supervise("raise SystemExit(5)").wait(30) == 5


@pytest.mark.parametrize("end", ["terminate", "send_signal"])
def test_a_server_that_obeys_ends_by_itself(end):
    main = supervise(OBEYS)
    assert main.stdout.readline() == "ready\n"
    main.terminate() if end == "terminate" else main.send_signal(2)
    _, err = main.communicate(timeout=30)
    assert main.returncode == 7 and "closing" not in err


def test_a_server_that_hangs_is_killed_after_the_drain():
    main = supervise(IGNORES)
    assert main.stdout.readline() == "ready\n"
    main.terminate()
    _, err = main.communicate(timeout=30)
    assert main.returncode == 128 + 15 and "closing their connections" in err


def test_a_server_that_is_killed_ends_the_container_with_a_failure():
    assert supervise("import os, signal; os.kill(os.getpid(), signal.SIGKILL)").wait(30) == 128 + 9


def test_orphans_are_reaped_and_do_not_count_as_the_server():
    orphan = "import os, sys\nif os.fork() == 0:\n    os.fork(); os._exit(1)\nos.wait(); sys.exit(6)"
    assert supervise(orphan).wait(30) == 6
