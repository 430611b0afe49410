"""The file that keeps answers for later: JSON Lines, one checksum a line, each over all lines before it.

The first line says what was asked and of which server, one line a request and its answer, and the last that the record
is whole. A line ends with the SHA-256 of the checksum before it and its own bytes, so that no byte can change, and no
line can go, come or move, without notice. The checksum of the last line stands for the whole file. It guards against
accidents and edits, not against whoever computes it anew: where that matters, keep it elsewhere.

Logprobs are written as Python writes a double, in as many digits as give the same double back. docs/records.md has
the format.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from .errors import HarnessError
from .protocol import LEVELS, PATHS, Answer, Dialect, Request

FORMAT = "batch-invariant-record"
VERSION = 1
OPENING = f'{{"format":"{FORMAT}"'.encode()
LONGEST_LINE = 1 << 26
FIRST = "0" * 64
SEAL = re.compile(rb',"sha256":"([0-9a-f]{64})"\}\n')
SEAL_LENGTH = len(',"sha256":""}\n') + 64


class RecordError(HarnessError):
    """The file is no whole record that this version can read; the text says why, and what to do."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(f"{path}: {why}")


class CutShort(RecordError):
    """All that is there is sound, and the end is missing."""


@dataclass(frozen=True)
class Header:
    """What was asked, and of which server.

    model: as the server named it. level: the strictest that was to be compared. answers: how many there will be.
    fingerprint, fields: what the server says that its bits depend on; None and empty where it says nothing.
    """

    model: str
    dialect: Dialect
    level: str
    answers: int
    created: str
    fingerprint: str | None
    fields: dict[str, Any]
    vllm: str | None

    def to_json(self) -> dict[str, Any]:
        asked = {
            "model": self.model,
            "endpoint": self.dialect.endpoint,
            "top_logprobs": self.dialect.top_logprobs,
            "vllm_fields": self.dialect.vllm_fields,
            "level": self.level,
            "answers": self.answers,
        }
        server = {"vllm": self.vllm, "fingerprint": self.fingerprint, "fields": self.fields}
        return {"format": FORMAT, "version": VERSION, "created": self.created, "asked": asked, "server": server}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Header":
        asked, server = content["asked"], content["server"]
        endpoint, top, level = asked["endpoint"], asked["top_logprobs"], asked["level"]
        require(endpoint in PATHS and level in LEVELS and (top is None or whole(top)))
        require(type(asked["vllm_fields"]) is bool and whole(asked["answers"]) and asked["answers"] > 0)
        require(isinstance(asked["model"], str) and isinstance(content["created"], str))
        fields = server["fields"]
        require(isinstance(fields, dict) and all(isinstance(v, str | int | bool | None) for v in fields.values()))
        require(all(server[name] is None or isinstance(server[name], str) for name in ("vllm", "fingerprint")))
        return cls(
            model=asked["model"],
            dialect=Dialect(endpoint, top, asked["vllm_fields"]),
            level=level,
            answers=asked["answers"],
            created=content["created"],
            fingerprint=server["fingerprint"],
            fields=fields,
            vllm=server["vllm"],
        )


@dataclass(frozen=True)
class Entry:
    """A request and its answer. A request's `cache_salt` and an answer's id and seconds are not kept."""

    request: Request
    answer: Answer

    def to_json(self, number: int) -> dict[str, Any]:
        request, answer = self.request, self.answer
        return {
            "n": number,
            "request": {
                "prompt": request.prompt if isinstance(request.prompt, str) else [*request.prompt],
                "max_tokens": request.max_tokens,
                "temperature": request.temperature,
                "seed": request.seed,
            },
            "answer": {
                "text": answer.text,
                "finish_reason": answer.finish_reason,
                "tokens": None if answer.tokens is None else [*answer.tokens],
                "logprobs": None if answer.logprobs is None else [*answer.logprobs],
                "top_logprobs": [[written(value) for value in values] for values in answer.top_logprobs],
                "prompt_ids": None if answer.prompt_ids is None else [*answer.prompt_ids],
                "prompt_tokens": answer.prompt_tokens,
            },
        }

    @classmethod
    def from_json(cls, content: dict[str, Any], number: int) -> "Entry":
        asked, given = content["request"], content["answer"]
        require(content["n"] == number and type(content["n"]) is int)
        prompt, tokens, logprobs = asked["prompt"], given["tokens"], given["logprobs"]
        require(isinstance(prompt, str) or all(whole(token) for token in prompt))
        require(whole(asked["max_tokens"]) and type(asked["temperature"]) is float and asked["temperature"] >= 0)
        require(asked["seed"] is None or whole(asked["seed"]))
        require(isinstance(given["text"], str) and isinstance(given["finish_reason"], str))
        require(tokens is None or all(isinstance(token, str) or whole(token) for token in tokens))
        require(logprobs is None or all(type(value) is float and math.isfinite(value) for value in logprobs))
        require(given["prompt_ids"] is None or all(whole(token) for token in given["prompt_ids"]))
        require(given["prompt_tokens"] is None or whole(given["prompt_tokens"]))
        return cls(
            Request(
                prompt if isinstance(prompt, str) else tuple(prompt),
                asked["max_tokens"],
                asked["temperature"],
                asked["seed"],
            ),
            Answer(
                text=given["text"],
                finish_reason=given["finish_reason"],
                tokens=None if tokens is None else tuple(tokens),
                logprobs=None if logprobs is None else tuple(logprobs),
                top_logprobs=tuple([tuple([read_number(value) for value in row]) for row in given["top_logprobs"]]),
                prompt_ids=None if given["prompt_ids"] is None else tuple(given["prompt_ids"]),
                prompt_tokens=given["prompt_tokens"],
            ),
        )


