"""Start programs on this machine so that none of them, and nothing they start, outlives whoever asked for them.

Each runs in a session of its own. Ending it ends the session: the API server, the engine core and its workers alike,
also where the first of them is gone already.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from healthcheck import healthy

PATIENCE = 20.0  # seconds between a polite end and a kill
LOOK_AGAIN = 0.25  # seconds
TELL_EVERY = 10.0  # seconds between two signs of life while a server starts
PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None)  # loaded before any fork


class Failure(Exception):
    """What went wrong, in the lines that the user reads."""


def interrupt(number: int, _frame: object) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)


def run_command(name: str, work: Callable[[], int], failures: tuple[type[Exception], ...] = (Failure,)) -> int:
    """A command's work; its exit status, or 2 after the line of a failure, or 130 after Ctrl-C or another signal."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    try:
        return work()
    except failures as failure:
        print(f"{name}: {failure}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted; its servers have ended", file=sys.stderr)
        return 130


def members(session: int) -> list[int]:
    """The processes of a session that still run; a zombie is none."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            state, _parent, _group, its_session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(its_session) == session and state != "Z":
                found.append(int(entry.name))
    return found


def die_with_parent() -> None:
    """Ask the kernel to end this process when its parent is gone: the parent may be killed without a word."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


class Program:
    """A command in a session of its own.

    Its output goes to `log`, or where this process's output goes if there is none.
    """

    def __init__(self, name: str, command: Sequence[str], env: Mapping[str, str], log: Path | None = None) -> None:
        self.name, self.log = name, log
        output = open(log, "wb") if log else None  # noqa: SIM115 - the child owns it, this copy is closed below
        try:
            self.process = subprocess.Popen(
                command,
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT if output else None,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        finally:
            if output:
                output.close()

    def ask_to_end(self) -> None:
        """SIGTERM to the first process, which ends the others; to all of them where it is gone.

        Ask once: a second signal may come when it has put its handler away, and would kill it at its last work.
        """
        with contextlib.suppress(ProcessLookupError):
            if self.process.poll() is None:
                self.process.terminate()
            else:
                os.killpg(self.process.pid, signal.SIGTERM)

    def stop(self) -> None:
        """End the session, politely first; returns when nothing of it runs."""
        self.ask_to_end()
        self.wait_for_end()

    def wait_for_end(self) -> None:
        """Return when nothing of a session that was asked to end runs; what still does after PATIENCE is killed."""
        session = self.process.pid
        deadline = time.monotonic() + PATIENCE
        while members(session):
            self.process.poll()
            if time.monotonic() > deadline:
                for process in members(session):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process, signal.SIGKILL)
            time.sleep(LOOK_AGAIN)
        self.process.wait()

    def doing(self) -> str:
        """The newest line of the log that says something, without its prefix and cut to fit."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines() if self.log else []
        said = [line.rpartition("] ")[2].strip() for line in lines if " INFO " in line]
        return next((line for line in reversed(said) if line), "starting")[:90]

    def last_lines(self, count: int = 12) -> str:
        """The end of the log: from the last error on, if one is near the end."""
        if not self.log:
            return ""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-200:]
        errors = [number for number, line in enumerate(lines) if "Error" in line or line.startswith("serve:")]
        end = errors[-1] + 2 if errors else len(lines)
        return "\n".join(f"    {line}" for line in lines[max(0, end - count) : end])


class Programs(contextlib.AbstractContextManager):
    """The programs started in a block: whatever ends it ends them, and a second Ctrl-C does not interrupt that."""

    def __init__(self) -> None:
        self.started: list[Program] = []

    def start(self, name: str, command: Sequence[str], env: Mapping[str, str], log: Path | None = None) -> Program:
        self.started.append(Program(name, command, env, log))
        return self.started[-1]

    def __exit__(self, *_: object) -> None:
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        previous = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
        for program in self.started:
            program.ask_to_end()
        for program in self.started:
            program.wait_for_end()
        for number, handler in previous.items():
            signal.signal(number, handler)


def wait_until_ready(servers: Mapping[Program, int], seconds: float, tell: Callable[[str], None]) -> dict[str, float]:
    """Wait for /health of each server's port; the seconds that each took, by name.

    Raises:
        Failure: one ended, or `seconds` went by; with the end of its log.
    """
    begin = time.monotonic()
    ready: dict[str, float] = {}
    told = begin
    while len(ready) < len(servers):
        for server, port in servers.items():
            if server.process.poll() is not None:
                reason = f"{server.name}: the server ended with status {server.process.returncode}"
            elif time.monotonic() - begin > seconds:
                reason = f"{server.name}: the server was not ready within {seconds:.0f} s"
            else:
                if server.name not in ready and healthy("127.0.0.1", port, seconds=5):
                    ready[server.name] = time.monotonic() - begin
                    tell(f"{server.name}: ready after {ready[server.name]:.0f} s")
                continue
            raise Failure(f"{reason}; the end of {server.log}:\n{server.last_lines()}")
        if time.monotonic() - told > TELL_EVERY and len(ready) < len(servers):
            told = time.monotonic()
            waiting = [server for server in servers if server.name not in ready]
            tell(f"  {told - begin:3.0f} s  {waiting[-1].name}: {waiting[-1].doing()}")
        time.sleep(LOOK_AGAIN)
    return ready


def check_machine() -> None:
    """What vLLM's CPU build needs from the system, beside Python packages.

    Raises:
        Failure: with the line for the user.
    """
    header = Path(sysconfig.get_path("include"), "Python.h")
    found = {"g++": bool(shutil.which("g++")), "libnuma1": has_library("libnuma.so.1"), "python3-dev": header.is_file()}
    missing = [package for package, there in found.items() if not there]
    if missing:
        raise Failure(f"the system lacks what vLLM's CPU build needs: apt-get install {' '.join(missing)}")


def has_library(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def check_free(port: int) -> None:
    """Refuse a port that somebody listens on.

    Raises:
        Failure: with the line for the user.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise Failure(
                f"VLLM_PORT='{port}' is not valid: 127.0.0.1:{port} cannot be listened on ({error.strerror}); "
                "another port is needed, like VLLM_PORT=8001"
            ) from None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
