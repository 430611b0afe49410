"""What a check says: a level, a subject, a sentence and, where something is wrong, the command that mends it."""

import re
import shutil
import subprocess
from dataclasses import dataclass

OK, WARNING, FAILURE = "ok", "warning", "failure"


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's answer. `mend` is a command or a setting, empty where nothing needs mending."""

    level: str
    subject: str
    detail: str
    mend: str = ""


def ok(subject: str, detail: str) -> Finding:
    return Finding(OK, subject, detail)


def warning(subject: str, detail: str, mend: str) -> Finding:
    return Finding(WARNING, subject, detail, mend)


def failure(subject: str, detail: str, mend: str) -> Finding:
    return Finding(FAILURE, subject, detail, mend)


@dataclass(frozen=True)
class Answer:
    """What a command did: its exit status and its output, stripped; status 127 where it is not installed."""

    status: int
    text: str

    @property
    def last_line(self) -> str:
        return self.text.splitlines()[-1] if self.text else f"exit status {self.status}, no output"


def ask(*command: str, seconds: float = 30) -> Answer:
    """Run a command that only looks; standard error is returned after standard output."""
    if shutil.which(command[0]) is None:
        return Answer(127, f"{command[0]} is not installed")
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return Answer(124, f"{command[0]} did not answer within {seconds:g} s")
    except OSError as error:
        return Answer(126, f"{command[0]} cannot be run: {error.strerror}")
    return Answer(done.returncode, (done.stdout if done.returncode == 0 else done.stdout + done.stderr).strip())


def version_in(text: str) -> tuple[int, ...]:
    """The first dotted number of a text, as a tuple to compare: 'v2.24.1-desktop' is (2, 24, 1); () where none is."""
    found = re.search(r"\d+(?:\.\d+)+", text)
    return tuple(int(part) for part in found.group().split(".")) if found else ()


def gib(size: float) -> str:
    """Bytes in words."""
    return f"{size / 2**30:.1f} GiB"
