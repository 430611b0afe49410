#!/usr/bin/env python3
"""A fuzz target for the parser of streamed answers, guided by coverage.

    python tests/fuzz/fuzz_stream.py -runs=2000000 -max_len=4096

Three ways in: the bytes as a whole stream, as the data of its one event, and as a piece of a sound stream, before the
event that the first byte names or in its place. None may end in anything but an answer that the harness can rely on or
a failed request, and which characters end the lines makes no difference.
"""

from fuzzing import fuzz  # it puts the harness on the path

# isort: split
from determinism.protocol import Dialect
from determinism.stream import parse_stream
from oracle import DIALECTS, parsed, streamed

DONE = b"data: [DONE]\n\n"
SOUND = [(dialect, streamed(dialect)[0].split(b"\n\n")) for dialect in DIALECTS]
SAMPLES = [b"\n\n".join(events) for _, events in SOUND] + [
    bytes([2 * place]) + event for _, events in SOUND for place, event in enumerate(events)
]


def try_stream(dialect: Dialect, stream: bytes) -> None:
    answer = parsed(dialect, stream, parse_stream)
    lines = stream.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    for end in (b"\n", b"\r\n"):
        assert parsed(dialect, lines.replace(b"\n", end), parse_stream) == answer


def test_one_input(data: bytes) -> None:
    for dialect, events in SOUND:
        try_stream(dialect, data)
        try_stream(dialect, b"data: " + data + b"\n\n" + DONE)
        if data:
            place, instead = data[0] // 2 % len(events), data[0] % 2
            try_stream(dialect, b"\n\n".join([*events[:place], data[1:], *events[place + instead :]]))


if __name__ == "__main__":
    fuzz(test_one_input, SAMPLES)
