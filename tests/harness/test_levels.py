"""Any OpenAI-compatible server is asked as richly as it takes, and what it does not offer is said, never assumed."""

import json

import pytest
from harness_kit import SHORT

OFFERS = {
    "vllm": ({}, "logprobs", None),
    "no token ids": ({"token_ids": False}, "logprobs", "tokens are told apart by their text"),
    "no logprobs": ({"logprobs": False}, "tokens", "differences too small to change a token are not seen"),
    "text alone": ({"logprobs": False, "token_ids": False}, "text", "differences that the text hides are not seen"),
    "refuses vllm's fields": ({"rejects_vllm_fields": True}, "logprobs", "tokens are told apart by their text"),
    "few alternatives": ({"max_logprobs": 1}, "logprobs", None),
    "chat alone": ({"completions": False}, "logprobs", None),
    "plain chat": ({"completions": False, "rejects_vllm_fields": True}, "logprobs", "by their text"),
    "completions alone": ({"chat": False}, "logprobs", None),
}


def offered(serve, harness, tmp_path, behaviour, *options):
    """The text and the report of a run against a server that offers that much."""
    done = harness(serve(**behaviour), *SHORT, *options, "--json", str(tmp_path / "result.json"))
    return done, json.loads((tmp_path / "result.json").read_text())


@pytest.mark.parametrize("name", OFFERS)
def test_the_strictest_level_that_is_offered_is_compared_and_its_limits_are_said(serve, harness, tmp_path, name):
    behaviour, level, limits = OFFERS[name]
    done, content = offered(serve, harness, tmp_path, behaviour)
    assert content["level"] == content["levels_offered"][-1] == level
    assert f"Compared:             {level} (the server offers" in done.stdout
    assert ("Limits:" in done.stdout) is (limits is not None)
    assert limits is None or limits in done.stdout
    assert content["answered"] == 100
    assert content["identical_to_solo"] == 100


@pytest.mark.parametrize("name", OFFERS)
def test_a_difference_is_found_at_whatever_level_is_offered(serve, harness, tmp_path, name):
    behaviour, _level, _ = OFFERS[name]
    done, content = offered(serve, harness, tmp_path, {**behaviour, "rates": {"token": 0.1}, "faults_from": 25})
    assert done.returncode == 1
    assert content["divergences"]


@pytest.mark.parametrize(
    ("behaviour", "level"),
    [({"logprobs": False}, "logprobs"), ({"logprobs": False, "token_ids": False}, "tokens")],
)
def test_a_level_that_is_not_offered_is_inconclusive_and_never_replaced_by_a_weaker_one(
    serve, harness, behaviour, level
):
    done = harness(serve(**behaviour), *SHORT, "--level", level)
    assert done.returncode == 3
    assert done.stdout == ""
    assert f"--level='{level}' cannot be compared" in done.stderr


def test_a_server_that_takes_no_completion_at_all_is_told_why(serve, harness):
    done = harness(serve(completions=False, chat=False), *SHORT)
    assert done.returncode == 2
    assert "takes no form of completion request: HTTP 404" in done.stderr


@pytest.mark.parametrize(("endpoint", "path"), [("chat", "messages"), ("completions", "prompt")])
def test_the_endpoint_can_be_chosen(serve, harness, endpoint, path):
    server = serve()
    assert harness(server, *SHORT, "--endpoint", endpoint).returncode == 0
    assert all(path in body for body in server.bodies)


def test_a_single_answer_that_lacks_what_the_server_gave_before_fails_the_run(serve, harness):
    done = harness(serve(faults={60: "no_logprobs"}), *SHORT, "--background", "0")
    assert done.returncode == 1
    assert "an answer without logprobs, which the server gave before" in done.stdout


def test_an_answer_without_its_alternatives_is_a_difference(serve, harness):
    done = harness(serve(faults={60: "no_alternatives"}), *SHORT, "--background", "0")
    assert done.returncode == 1
    assert "in the logprob of an alternative token" in done.stdout
