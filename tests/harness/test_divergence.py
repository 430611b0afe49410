"""Where outputs part is told exactly: request, token, both tokens, both logprobs, and how many ulps are between."""

import json
import re

import pytest
from determinism.compare import digests, first_difference, largest_difference, ulps
from determinism.protocol import LEVELS, Answer
from fake_server import WORDS, answer_tokens
from harness_kit import ONE_PROMPT, ONE_PROMPT_TOKENS, SHORT

PROMPT = ONE_PROMPT[1]
FIRST_COPY = 2


def failed(serve, harness, tmp_path, fault: str, *options: str):
    """The text and the JSON report of a run whose 41st copy has a fault in its last token."""
    path = tmp_path / "result.json"
    done = harness(
        serve(faults={FIRST_COPY + 40: fault}), *SHORT, *ONE_PROMPT, "--concurrency", "1", "--json", str(path), *options
    )
    assert done.returncode == 1, done.stdout
    return done.stdout, json.loads(path.read_text())


def test_a_token_that_differs_is_named_with_its_text(serve, harness, tmp_path):
    text, content = failed(serve, harness, tmp_path, "token")
    token, logprob, _ = answer_tokens(PROMPT, ONE_PROMPT_TOKENS)[-1]
    other = (token + 1) % 1000
    assert "First difference: request 41 (prompt 1, 4 tokens)" in text
    assert "token index:  63, in the token" in text
    assert f"alone:        token {token} ({WORDS[token]!r}), logprob {logprob!r}" in text
    assert f"under load:   token {other} ({WORDS[other]!r}), logprob {logprob!r}" in text
    [found] = content["divergences"]
    assert (found["request"], found["token_index"], found["token_a"], found["token_b"]) == (41, 63, token, other)
    assert (content["token_variants"], content["logprob_variants"], content["identical_to_solo"]) == (2, 2, 99)


def test_a_logprob_that_differs_in_its_last_bit_is_found(serve, harness, tmp_path):
    text, content = failed(serve, harness, tmp_path, "logprob")
    [found] = content["divergences"]
    assert (found["what"], found["token_a"], found["ulps"]) == ("logprob", found["token_b"], 1)
    assert found["logprob_a"] == answer_tokens(PROMPT, ONE_PROMPT_TOKENS)[-1][1] != found["logprob_b"]
    assert ", 1 float32 ulps" in text
    assert (content["token_variants"], content["logprob_variants"]) == (1, 2)


def test_an_alternatives_logprob_that_differs_is_found(serve, harness, tmp_path):
    text, content = failed(serve, harness, tmp_path, "alternative")
    assert "in the logprob of an alternative token" in text
    assert (content["divergences"][0]["what"], content["divergences"][0]["ulps"]) == ("alternatives", 1)


def test_a_text_that_differs_is_told_by_its_characters(serve, harness, tmp_path):
    text, content = failed(serve, harness, tmp_path, "text", "--level", "text")
    length = sum(len(WORDS[token]) for token, _, _ in answer_tokens(PROMPT, ONE_PROMPT_TOKENS))
    assert f"in the text, after {length} equal characters" in text
    assert content["divergences"][0]["character"] == length


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("fault", "seen_from"), [("text", "text"), ("token", "text"), ("logprob", "logprobs")])
def test_each_level_sees_what_it_should_and_no_more(serve, harness, level, fault, seen_from):
    done = harness(serve(faults={50: fault}), *SHORT, *ONE_PROMPT, "--level", level)
    assert (done.returncode == 1) is (LEVELS.index(level) >= LEVELS.index(seen_from))


def test_the_earliest_request_that_differs_is_shown(serve, harness):
    done = harness(serve(faults={60: "token", 30: "token", 90: "text"}), *SHORT, *ONE_PROMPT, "--concurrency", "1")
    assert re.findall(r"First difference: request (\d+)", done.stdout) == ["29"]
    assert "3 of 100 answers under load differ" in done.stdout


def answer(**changes: object) -> Answer:
    fields = {"text": "abc", "finish_reason": "length", "tokens": (1, 2, 3), "logprobs": (-1.0, -2.0, -0.5)}
    return Answer(**fields | {"top_logprobs": ((-1.0, -3.0), (-2.0, -2.5), (-0.5, -4.0))} | changes)  # type: ignore


def parted(other: Answer, level: str = "logprobs"):
    return first_difference(answer(), other, level, request=1, prompt_id=0)


def test_equal_answers_part_nowhere():
    assert all(parted(answer(), level) is None for level in LEVELS)
    assert largest_difference(answer(), answer()) == 0.0


@pytest.mark.parametrize(
    ("changes", "index", "what"),
    [
        ({"tokens": (1, 9, 3)}, 1, "token"),
        ({"tokens": (1, 2), "logprobs": (-1.0, -2.0), "top_logprobs": ((-1.0, -3.0), (-2.0, -2.5))}, 2, "token"),
        ({"logprobs": (-1.0, -2.0, -0.25)}, 2, "logprob"),
        ({"logprobs": (-1.0, -2.5, -0.5), "tokens": (1, 2, 9)}, 1, "logprob"),
        ({"top_logprobs": ((-1.0, -3.0), (-2.0, -2.5), (-0.5, -4.5))}, 2, "alternatives"),
        ({"top_logprobs": ((-1.0, -3.0), (-2.0,), (-0.5, -4.0))}, 1, "alternatives"),
        ({"top_logprobs": ()}, 0, "alternatives"),
        ({"top_logprobs": ((-1.0, -3.0), (-2.0, -2.5), (-0.5, -float("inf")))}, 2, "alternatives"),
        ({"logprobs": None, "top_logprobs": ()}, None, "text"),
        ({"text": "abd"}, None, "text"),
        ({"finish_reason": "stop"}, None, "finish reason"),
    ],
)
def test_the_first_place_of_a_difference(changes, index, what):
    other = answer(**changes)
    if "logprobs" in changes and changes["logprobs"] is None:
        found = parted(answer(**changes, text="x"), "logprobs")
    else:
        found = parted(other)
    assert (found.token_index, found.what) == (index, what)


def test_the_signs_of_zero_are_two_values():
    """They are other bits, and only another computation gives the other one."""
    a, b = answer(logprobs=(-1.0, -2.0, 0.0)), answer(logprobs=(-1.0, -2.0, -0.0))
    assert digests(a)["tokens"] == digests(b)["tokens"]
    assert digests(a)["logprobs"] != digests(b)["logprobs"]
    assert first_difference(a, b, "logprobs", 1, 0).what == "logprob"


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [
        (1.0, 1.0, 0),
        (1.0, 1.0 + 2**-23, 1),
        (-1.0, -1.0 - 2**-23, 1),
        (0.0, -0.0, 0),
        (2**-149, -(2**-149), 2),
        (1.0, 2.0, 2**23),
        (0.1, 0.2, None),
        (1e300, 1.0, None),
        (float("inf"), 1.0, 0x7F800000 - 0x3F800000),
    ],
)
def test_ulps_count_the_float32_values_between(a, b, distance):
    assert ulps(a, b) == ulps(b, a) == distance


def test_logprobs_after_the_tokens_part_do_not_count_as_a_difference():
    """From there on the contexts differ; only the alternatives at that very place still compare."""
    other = answer(
        tokens=(1, 9, 3), logprobs=(-1.0, -7.0, -99.0), top_logprobs=((-1.0, -3.25), (-2.0, -2.5), (-9.0, -9.0))
    )
    assert largest_difference(answer(), other) == 0.25
