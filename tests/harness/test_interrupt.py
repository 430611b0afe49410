"""Ctrl-C keeps what was seen, says that it is partial, and is never a pass."""

import json
import re
import signal
import subprocess

import pytest
from harness_kit import COMMAND, ONE_PROMPT, environment

LONG = ("--requests", "1000000", "--concurrency", "5", "--max-tokens", "8")


def interrupted(server, requests: int, *options: str, number: int = signal.SIGINT) -> subprocess.CompletedProcess[str]:
    """The command, interrupted once the server has seen so many requests."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [*COMMAND, "--url", server.url, *options]
    with subprocess.Popen(command, env=environment(), **pipes) as process:  # type: ignore[call-overload]
        server.wait_for_requests(requests)
        process.send_signal(number)
        output, errors = process.communicate(timeout=60)
    assert "Traceback" not in errors
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_partial_results_are_printed_and_said_to_be_partial(serve, tmp_path, number):
    path = tmp_path / "result.json"
    done = interrupted(serve(), 200, *LONG, "--json", str(path), number=number)
    assert done.returncode == 130
    assert re.search(r"Total requests: [1-9]\d* of 1000000 \(partial\)", done.stdout)
    assert "? INCONCLUSIVE: interrupted; partial results" in done.stdout
    content = json.loads(path.read_text())
    assert (content["partial"], content["verdict"]) == (True, "inconclusive")
    assert content["answered"] > 0


def test_what_had_differed_by_then_is_told(serve):
    done = interrupted(serve(faults={20: "token"}), 200, *LONG, *ONE_PROMPT)
    assert done.returncode == 130
    assert "✗ FAILURE: interrupted" in done.stdout
    assert "First difference: request" in done.stdout


def test_before_any_answer_there_is_nothing_to_print(serve):
    done = interrupted(serve(rates={"stall": 1.0}), 1, *LONG)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr.count("\n") == 1
    assert "interrupted" in done.stderr


def test_an_interrupted_control_leaves_the_pass_unproven(serve):
    control = serve(rates={"stall": 1.0}, faults_from=12)
    subject = serve()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [*COMMAND, "--url", subject.url, "--max-tokens", "8", "--control-url", control.url]
    with subprocess.Popen(command, env=environment(), **pipes) as process:  # type: ignore[call-overload]
        control.wait_for_requests(13)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "? INCONCLUSIVE: the control showed nothing: interrupted" in output
    assert "Total requests: 100\n" in output
    assert errors == ""
