"""Run one command as the container's main process, and end it in time when the container is stopped.

vLLM drains on SIGTERM, but a request that outlives the drain keeps its connection, and the process, open for good:
after the drain and a short grace the command is killed, which closes every connection. As the container's first
process it also reaps the processes that are orphaned in it.
"""

import os
import signal
import subprocess
import sys

GRACE_SECONDS = 3  # for the HTTP server to close once the engine has drained


def run(command: list[str], env: dict[str, str], drain_seconds: int) -> int:
    """Run the command until it ends; SIGTERM and SIGINT are handed on, and SIGKILL follows after the drain.

    Returns:
        Its exit status, 128 + n where signal n ended it; 143, ended by SIGTERM, where it outlived the drain.
    """
    child = subprocess.Popen(command, env=env)
    outlived_drain = False

    def stop(number: int, _frame: object) -> None:
        child.send_signal(signal.SIGTERM)
        signal.alarm(drain_seconds + GRACE_SECONDS)

    def kill(_number: int, _frame: object) -> None:
        nonlocal outlived_drain
        outlived_drain = True
        print(
            f"entrypoint: not every request ended within {drain_seconds} s: closing their connections", file=sys.stderr
        )
        child.send_signal(signal.SIGKILL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    signal.signal(signal.SIGALRM, kill)
    while True:
        pid, status = os.waitpid(-1, 0)
        if pid == child.pid:
            code = -signal.SIGTERM if outlived_drain else os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code
