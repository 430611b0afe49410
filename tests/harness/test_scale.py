"""A long load at a thousand requests in flight: nothing is lost, nothing is counted twice, and memory stays small."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from harness_kit import COMMAND, ROOT, environment
from local_server import Programs, free_port, wait_until_ready

REQUESTS, CONCURRENCY = 10_000, 1_000
PROMPTS, PROBE = 8, 1
MOST_MB = 300
MEASURED = """
import resource, subprocess, sys
status = subprocess.call(sys.argv[1:])
print("peak", resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(status)
"""
"""Prints the peak memory of a command in kB. A process of its own: what a process takes over from the one that starts
it counts towards its peak, and the one that runs all tests is large."""


class Done:
    """What a run of the harness against a fake server in a process of its own came to, by both of them."""

    def __init__(self, folder: Path, behaviour: dict, options: tuple[str, ...]) -> None:
        port, counts, report = free_port(), folder / "counts.json", folder / "report.json"
        server = [sys.executable, str(ROOT / "tests" / "harness" / "fake_server.py"), "--port", str(port)]
        server += ["--behaviour", json.dumps(behaviour), "--counts", str(counts)]
        load = ["--url", f"http://127.0.0.1:{port}", "--requests", str(REQUESTS), "--concurrency", str(CONCURRENCY)]
        with Programs() as programs:
            program = programs.start("fake server", server, environment(), folder / "server.log")
            wait_until_ready({program: port}, 60, lambda _: None)
            run = subprocess.run(
                [sys.executable, "-c", MEASURED, *COMMAND, *load, *options, "--json", str(report)],
                env=environment(), capture_output=True, text=True, timeout=300,
            )  # fmt: skip
        assert run.stderr == ""
        self.status = run.returncode
        self.peak_mb = int(run.stdout.split()[-1]) / 1000
        self.found = json.loads(report.read_text())
        self.server = json.loads(counts.read_text())

    def check_every_request(self) -> None:
        """Each is one answer or one failure, of its own prompt, on both sides."""
        found = self.found
        assert found["answered"] + found["failed"] == found["requests"] == REQUESTS
        assert [prompt["id"] for prompt in found["prompts"]] == list(range(PROMPTS))
        assert len(found["latencies"]["loaded"]) == found["answered"]
        assert self.server["most_connections"] >= CONCURRENCY
        assert self.peak_mb < MOST_MB


def test_ten_thousand_requests_a_thousand_at_a_time_are_all_answered_and_counted_once(tmp_path):
    done = Done(tmp_path, {}, ())
    done.check_every_request()
    assert done.status in (0, 3), "a pass without a control may be inconclusive"
    assert done.found["identical_to_solo"] == REQUESTS
    assert done.found["retried_connections"] == done.found["retried_busy"] == 0
    asked = Counter(done.server["prompts"])
    # Each prompt's copies, and itself alone; other traffic has prompts of its own.
    assert [times for _, times in asked.most_common(PROMPTS)] == [REQUESTS // PROMPTS + 1] * PROMPTS
    other = done.server["requests"] - REQUESTS - PROMPTS - PROBE
    # When the last copy is answered, at most one request of each stream of other traffic is still out.
    assert 0 <= other - done.found["background"]["requests"] <= CONCURRENCY // 4


def test_rare_faults_among_ten_thousand_requests_are_each_accounted_for(tmp_path):
    rates = {"drop": 0.003, "busy": 0.003, "token": 0.001, "logprob": 0.001, "error_500": 0.001, "truncate": 0.001}
    done = Done(tmp_path, {"rates": rates, "faults_from": PROBE + PROMPTS}, ("--background", "0"))
    done.check_every_request()
    faults = done.server["faults_by_name"]
    assert all(faults[name] > 0 for name in rates)
    assert done.status == 1
    found = done.found
    assert found["retried_connections"] == faults["drop"]
    assert found["retried_busy"] == faults["busy"]
    assert found["failed"] == faults["error_500"] + faults["truncate"]
    assert Counter(failure["kind"] for failure in found["failures"]) == {
        "http": faults["error_500"],
        "malformed": faults["truncate"],
    }
    assert found["divergences_total"] == faults["token"] + faults["logprob"]
    assert found["identical_to_solo"] == REQUESTS - found["failed"] - found["divergences_total"]
    again = faults["drop"] + faults["busy"]
    assert done.server["requests"] == PROBE + PROMPTS + REQUESTS + again


@pytest.mark.parametrize(("limit", "enough"), [("-S -n 64", True), ("-n 64", False)])
def test_a_limit_of_open_files_is_raised_or_named(serve, limit, enough):
    load = ("--requests", "200", "--concurrency", "200", "--background", "0", "--max-tokens", "2")
    limited = ["sh", "-c", f'ulimit {limit}; exec "$@"', "sh", *COMMAND, "--url", serve().url, *load]
    done = subprocess.run(limited, env=environment(), capture_output=True, text=True, timeout=120)
    if enough:
        assert done.returncode in (0, 3)
        assert "Retried:              0 dropped" in done.stdout
    else:
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert "ulimit -n" in done.stderr
