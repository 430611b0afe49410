#!/usr/bin/env python3
"""Wait until a server answers /health, showing how far its start is; stop early where its container ended.

Exit status: 0 when it is ready, 1 when it is not in time or its container ended, 2 for usage.
"""

import argparse
import shutil
import subprocess
import sys
import time
from urllib.parse import urlsplit

from healthcheck import healthy

SECONDS_BETWEEN = 2.0
STARTS = 3  # a container that ended this often while somebody waited does not get ready


def docker(*arguments: str) -> str:
    """What Docker says, or nothing where it says nothing: waiting works without it."""
    if shutil.which("docker") is None:
        return ""
    try:
        command = ["docker", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return (done.stdout + done.stderr).strip() if done.returncode == 0 else ""


def look_at(container: str) -> tuple[str, int, str]:
    """The container's state, how often Docker started it again, and the last line that it logged."""
    state = docker("inspect", "--format", "{{.State.Status}} {{.RestartCount}}", container) if container else ""
    if not state:
        return "", 0, ""
    status, restarts = state.split()
    lines = docker("logs", "--tail", "1", container).splitlines()
    return status, int(restarts), lines[-1].strip() if lines else ""


class Line:
    """One line that renews itself on a terminal; in a log, a line whenever what it says has changed."""

    def __init__(self) -> None:
        self.terminal = sys.stdout.isatty()
        self.said = ""

    def show(self, waited: float, words: str) -> None:
        if self.terminal:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\033[K{f'{waited:4.0f} s  {words}'[:width]}", end="", flush=True)
        elif words != self.said:
            print(f"{waited:4.0f} s  {words}", flush=True)
        self.said = words

    def end(self) -> None:
        if self.terminal and self.said:
            print("\r\033[K", end="")


def wait(url: str, container: str, seconds: float) -> str | None:
    """Wait until the server is ready: None; otherwise the sentence that says why it is not."""
    begin, line, parts = time.monotonic(), Line(), urlsplit(url)
    _, restarts_before, _ = look_at(container)
    try:
        while not healthy(parts.hostname or "127.0.0.1", parts.port or 80, seconds=5):
            waited = time.monotonic() - begin
            state, restarts, last = look_at(container)
            if state in ("exited", "dead"):
                return f"the container {container} ended; its last line: {last or 'none'}"
            if restarts - restarts_before >= STARTS:
                return f"the container {container} ends again and again; its last line: {last or 'none'}"
            if waited > seconds:
                return f"{url} was not ready within {seconds:g} s; last line of its log: {last or 'none'}"
            line.show(waited, f"waiting for {url}/health" + (f" ({state}) {last}" if state else ""))
            time.sleep(SECONDS_BETWEEN)
    finally:
        line.end()
    print(f"{url} is ready after {time.monotonic() - begin:.0f} s", flush=True)
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server (default: %(default)s)")
    parser.add_argument("--container", default="", help="its container, if it runs in one: shows its state and log")
    parser.add_argument("--seconds", type=float, default=3600, help="how long to wait (default: %(default)g)")
    arguments = parser.parse_args()
    problem = wait(arguments.url, arguments.container, arguments.seconds)
    if problem:
        print(f"wait: {problem}", file=sys.stderr)
    return 1 if problem else 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except KeyboardInterrupt:
        raise SystemExit(130) from None
