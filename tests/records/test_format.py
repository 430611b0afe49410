"""The file: what was written is read back to the last bit, and nothing else is ever taken for it."""

import hashlib
import json
import math
import random
import struct
from pathlib import Path

import pytest
from determinism.protocol import Answer, Dialect, Request
from determinism.recorder import Recorder, kept, partial_name
from determinism.records import FIRST, VERSION, CutShort, Entry, Header, Reader, RecordError, State, sealed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

whole = st.integers(0, 2**40)
text = st.text(st.characters())  # lone surrogates among them
double = st.floats(allow_nan=False, allow_infinity=False)
alternative = st.floats(allow_nan=False)


@st.composite
def entries(draw):
    count = draw(st.integers(0, 4))
    size = {"min_size": count, "max_size": count}
    tokens = draw(st.none() | st.lists(st.integers(0, 2**31) | text, **size))
    logprobs = draw(st.none() | st.lists(double, **size))
    tops = draw(st.lists(st.lists(alternative, max_size=3), max_size=3))
    ids = draw(st.none() | st.lists(whole, max_size=3))
    prompt = draw(text | st.lists(whole, min_size=1).map(tuple))
    request = Request(prompt, draw(whole), draw(st.floats(0, 2)), draw(st.none() | whole))
    answer = Answer(
        text=draw(text),
        finish_reason=draw(text),
        tokens=None if tokens is None else tuple(tokens),
        logprobs=None if logprobs is None else tuple(logprobs),
        top_logprobs=tuple(map(tuple, tops)),
        prompt_ids=None if ids is None else tuple(ids),
        prompt_tokens=draw(st.none() | whole),
    )
    return Entry(request, answer)


def header(answers: int, **other) -> Header:
    found = {
        "model": "m",
        "dialect": Dialect("completions", 5, True),
        "level": "logprobs",
        "created": "2026-11-25T00:00:00+00:00",
        "fingerprint": "bi-0123456789abcdef",
        "fields": {"torch": "2.13.0", "threads": 4, "batch_invariant": True, "cuda": None},
        "vllm": "0.32.0",
    }
    return Header(answers=answers, **found | other)


def write(path: Path, kept_entries: list[Entry]) -> Path:
    with Recorder(path, header(len(kept_entries)), State()) as recorder:
        for entry in kept_entries:
            recorder.add(entry)
        recorder.finish()
    return path


def read(path: Path) -> tuple[Header, list[Entry]]:
    with Reader(path) as reader:
        return reader.header, list(reader.entries())


def answer(seed: int, count: int = 4) -> Entry:
    draw = random.Random(seed)
    logprobs = tuple(-8 * draw.random() for _ in range(count))
    return Entry(
        Request(f"prompt {seed}", count),
        Answer(
            "some words", "length", tuple(range(count)), logprobs, tuple((v, -math.inf) for v in logprobs), (1, 2), 2
        ),
    )


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> bytes:
    path = write(tmp_path_factory.mktemp("good") / "record.jsonl", [answer(seed) for seed in range(5)])
    return path.read_bytes()


def refused(path: Path, content: bytes) -> RecordError:
    path.write_bytes(content)
    with pytest.raises(RecordError) as error:
        read(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)
    return error.value


anything_goes = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@anything_goes
@given(st.lists(entries(), min_size=1, max_size=4))
def test_what_is_read_is_what_was_written(tmp_path, found):
    got_header, got = read(write(tmp_path / "r", found))
    assert got_header == header(len(found))
    assert got == found


@given(st.integers(0, 2**64 - 1))
def test_a_logprob_keeps_all_its_bits(number):
    value = struct.unpack("<d", struct.pack("<Q", number))[0]
    if not math.isfinite(value):
        return
    line, _ = sealed(Entry(Request("p", 1), Answer("", "", (1,), (value,))).to_json(0), FIRST)
    (back,) = json.loads(line)["answer"]["logprobs"]
    assert struct.pack("<d", back) == struct.pack("<d", value)


def test_the_zero_with_a_sign_stays_one(tmp_path):
    _, (entry,) = read(write(tmp_path / "r", [Entry(Request("p", 1), Answer("", "", (1,), (-0.0,)))]))
    assert math.copysign(1, entry.answer.logprobs[0]) == -1


def test_the_good_file_is_read(tmp_path, good):
    (tmp_path / "r").write_bytes(good)
    assert len(read(tmp_path / "r")[1]) == 5


def test_a_file_cut_anywhere_is_refused_as_cut_short(tmp_path, good):
    for size in range(len(good)):
        assert isinstance(refused(tmp_path / "r", good[:size]), CutShort), size


def test_a_file_with_any_one_bit_changed_is_refused(tmp_path, good):
    draw = random.Random(0)
    for place in {*range(200), *range(len(good) - 100, len(good)), *draw.sample(range(len(good)), 800)}:
        changed = bytearray(good)
        changed[place] ^= 1 << draw.randrange(8)
        refused(tmp_path / "r", bytes(changed))


