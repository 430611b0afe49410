"""A control must be caught by the very load that the server passed, or the pass is worth nothing."""

import json

import pytest
from harness_kit import SHORT

LOADED = 25
"""Later than the probe and every prompt alone."""


def controlled(serve, harness, tmp_path, subject: dict, control: dict, *options: str):
    """The run and its report, with a control that behaves so."""
    path = tmp_path / "result.json"
    done = harness(serve(**subject), *SHORT, "--control-url", serve(**control).url, "--json", str(path), *options)
    return done, json.loads(path.read_text())


@pytest.mark.parametrize("fault", ["token", "logprob", "alternative"])
def test_a_control_that_is_caught_makes_it_a_pass(serve, harness, tmp_path, fault):
    done, content = controlled(serve, harness, tmp_path, {}, {"rates": {fault: 0.5}, "faults_from": LOADED})
    assert done.returncode == 0
    assert "✓ SUCCESS" in done.stdout
    assert ": caught (" in done.stdout
    assert (content["verdict"], content["control"]["verdict"]) == ("pass", "fail")
    assert content["control"]["divergences"]


def test_a_control_that_passes_makes_it_inconclusive(serve, harness, tmp_path):
    done, content = controlled(serve, harness, tmp_path, {}, {})
    assert done.returncode == 3
    assert "? INCONCLUSIVE: the control passed, too" in done.stdout
    assert content["verdict"] == "inconclusive"


def test_a_control_that_differs_below_the_compared_level_is_not_caught(serve, harness, tmp_path):
    control = {"rates": {"logprob": 1.0}, "faults_from": LOADED}
    assert controlled(serve, harness, tmp_path, {}, control, "--level", "tokens")[0].returncode == 3


@pytest.mark.parametrize("fault", ["error_500", "nan", "truncate", "drop", "die"])
def test_a_control_that_breaks_was_not_caught(serve, harness, tmp_path, fault):
    control = {"rates": {fault: 1.0}, "faults_from": LOADED}
    done, content = controlled(serve, harness, tmp_path, {}, control, "--retries", "1")
    assert done.returncode in (2, 3)
    assert "✓" not in done.stdout.split("Results:")[1]
    assert "NOT caught" in done.stdout
    assert content["control"]["verdict"] == "inconclusive"


def test_a_server_that_fails_fails_whatever_its_control_does(serve, harness, tmp_path):
    subject = {"rates": {"token": 0.5}, "faults_from": LOADED}
    for control in ({}, {"rates": {"token": 0.5}, "faults_from": LOADED}):
        assert controlled(serve, harness, tmp_path, subject, control)[0].returncode == 1


def test_both_get_the_same_load(serve, harness, tmp_path):
    subject, control = serve(), serve(rates={"token": 0.5}, faults_from=LOADED)
    harness(subject, *SHORT, "--background", "0", "--control-url", control.url)
    prompts = [sorted(body["prompt"] for body in server.bodies) for server in (subject, control)]
    assert prompts[0] == prompts[1]


@pytest.mark.parametrize(
    ("control", "status", "words"),
    [
        ({"logprobs": False}, 3, "the control offers text, tokens"),
        ({"completions": False, "chat": False}, 2, "--control-url: "),
        ({"api_key": "other"}, 2, "refused the API key"),
        ({"models": ("a", "b")}, 2, "--model"),
    ],
)
def test_a_control_that_cannot_be_compared_is_told_before_the_long_run(serve, harness, control, status, words):
    subject = serve()
    done = harness(subject, *SHORT, "--control-url", serve(**control).url)
    assert (done.returncode, done.stdout) == (status, "")
    assert words in done.stderr
    assert "--control-url" in done.stderr or status == 3
    assert subject.requests == 1


def test_a_control_where_nothing_answers_is_told_before_the_long_run(serve, harness):
    dead = serve()
    dead.server.close()
    done = harness(serve(), *SHORT, "--retries", "0", "--control-url", dead.url)
    assert done.returncode == 2
    assert f"--control-url: nothing answers at {dead.url}" in done.stderr


def test_a_control_may_serve_the_model_under_another_name(serve, harness, tmp_path):
    control = {"model": "plain", "rates": {"token": 0.5}, "faults_from": LOADED}
    assert controlled(serve, harness, tmp_path, {"model": "ours"}, control)[0].returncode == 0
