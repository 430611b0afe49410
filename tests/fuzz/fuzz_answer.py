#!/usr/bin/env python3
"""A fuzz target for the parser of a server's whole answers, guided by coverage.

    python tests/fuzz/fuzz_answer.py -runs=2000000 -max_len=4096

Two ways in: the bytes as the body of a response, and the bytes as JSON at one place of a sound answer, which the first
byte names. Neither may end in anything but an answer that the harness can rely on or a failed request, and the same
JSON written anew is the same answer.
"""

import json
from typing import Any

from fuzzing import fuzz  # it puts the harness on the path

# isort: split
from oracle import DIALECTS, agree, parsed, places, replaced, sound

SOUND = [(dialect, sound(dialect)) for dialect in DIALECTS]
PLACES = [(dialect, content, path) for dialect, content in SOUND for path in places(content)]
SAMPLES = [json.dumps(content).encode() for _, content in SOUND] + [
    bytes([place]) + value
    for place in range(0, len(PLACES), 8)
    for value in (b'[{"a": -Infinity}, null]', b"1e999", b'"token_id:7"', b'{"message": "no"}')
]


def read(data: bytes) -> Any:
    """The JSON value in the bytes; None where there is none, and for null."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def test_one_input(data: bytes) -> None:
    content = read(data)
    for dialect in DIALECTS:
        answer = parsed(dialect, data)
        assert answer is None or answer == parsed(dialect, json.dumps(content).encode())
    if not data:
        return
    dialect, whole, path = PLACES[data[0] % len(PLACES)]
    try:
        changed = json.dumps(replaced(whole, path, read(data[1:]))).encode()
    except RecursionError:  # deeper than JSON is written
        return
    other = parsed(dialect, changed)
    if other is not None:
        agree(parsed(dialect, json.dumps(whole).encode()), other)


if __name__ == "__main__":
    fuzz(test_one_input, SAMPLES)
