"""Whatever a server, a proxy or the network does wrong, it is told, and nothing of it becomes a pass."""

import json
import re
import time

import pytest
from determinism.client import Server, retry_after
from determinism.settings import Target
from harness_kit import ONE_PROMPT, SHORT

ALONE, FIRST_COPY = 1, 2
BROKEN = {
    "truncate": "malformed",
    "not_json": "malformed",
    "error_500": "http",
    "nan": "nan",
    "null": "nan",
    "no_choice": "malformed",
    "two_choices": "malformed",
    "no_logprobs": "malformed",
}


def reported(harness, server, tmp_path, *options: str):
    path = tmp_path / "result.json"
    path.unlink(missing_ok=True)
    done = harness(server, *SHORT, *ONE_PROMPT, "--json", str(path), *options)
    return done, json.loads(path.read_text()) if path.exists() else None


@pytest.mark.parametrize("fault", BROKEN)
def test_one_broken_answer_of_a_hundred_fails_the_run_and_is_named(serve, harness, tmp_path, fault):
    done, content = reported(harness, serve(faults={50: fault}), tmp_path)
    assert done.returncode == 1
    assert "✗ FAILURE: 1 requests got no sound answer" in done.stdout
    assert (content["answered"], content["failed"], content["verdict"]) == (99, 1, "fail")
    assert [failure["kind"] for failure in content["failures"]] == [BROKEN[fault]]
    assert not content["divergences"]


@pytest.mark.parametrize("fault", [*BROKEN, "swap"])
def test_a_broken_answer_alone_ends_the_run_without_a_pass(serve, harness, tmp_path, fault):
    server = serve(faults={ALONE: fault})
    done, _ = reported(harness, server, tmp_path)
    if fault == "swap":  # the answer alone is not the one that the prompt has; its copies tell
        assert done.returncode == 1
        assert "answer to another prompt" in done.stdout
    else:
        assert done.returncode == 1
        assert "prompt 1 (" in done.stderr
        assert server.requests == 2


@pytest.mark.parametrize("fault", [*BROKEN, "drop", "busy"])
def test_a_server_that_always_fails_is_refused_at_the_probe(serve, harness, fault):
    done = harness(serve(rates={fault: 1.0}), *SHORT, "--retries", "0")
    if fault == "no_logprobs":  # it is a server without logprobs, of which a pass without a control is worth nothing
        assert done.returncode == 3
        assert "✓" not in done.stdout.split("Results:")[1]
    else:
        assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)


def test_dropped_connections_are_retried_and_counted(serve, harness, tmp_path):
    faults = dict.fromkeys((3, 20, 21, 60), "drop")
    done, content = reported(harness, serve(faults=faults), tmp_path)
    assert done.returncode == 0
    assert content["retried_connections"] == 4
    assert "Retried:              4 dropped connections" in done.stdout
    assert content["answered"] == 100


def test_connections_that_are_reset_at_random_lose_nothing(serve, harness, tmp_path):
    done, content = reported(
        harness, serve(rates={"drop": 0.2}, seed=3), tmp_path, "--background", "2", "--retries", "20"
    )
    assert done.returncode == 0
    assert content["answered"] == 100
    assert content["retried_connections"] > 10


def test_a_request_that_is_dropped_at_every_try_fails_the_run(serve, harness, tmp_path):
    done, content = reported(harness, serve(rates={"drop": 1.0}, faults_from=90), tmp_path, "--retries", "1")
    assert done.returncode == 1
    assert {failure["kind"] for failure in content["failures"]} == {"dropped"}
    assert content["answered"] + content["failed"] == 100


@pytest.mark.parametrize(("fault", "status"), [("busy", 503), ("limited", 429)])
def test_a_busy_server_is_asked_again_when_it_says(serve, harness, tmp_path, fault, status):
    done, content = reported(harness, serve(faults=dict.fromkeys((5, 30, 31), fault)), tmp_path)
    assert done.returncode == 0
    assert (content["retried_busy"], content["retried_connections"]) == (3, 0)
    assert "3 answers to come back later" in done.stdout
    always, content = reported(harness, serve(rates={fault: 1.0}, faults_from=80), tmp_path, "--retries", "1")
    assert always.returncode == 1
    assert {failure["kind"] for failure in content["failures"]} == {"busy"}
    assert f"HTTP {status}" in always.stdout


def test_a_request_that_is_never_answered_fails_in_time(serve, harness, tmp_path):
    done, content = reported(harness, serve(faults={50: "stall"}), tmp_path, "--timeout", "5")
    assert done.returncode == 1
    assert [failure["kind"] for failure in content["failures"]] == ["timeout"]
    assert content["answered"] == 99