def require(holds: bool) -> None:
    if not holds:
        raise ValueError


def whole(value: Any) -> bool:
    return type(value) is int and value >= 0


def written(value: float) -> float | str:
    """JSON has no infinity, and an alternative may have the logprob -inf."""
    return value if math.isfinite(value) else repr(value)


def read_number(value: Any) -> float:
    require(value in ("inf", "-inf") if isinstance(value, str) else type(value) is float and math.isfinite(value))
    return float(value)


def sealed(content: dict[str, Any], before: str) -> tuple[bytes, str]:
    """A line of the file and its checksum, which follows the checksum `before`."""
    body = json.dumps(content, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()[:-1]
    checksum = hashlib.sha256(before.encode() + body).hexdigest()
    return body + f',"sha256":"{checksum}"}}\n'.encode(), checksum


@dataclass
class State:
    """How far a file was read: its checksum there, the offset in bytes, and whether its last line is there."""

    checksum: str = FIRST
    offset: int = 0
    lines: int = 0
    finished: bool = False


class Reader:
    """A record, read line by line: it never holds more than one answer.

    Raises, from here on:
        RecordError: the file cannot be read, is no record, is one of a later version, or was altered.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state = State()
        try:
            self.file: BinaryIO = open(path, "rb")  # noqa: SIM115 - closed by __exit__
        except OSError as error:
            raise RecordError(path, f"cannot be read: {error.strerror}") from None
        try:
            self.header = self._header()
        except BaseException:
            self.file.close()
            raise

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def entries(self) -> Iterator[Entry]:
        """The answers; afterwards `state` says whether the record is whole.

        Raises:
            CutShort: the file ends too early; `state` is where.
            RecordError: as above.
        """
        for number in range(self.header.answers):
            content = self._line()
            try:
                yield Entry.from_json(content, number)
            except (KeyError, TypeError, ValueError, OverflowError):
                raise self._altered(self.state.lines, "is no answer of a record") from None
        if self._line() != {"end": self.header.answers}:
            raise self._altered(self.state.lines, "is not the end that belongs here")
        if self._read(1):
            raise RecordError(self.path, "was altered: something follows its end")
        self.state.finished = True

    def check(self) -> State:
        """Read everything; the state at the end.

        Raises:
            RecordError: as above.
        """
        for _ in self.entries():
            pass
        return self.state

    def _header(self) -> Header:
        line = self._read(LONGEST_LINE)
        try:
            content = json.loads(line)
            known = isinstance(content, dict) and content.get("format") == FORMAT
            version = content.get("version") if known else None
        except (ValueError, RecursionError):
            known, version = False, None
        if not known:
            unfinished = not line.endswith(b"\n") and (line.startswith(OPENING) or OPENING.startswith(line))
            raise (
                CutShort(self.path, "is cut short before the first answer")
                if unfinished
                else RecordError(self.path, "is not a record")
            )
        if type(version) is not int or version > VERSION:
            raise RecordError(
                self.path, f"is a record of version {version!r:.20}; this release reads versions up to {VERSION}"
            )
        content = self._checked(line)
        try:
            return Header.from_json(content)
        except (KeyError, TypeError, ValueError):
            raise self._altered(1, "does not say what was asked") from None

    def _line(self) -> dict[str, Any]:
        return self._checked(self._read(LONGEST_LINE))

    def _read(self, size: int) -> bytes:
        try:
            return self.file.readline(size)
        except OSError as error:
            raise RecordError(self.path, f"cannot be read: {error.strerror}") from None

    def _checked(self, line: bytes) -> dict[str, Any]:
        """The line's content, once its checksum holds; an unfinished line is where the file was cut."""
        if not line.endswith(b"\n") and len(line) < LONGEST_LINE:
            raise CutShort(self.path, f"is cut short after {max(0, self.state.lines - 1)} answers")
        body, seal = line[:-SEAL_LENGTH], SEAL.fullmatch(line[-SEAL_LENGTH:])
        checksum = hashlib.sha256(self.state.checksum.encode() + body).hexdigest()
        if seal is None or seal.group(1).decode() != checksum:
            raise self._altered(self.state.lines + 1, "does not have the checksum that it should")
        try:
            content = json.loads(body + b"}")
        except (ValueError, RecursionError):
            content = None
        if not isinstance(content, dict):
            raise self._altered(self.state.lines + 1, "is no JSON object")
        self.state = State(checksum, self.state.offset + len(line), self.state.lines + 1)
        return content

    def _altered(self, line: int, what: str) -> RecordError:
        return RecordError(self.path, f"was altered: line {line} {what}")
