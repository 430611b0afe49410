"""Whatever bytes a stream is made of, it is one answer or a failed request; a sound one is the same answer as whole."""

import json

import pytest
from determinism.protocol import parse
from determinism.stream import events, parse_stream
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import DIALECTS, parsed, streamed
from test_parse_fuzz import anything

MOST = settings(max_examples=200)
ENDS = st.sampled_from(["\n", "\r\n", "\r"])


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_stream_is_the_answer_that_it_would_be_whole(dialect):
    stream, whole = streamed(dialect)
    one, other = parse_stream(dialect, stream), parse(dialect, whole)
    assert (one.text, one.tokens, one.logprobs, one.top_logprobs) == (
        other.text, other.tokens, other.logprobs, other.top_logprobs,
    )  # fmt: skip
    assert (one.prompt_ids, one.prompt_tokens, one.finish_reason) == (
        other.prompt_ids, other.prompt_tokens, other.finish_reason,
    )  # fmt: skip


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_stream_that_is_cut_anywhere_is_no_answer(dialect):
    stream, _ = streamed(dialect)
    last = stream.index(b"[DONE]") + len(b"[DONE]\n")
    for end in range(last):
        assert parsed(dialect, stream[:end], parse_stream) is None, stream[:end][-40:]
    assert parsed(dialect, stream[:last], parse_stream) is not None


@pytest.mark.parametrize("dialect", DIALECTS)
@MOST
@given(data=st.data())
def test_a_stream_with_one_piece_out_of_place_is_read_or_refused(dialect, data):
    stream, _ = streamed(dialect)
    parts = stream.split(b"\n\n")
    place = data.draw(st.integers(0, len(parts) - 1))
    other = data.draw(st.binary(max_size=30) | anything.map(lambda value: b"data: " + json.dumps(value).encode()))
    parts[place : place + data.draw(st.integers(0, 1))] = [other]
    parsed(dialect, b"\n\n".join(parts), parse_stream)


@MOST
@given(st.binary(max_size=300))
def test_any_bytes_are_read_or_refused(data):
    for dialect in DIALECTS:
        parsed(dialect, data, parse_stream)
        parsed(dialect, b"data: " + data + b"\n\ndata: [DONE]\n\n", parse_stream)


@MOST
@given(st.lists(st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), max_size=20)), ENDS)
def test_events_are_found_whatever_ends_their_lines(values, end):
    lines = "".join(f": a comment{end}data: {value}{end}{end}" for value in values)
    assert list(events(lines.encode())) == values
