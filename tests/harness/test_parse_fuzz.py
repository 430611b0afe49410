"""Whatever bytes a server sends, they are an answer or a failed request: nothing else comes out of the parser."""

import json

import pytest
from determinism.probe import forms
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import DIALECTS, agree, parsed, places, replaced, sound

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just("token_id:7")
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner), max_leaves=12
)
MOST = settings(max_examples=300)


@pytest.mark.parametrize("dialect", DIALECTS, ids=str)
def test_a_sound_answer_is_read_in_full(dialect):
    answer = parsed(dialect, json.dumps(sound(dialect)).encode())
    assert answer is not None
    assert answer.level == "logprobs"
    assert len(answer.tokens) == len(answer.logprobs) == len(answer.top_logprobs) == 3


@MOST
@given(data=st.binary(max_size=200), dialect=st.sampled_from(DIALECTS))
def test_any_bytes(data, dialect):
    parsed(dialect, data)


@MOST
@given(content=anything, dialect=st.sampled_from(DIALECTS))
def test_any_json(content, dialect):
    parsed(dialect, json.dumps(content).encode())


@MOST
@given(data=st.data(), dialect=st.sampled_from(DIALECTS))
def test_a_sound_answer_with_anything_at_any_place(data, dialect):
    content = sound(dialect)
    path = data.draw(st.sampled_from(list(places(content))))
    other = parsed(dialect, json.dumps(replaced(content, path, data.draw(anything))).encode())
    if other is None:
        return
    own = parsed(dialect, json.dumps(content).encode())
    assert own is not None
    agree(own, other)


@MOST
@given(data=st.data(), dialect=st.sampled_from(DIALECTS))
def test_a_sound_answer_cut_anywhere_is_no_answer(data, dialect):
    whole = json.dumps(sound(dialect)).encode()
    assert parsed(dialect, whole[: data.draw(st.integers(0, len(whole) - 1))]) is None


@pytest.mark.parametrize("depth", [500, 900, 940, 960, 980, 990, 1000, 2000, 100_000])
def test_deep_nesting_is_malformed_wherever_it_stands(depth):
    deep = "[" * depth + "]" * depth
    for key in ("id", "finish_reason", "token_ids", "text"):
        choice = {"text": "a", "finish_reason": "stop"} | {key: "DEEP"}
        content = {"id": "x", "choices": [choice]} | ({"id": "DEEP"} if key == "id" else {})
        parsed(DIALECTS[0], json.dumps(content).replace('"DEEP"', deep).encode())


@pytest.mark.parametrize("number", ["NaN", "null", "Infinity", "-Infinity", "1e999", "-1e999", "true", '"-1"', "[]"])
def test_a_logprob_that_is_no_number_is_never_compared(number):
    for dialect in DIALECTS[:2]:
        content = sound(dialect)
        kind = content["choices"][0]["logprobs"]
        if dialect.endpoint == "chat":
            kind["content"][1]["logprob"] = "HERE"
        else:
            kind["token_logprobs"][1] = "HERE"
        assert parsed(dialect, json.dumps(content).replace('"HERE"', number).encode()) is None


def test_a_huge_number_is_no_crash():
    content = json.dumps(sound(DIALECTS[0])).replace('"token_logprobs": [', '"token_logprobs": [1' + "0" * 400 + ", ")
    assert parsed(DIALECTS[0], content.encode()) is None


def test_every_form_of_request_is_distinct():
    assert len(set(forms("auto"))) == len(forms("auto"))
