"""The text has the shape that scripts rely on, byte for byte; what is added comes below it."""

import contextlib
import os
import pty
import re
import subprocess

import pytest
from harness_kit import COMMAND, ONE_PROMPT, SHORT, environment

RULE = "─" * 64


def shape(requests: int, concurrency: int) -> str:
    batches = [
        f"Sending batch {n} ({min(concurrency, requests - start)} requests)... ✓\n"
        for n, start in enumerate(range(0, requests, concurrency), start=1)
    ]
    return (
        f"Testing determinism with {requests} requests ({concurrency} concurrent)\n"
        + "".join(batches)
        + f"{RULE}\n\nResults:\n  Total requests: {requests}\n  Unique outputs: 1\n\n"
        + "✓ SUCCESS: All outputs are identical (deterministic)!\n"
    )


@pytest.mark.parametrize(("requests", "concurrency"), [(100, 10), (105, 25), (120, 500)])
def test_a_pass_begins_with_exactly_the_fixed_shape(serve, harness, requests, concurrency):
    done = harness(serve(), "--requests", str(requests), "--concurrency", str(concurrency), "--max-tokens", "16")
    assert done.returncode == 0
    assert done.stdout.startswith(shape(requests, concurrency))
    assert done.stdout.removeprefix(shape(requests, concurrency)).startswith("\nDetails:\n")
    assert done.stderr == ""


def test_the_defaults_are_those_of_the_fixed_shape(serve, harness):
    assert harness(serve()).stdout.startswith(shape(100, 10))


def test_a_failure_has_the_same_shape_with_a_cross(serve, harness):
    done = harness(serve(faults={30: "token"}), *SHORT, *ONE_PROMPT)
    assert done.returncode == 1
    begin, _, rest = shape(100, 10).partition("  Unique outputs: 1\n")
    assert done.stdout.startswith(begin + "  Unique outputs: 2\n\n✗ FAILURE: ")
    assert rest.startswith("\n✓ SUCCESS")


def test_a_batch_with_a_request_that_failed_gets_no_check_mark(serve, harness):
    """Ten ask at once, and whose question comes 26th is the scheduler's choice; one at a time it is the 24th copy's."""
    done = harness(serve(faults={25: "error_500"}), *SHORT, *ONE_PROMPT)
    assert len(re.findall(r"Sending batch \d+ \(10 requests\)\.\.\. ✗ \(1 not answered\)\n", done.stdout)) == 1
    assert done.stdout.count("... ✓") == 9
    done = harness(serve(faults={25: "error_500"}), *SHORT, *ONE_PROMPT, "--concurrency", "1")
    assert "\nSending batch 24 (1 requests)... ✗ (1 not answered)\n" in done.stdout
    assert done.stdout.count("... ✓") == 99


def test_quiet_prints_the_verdict_alone(serve, harness):
    done = harness(serve(), *SHORT, "--quiet")
    assert done.stdout == "✓ SUCCESS: All outputs are identical (deterministic)!\n"
    done = harness(serve(faults={50: "text"}), *SHORT, *ONE_PROMPT, "--quiet")
    assert done.stdout.startswith("✗ FAILURE: ")
    assert done.stdout.count("\n") == 1


def on_a_terminal(*command: str, **settings: str) -> str:
    """What a terminal gets to see of a command."""
    ours, its = pty.openpty()
    with subprocess.Popen(command, env=environment(**settings), stdin=its, stdout=its, stderr=its):
        os.close(its)
        seen = bytearray()
        with contextlib.suppress(OSError):  # Linux's way to say that the other end is closed
            while part := os.read(ours, 65536):
                seen += part
    os.close(ours)
    return seen.decode()


def test_colours_and_progress_are_for_a_terminal_alone(serve, harness):
    server = serve()
    seen = on_a_terminal(*COMMAND, "--url", server.url, *SHORT)
    assert "\033[32m✓ SUCCESS: All outputs are identical (deterministic)!\033[0m" in seen
    assert "Each prompt alone: 3/8" in seen
    plain = harness(server, *SHORT).stdout
    assert "\033" not in plain
    assert "\r" not in plain
    assert "alone:" not in plain


@pytest.mark.parametrize(("options", "settings"), [(("--no-color",), {}), ((), {"NO_COLOR": "1"})])
def test_colours_can_be_turned_off_on_a_terminal(serve, options, settings):
    seen = on_a_terminal(*COMMAND, "--url", serve().url, *SHORT, *options, **settings)
    assert "✓ SUCCESS" in seen
    assert "\033[32m" not in seen


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_without_the_check_mark_still_gets_its_result(serve, harness, encoding):
    done = harness(serve(), *SHORT, PYTHONIOENCODING=encoding)
    assert done.returncode == 0
    assert "? SUCCESS: All outputs are identical (deterministic)!" in done.stdout


def test_a_reader_that_goes_away_gets_no_traceback(serve):
    """`test_determinism.py | head -1`"""
    command = subprocess.Popen(
        [*COMMAND, "--url", serve().url, *SHORT],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with command:
        assert command.stdout.readline().startswith("Testing determinism")
        command.stdout.close()
        errors = command.stderr.read()
    assert "Traceback" not in errors
    assert "BrokenPipe" not in errors
    assert command.returncode not in (0, 1)
