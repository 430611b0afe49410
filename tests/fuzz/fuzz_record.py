#!/usr/bin/env python3
"""A fuzz target for the reader of records, guided by coverage.

    python tests/fuzz/fuzz_record.py -runs=2000000 -max_len=4096

Two ways in: the bytes as a file, and the bytes as the lines' contents under right checksums. Neither may end in
anything but a record or one line that refuses it, and a file may be read only if writing what was read gives its bytes.
"""

import json
import tempfile
from pathlib import Path

from fuzzing import fuzz  # it puts the harness on the path

# isort: split
from determinism.protocol import Answer, Dialect, Request
from determinism.records import FIRST, Entry, Header, Reader, RecordError, sealed

FOLDER = tempfile.TemporaryDirectory()
FILE = Path(FOLDER.name, "record.jsonl")


def lines(contents: list[dict]) -> bytes:
    checksum, written = FIRST, b""
    for content in contents:
        line, checksum = sealed(content, checksum)
        written += line
    return written


def sample() -> list[dict]:
    header = Header("m", Dialect("completions", 5, True), "logprobs", 1, "2026", "bi-0", {"threads": 1}, "0.32.0")
    answer = Answer("a b", "length", (1, 2), (-0.5, -0.25), ((-0.5, float("-inf")),) * 2, (3,), 1)
    return [header.to_json(), Entry(Request("p", 2), answer).to_json(0), {"end": 1}]


def try_bytes(data: bytes) -> None:
    """Whatever is accepted is what its own content is written as."""
    FILE.write_bytes(data)
    try:
        with Reader(FILE) as reader:
            contents = [reader.header.to_json()]
            contents += [entry.to_json(number) for number, entry in enumerate(reader.entries())]
            contents.append({"end": reader.header.answers})
    except RecordError as error:
        assert "\n" not in str(error)
    else:
        assert lines(contents) == data, "a file was accepted that no recorder writes"


def test_one_input(data: bytes) -> None:
    try_bytes(data)
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return
    if isinstance(content, dict) and content:
        for place in range(2):
            try:
                whole = lines([*sample()[:place], {**sample()[place], **content}, *sample()[place + 1 :]])
            except (ValueError, RecursionError):  # NaN, or deeper than JSON is written
                continue
            FILE.write_bytes(whole)
            try:
                with Reader(FILE) as reader:
                    reader.check()
            except RecordError as error:
                assert "\n" not in str(error)


SAMPLES = [lines(contents) for contents in (sample(), sample()[:2], sample()[:1])]


if __name__ == "__main__":
    fuzz(test_one_input, SAMPLES)