def test_a_server_that_dies_in_mid_run_is_unreachable_and_its_partial_results_are_printed(serve, harness, tmp_path):
    done, content = reported(harness, serve(faults={50: "die"}), tmp_path, "--retries", "1")
    assert done.returncode == 2
    assert "? INCONCLUSIVE: nothing answers at" in done.stdout
    assert re.search(r"Total requests: \d+ of 100 \(partial\)", done.stdout)
    assert (content["partial"], content["verdict"]) == (True, "inconclusive")
    assert 0 < content["answered"] < 100


def test_a_server_that_differed_before_it_died_has_failed(serve, harness, tmp_path):
    done, content = reported(harness, serve(faults={10: "token", 50: "die"}), tmp_path, "--retries", "1")
    assert done.returncode == 1
    assert content["divergences"]
    assert content["partial"]


def test_a_server_that_is_killed_and_restarted_in_mid_run_is_only_retried(serve, harness, tmp_path):
    done, content = reported(harness, serve(faults={50: "restart"}), tmp_path)
    assert done.returncode == 0
    assert content["retried_connections"] > 0
    assert content["answered"] == 100


@pytest.mark.parametrize("vllm", [True, False])
def test_a_proxy_that_swaps_answers_is_caught(serve, harness, tmp_path, vllm):
    """With vLLM's prompt ids it is known for what it is; without them the answers differ."""
    options = ("--prompt", "three other words")
    server = serve(faults={40: "swap"}, rejects_vllm_fields=not vllm)
    done, content = reported(harness, server, tmp_path, *options)
    assert done.returncode == 1
    kinds = [failure["kind"] for failure in content["failures"]]
    assert kinds == ["replaced"]


def test_a_proxy_that_gives_two_waiting_requests_each_others_answers_is_caught(serve, harness, tmp_path):
    options = ("--prompt", "two roads one river")
    done, content = reported(harness, serve(reorders=True), tmp_path, *options)
    assert done.returncode == 1
    assert content["divergences"] or content["failures"]


def test_answers_from_a_cache_prove_nothing(serve, harness, tmp_path):
    done, content = reported(harness, serve(same_id=True), tmp_path)
    assert done.returncode == 3
    assert "bear the id of an earlier one" in content["reason"]


def test_empty_answers_prove_nothing(serve, harness, tmp_path):
    done, content = reported(harness, serve(empty=True), tmp_path)
    assert done.returncode == 3
    assert "every answer is empty" in content["reason"]


def test_two_servers_behind_one_address_prove_nothing(serve, harness, tmp_path):
    done, content = reported(harness, serve(fingerprints=("one", "two")), tmp_path)
    assert done.returncode == 3
    assert "2 system fingerprints" in content["reason"]
    assert reported(harness, serve(fingerprints=("one",)), tmp_path)[0].returncode == 0


def test_other_traffic_that_fails_was_no_load(serve, harness, tmp_path):
    done, content = reported(harness, serve(background_fault="error_500"), tmp_path, "--background", "2")
    assert done.returncode == 3
    assert "requests of the other traffic failed" in content["reason"]


@pytest.mark.parametrize("pairs", [(50, "token"), (50, "nan"), (50, "swap")])
def test_the_twin_without_the_fault_passes(serve, harness, tmp_path, pairs):
    """Every check above could fail for another reason than its fault; this is the same run without one."""
    number, fault = pairs
    assert reported(harness, serve(faults={number: fault}), tmp_path)[0].returncode == 1
    assert reported(harness, serve(), tmp_path)[0].returncode == 0


class Header:
    """A response with that Retry-After."""

    def __init__(self, value: str | None) -> None:
        self.headers = {} if value is None else {"retry-after": value}


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("0", 0.0),
        ("7", 7.0),
        ("-5", 0.0),
        ("1.5", None),
        ("nan", None),
        ("soon", None),
        ("", None),
        (None, None),
        ("9" * 400, None),
        ("Fri, 31 Dec 1999 23:59:59 GMT", 0.0),
        ("Fri, 99 Dec 1999 23:59:59 GMT", None),
    ],
)
def test_retry_after_in_each_of_its_forms(value, seconds):
    assert retry_after(Header(value)) == seconds  # type: ignore[arg-type]


def test_a_clock_that_jumps_changes_no_wait_but_that_of_a_date(monkeypatch):
    """A date is the one thing that asks the wall clock, and what it gives is bounded by the caller."""
    date = "Fri, 31 Dec 1999 23:59:59 GMT"
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert retry_after(Header(date)) > 1e8  # type: ignore[arg-type]
    assert Server(Target("http://127.0.0.1:1")).target.longest_wait_s == 60.0
    monkeypatch.setattr(time, "time", lambda: 4e9)
    assert retry_after(Header(date)) == 0.0  # type: ignore[arg-type]