@anything_goes
@given(st.data())
def test_no_edit_of_the_lines_is_accepted(tmp_path, good, data):
    lines = good.splitlines(keepends=True)
    order = data.draw(st.lists(st.sampled_from(range(len(lines))), max_size=8))
    content = b"".join(lines[place] for place in order)
    if content != good:
        refused(tmp_path / "r", content)


@anything_goes
@given(place=st.integers(0, 10**9), removed=st.integers(0, 50), added=st.binary(max_size=50))
def test_no_splice_is_accepted(tmp_path, good, place, removed, added):
    place %= len(good) + 1
    content = good[:place] + added + good[place + removed :]
    if content != good:
        refused(tmp_path / "r", content)


@anything_goes
@given(
    st.binary()
    | st.binary().map(lambda tail: b'{"format":"batch-invariant-record"' + tail)
    | text.map(lambda words: words.encode("utf-8", "surrogatepass"))
)
def test_any_bytes_at_all_are_refused_in_one_line(tmp_path, content):
    refused(tmp_path / "r", content)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@anything_goes
@given(st.data())
def test_wrong_content_under_right_checksums_is_refused_in_one_line(tmp_path, data):
    """As from another program that writes the same envelope."""
    first = header(1).to_json()
    second = answer(1).to_json(0)
    target = data.draw(
        st.sampled_from([first, first["asked"], first["server"], second, second["request"], second["answer"]])
    )
    name = data.draw(st.sampled_from(sorted(target)))
    target[name] = data.draw(json_values)
    checksum, content = FIRST, b""
    try:
        for line in (first, second, {"end": 1}):
            sealed_line, checksum = sealed(line, checksum)
            content += sealed_line
    except ValueError:  # a NaN, which no writer of JSON gives
        return
    path = tmp_path / "r"
    path.write_bytes(content)
    try:
        read(path)
    except RecordError as error:
        assert "\n" not in str(error)


def test_a_later_version_is_refused_by_its_number(tmp_path, good):
    content = good.replace(b'"version":1', b'"version":2', 1)
    assert f"version 2; this release reads versions up to {VERSION}" in str(refused(tmp_path / "r", content))


@pytest.mark.parametrize("version", ["1.5", "true", '"1"', "null", "[1]", "10" * 50])
def test_a_version_that_is_none_is_refused(tmp_path, good, version):
    refused(tmp_path / "r", good.replace(b'"version":1', f'"version":{version}'.encode(), 1))


@pytest.mark.parametrize(
    "content",
    [b"hello\n", b"{}\n", b"[]\n", b"\0" * 100 + b"\n", b'{"format":"another"}\n', b"\xff\xfe\n", b"[" * 99999 + b"\n"],
)
def test_a_foreign_file_is_told_as_such(tmp_path, content):
    assert str(refused(tmp_path / "r", content)).endswith("is not a record")


def test_dos_line_endings_are_an_alteration(tmp_path, good):
    assert "altered" in str(refused(tmp_path / "r", good.replace(b"\n", b"\r\n")))


def test_a_line_without_end_is_refused_without_reading_it_whole(tmp_path, good, monkeypatch):
    monkeypatch.setattr("determinism.records.LONGEST_LINE", 2000)
    first = good.splitlines(keepends=True)[0]
    refused(tmp_path / "r", first + b"x" * 100_000)


def test_a_folder_and_a_missing_file_are_one_line(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(RecordError, match="cannot be read"):
            Reader(path)


def test_the_checksum_is_what_the_documentation_says(good):
    before = "0" * 64
    for line in good.splitlines(keepends=True):
        content, _, rest = line.rpartition(b',"sha256":"')
        before = hashlib.sha256(before.encode() + content).hexdigest()
        assert rest == before.encode() + b'"}\n'


@pytest.mark.parametrize("tail", [b"", b'{"n":3,"requ', b"\0" * 4096])
def test_a_recording_goes_on_after_its_last_whole_line(tmp_path, good, tail):
    lines = good.splitlines(keepends=True)
    path = tmp_path / "r"
    partial_name(path).write_bytes(b"".join(lines[:4]) + tail)
    old, state = kept(path)
    assert state.lines == 4
    with Recorder(path, old, state) as recorder:
        assert recorder.answers == 3
        for seed in (3, 4):
            recorder.add(answer(seed))
        recorder.finish()
    assert path.read_bytes() == good


def test_a_record_that_only_lacks_its_name_gets_it(tmp_path, good):
    path = tmp_path / "r"
    partial_name(path).write_bytes(good)
    old, state = kept(path)
    assert state.finished
    with Recorder(path, old, state) as recorder:
        assert recorder.answers == 5
        recorder.finish()
    assert path.read_bytes() == good and not partial_name(path).exists()


@pytest.mark.parametrize("content", [b"", b'{"format":"batch', b'{"format":"batch-invariant-record","vers'])
def test_a_recording_cut_in_its_first_line_begins_anew(tmp_path, content):
    partial_name(tmp_path / "r").write_bytes(content)
    assert kept(tmp_path / "r") is None


def test_a_recording_altered_before_its_end_is_not_gone_on_with(tmp_path, good):
    partial_name(tmp_path / "r").write_bytes(good.replace(b"some words", b"other word", 1))
    with pytest.raises(RecordError, match="altered"):
        kept(tmp_path / "r")
