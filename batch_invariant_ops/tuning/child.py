"""A process that is asked questions, may hang or crash, and is then killed: JSON, one object a line, on its pipes."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SET_PDEATHSIG = 1
START_SECONDS = 180.0
"""For a process to import what it needs, beside others that do so on a busy machine."""


class Gone(Exception):
    """The process did not answer in time, or ended; it is no more."""


class Child:
    """``python -m module``, which calls :func:`serve`.

    Ctrl-C on the terminal does not reach it: whoever made it kills it.

    Attributes:
        ended: whether it was killed, or was found dead.
    """

    def __init__(self, module: str) -> None:
        env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), env.get("PYTHONPATH"))))
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by kill
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, str(os.getpid())],
            env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, bufsize=0, start_new_session=True,
        )  # fmt: skip
        self._unread = b""
        self.ended = self._started = False

    def ask(self, seconds: float, **question: Any) -> dict[str, Any]:
        """Its answer.

        Raises:
            Gone: none came within ``seconds`` of its being there.
        """
        assert self._process.stdin is not None
        if not self._started:
            self._line(START_SECONDS)
            self._started = True
        try:
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
        except OSError:
            raise self._gone() from None
        return json.loads(self._line(seconds))

    def _line(self, seconds: float) -> bytes:
        assert self._process.stdout is not None
        until = time.monotonic() + seconds
        while b"\n" not in self._unread:
            left = until - time.monotonic()
            if left <= 0 or not select.select([self._process.stdout], [], [], left)[0]:
                self.kill()
                raise Gone(f"no answer in {seconds:g} s")
            part = os.read(self._process.stdout.fileno(), 1 << 16)
            if not part:
                raise self._gone()
            self._unread += part
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _gone(self) -> Gone:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        status, said = self._process.poll(), self._last_words()
        self.kill()
        return Gone(f"it ended with status {status}" + (f": {said}" if said else ""))

    def kill(self) -> None:
        """End it now, with all that it started; asked for by whoever asks it questions, else :meth:`stop` is."""
        self.ended = True
        self.stop()
        for pipe in (self._process.stdin, self._process.stdout, self._log):
            with contextlib.suppress(OSError):
                assert pipe is not None
                pipe.close()
        # a driver may take its time to stop a kernel; the process is not waited for longer than a user would
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)

    def stop(self) -> None:
        """Have it end: a question that waits for its answer gets :class:`Gone`."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _last_words(self) -> str:
        with contextlib.suppress(OSError, ValueError):
            self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - 4096))
            lines = self._log.read().decode(errors="replace").strip().splitlines()
            return lines[-1][:300] if lines else ""
        return ""


def serve(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Answer the parent's questions until it closes the pipe, or is no more."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(SET_PDEATHSIG, signal.SIGKILL)
    if len(sys.argv) > 1 and os.getppid() != int(sys.argv[1]):
        return
    # what compilers print must not come between the answers
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    print("{}", file=answers, flush=True)  # it is there
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=answers, flush=True)
