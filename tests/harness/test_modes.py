"""Each mode asks what it says it asks, passes on a sound server, and catches the fault that it is for."""

import asyncio
import itertools
import json
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import Counter

import pytest
from determinism.client import Server
from determinism.errors import Unreachable
from determinism.modes import MODES, NEEDLE_IN, TEMPERATURE
from determinism.probe import probe
from determinism.restart import Restarter
from determinism.settings import Settings, Target
from harness_kit import COMMAND, ROOT, SHORT, environment
from test_settings import is_usage_error

LOAD = (*SHORT, "--max-tokens", "64", "--background", "0")
LOADED = 25
"""Later than the probe and every prompt alone."""
BRIEFLY = ("--minutes", "0.02")


def options(name: str, server) -> tuple[str, ...]:
    """What a mode needs beside its name."""
    extra = {"restart": ("--restart-command", restarting(server)), "soak": BRIEFLY}
    return ("--mode", name, *extra.get(name, ()))


def restarting(server) -> str:
    """A command that restarts the fake server, as one restarts a real one."""
    code = f"import urllib.request as u; u.urlopen(u.Request('{server.url}/restart', method='POST'))"
    return f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} 2>/dev/null || true"


def found(harness, server, tmp_path, *more: str):
    """The run and its report."""
    path = tmp_path / "result.json"
    done = harness(server, *LOAD, *more, "--json", str(path))
    return done, json.loads(path.read_text())


def asked(server) -> list[dict]:
    """Every request but the probe's."""
    return [body for body in server.bodies if body["max_tokens"] == 64]


@pytest.mark.parametrize("name", MODES)
def test_a_sound_server_passes_each_mode(serve, harness, tmp_path, name):
    server = serve()
    done, content = found(harness, server, tmp_path, *options(name, server))
    assert done.returncode == 0, done.stdout + done.stderr
    assert (content["verdict"], content["mode"], content["power"]["estimate"] > 0.9) == ("pass", name, True)
    assert content["identical_to_solo"] == content["answered"] > 0


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("fault", ["token", "logprob", "truncate"])
def test_a_fault_under_load_fails_each_mode(serve, harness, tmp_path, name, fault):
    rate = 0.9 if name == "needle" else 0.2  # it compares 12 of its 100 requests: at 0.2 no fault meets them at times
    server = serve(rates={fault: rate}, faults_from=60 if name == "soak" else LOADED)
    done, content = found(harness, server, tmp_path, *options(name, server))
    assert (done.returncode, content["verdict"]) == (1, "fail")
    assert content["failures"] if fault == "truncate" else content["divergences"]


def test_same_is_one_prompt_many_times(serve, harness, tmp_path):
    server = serve()
    found(harness, server, tmp_path, "--mode", "same")
    assert Counter(body["prompt"] for body in asked(server)).most_common() == [(asked(server)[0]["prompt"], 101)]


class TestNeedle:
    def test_one_request_of_so_many_is_it_at_a_place_that_changes(self, serve, harness, tmp_path):
        server = serve()
        done, content = found(harness, server, tmp_path, "--mode", "needle", "--concurrency", "1")
        bodies = [body for body in server.bodies if "max_tokens" in body][1:]
        needle = bodies.pop(0)["prompt"]
        places = [index for index, body in enumerate(bodies) if body["prompt"] == needle]
        assert [place // NEEDLE_IN for place in places] == list(range(100 // NEEDLE_IN)) + [100 // NEEDLE_IN] * (
            len(places) - 100 // NEEDLE_IN
        )
        assert len({place % NEEDLE_IN for place in places}) > 3
        assert (content["answered"], content["others"]) == (len(places), 100 - len(places))
        assert f"{100 - len(places)} requests that are not compared" in done.stdout

    def test_what_is_not_compared_may_differ(self, serve, harness, tmp_path):
        server = serve(background_fault="token")
        assert found(harness, server, tmp_path, "--mode", "needle")[0].returncode == 0

    def test_what_is_not_compared_must_still_be_answered(self, serve, harness, tmp_path):
        server = serve(background_fault="error_500")
        assert found(harness, server, tmp_path, "--mode", "needle")[0].returncode == 1

    def test_too_few_requests_for_one_are_refused(self, serve, harness):
        is_usage_error(harness(serve(), "--mode", "needle", "--requests", "7"), "--requests", "7", "needs 8")


def test_prefixes_grow_and_are_shared_in_the_cache(serve, harness, tmp_path):
    server = serve()
    found(harness, server, tmp_path, "--mode", "prefix")
    alone, copies = asked(server)[:8], asked(server)[8:]
    words = [body["prompt"].split() for body in alone]
    for shorter, longer in itertools.pairwise(words):
        common = next(i for i, (a, b) in enumerate(zip(shorter, longer, strict=False)) if a != b)
        assert common >= len(shorter) - 4, "all of a prompt but its own end begins the next one"
    assert len({body["cache_salt"] for body in alone}) == 8
    shared, of_own = Counter(body["cache_salt"] for body in copies).most_common(2)
    assert 50 < shared[1] < 100
    assert of_own[1] == 1


class TestStream:
    def test_copies_are_streamed_and_alone_they_are_not(self, serve, harness, tmp_path):
        server = serve()
        found(harness, server, tmp_path, "--mode", "stream")
        assert [bool(body.get("stream")) for body in asked(server)] == [False] * 8 + [True] * 100

    @pytest.mark.parametrize("chat", [False, True])
    def test_either_endpoint_is_compared_in_full(self, serve, harness, tmp_path, chat):
        done, content = found(harness, serve(completions=not chat), tmp_path, "--mode", "stream")
        assert (done.returncode, content["level"]) == (0, "logprobs")

    def test_streams_without_logprobs_are_compared_by_what_they_have(self, serve, harness, tmp_path):
        _, content = found(harness, serve(stream_logprobs=False), tmp_path, "--mode", "stream")
        assert (content["level"], content["verdict"]) == ("text", "inconclusive")
        server = serve(stream_logprobs=False, rates={"text": 0.2}, faults_from=LOADED)
        assert found(harness, server, tmp_path, "--mode", "stream")[0].returncode == 1

    def test_a_level_that_streams_do_not_have_is_never_replaced_by_a_weaker_one(self, serve, harness, tmp_path):
        server = serve(stream_logprobs=False)
        done = harness(server, *LOAD, "--mode", "stream", "--level", "logprobs")
        assert (done.returncode, done.stdout) == (3, "")
        assert "--level='logprobs' cannot be compared: the server's streams have text alone" in done.stderr

    @pytest.mark.parametrize("fault", ["stream_cut", "stream_error"])
    def test_a_broken_stream_is_no_answer(self, serve, harness, tmp_path, fault):
        server = serve(faults={LOADED: fault})
        done, content = found(harness, server, tmp_path, "--mode", "stream", "--retries", "0")
        assert done.returncode == 1
        assert len(content["failures"]) == 1
        assert content["answered"] == 99

    def test_a_stream_that_stalls_ends_in_time(self, serve, harness, tmp_path):
        server = serve(faults={LOADED: "stall"})
        done, content = found(harness, server, tmp_path, "--mode", "stream", "--timeout", "5")
        assert (done.returncode, [failure["kind"] for failure in content["failures"]]) == (1, ["timeout"])


class TestSeeded:
    def test_each_prompt_has_a_seed_and_a_temperature(self, serve, harness, tmp_path):
        server = serve()
        found(harness, server, tmp_path, "--mode", "seeded")
        assert {body["temperature"] for body in asked(server)} == {TEMPERATURE}
        assert len({(body["prompt"], body["seed"]) for body in asked(server)}) == 8
        assert len({body["seed"] for body in asked(server)}) == 8

    def test_a_server_that_ignores_the_seed_is_caught(self, serve, harness, tmp_path):
        assert found(harness, serve(ignores_seed=True), tmp_path, "--mode", "seeded")[0].returncode == 1
        assert found(harness, serve(ignores_seed=True), tmp_path, "--mode", "mixed")[0].returncode == 0


class TestRestart:
    def test_answers_that_a_restart_changes_are_caught(self, serve, harness, tmp_path):
        server = serve(other_after_restart=True)
        done, content = found(harness, server, tmp_path, *options("restart", server))
        assert (done.returncode, server.restarts) == (1, 1)
        assert 0 < content["identical_to_solo"] <= 50, "the half before the restart is as alone"

    def test_a_command_that_restarts_nothing_shows_nothing(self, serve, harness, tmp_path):
        done, content = found(harness, serve(), tmp_path, "--mode", "restart", "--restart-command", "true")
        assert (done.returncode, content["verdict"]) == (3, "inconclusive")
        assert "the server was there all along" in content["reason"]

    def test_a_restart_too_quick_to_be_seen_is_known_by_the_new_process(self, serve, harness, tmp_path, monkeypatch):
        server = serve(says_start=True)
        monkeypatch.setattr(server, "restart", lambda: setattr(server, "restarts", server.restarts + 1))
        assert found(harness, server, tmp_path, *options("restart", server))[0].returncode == 0
        assert server.restarts == 1
        done, _ = found(harness, server, tmp_path, "--mode", "restart", "--restart-command", "true")
        assert done.returncode == 3

    def test_a_command_that_fails_is_told_with_its_last_line(self, serve, harness):
        done = harness(serve(), *LOAD, "--mode", "restart", "--restart-command", "echo no such unit; exit 5")
        assert done.returncode == 2
        assert "status 5: no such unit" in done.stdout + done.stderr
        assert "✓ SUCCESS" not in done.stdout

    def test_a_server_that_does_not_come_back_is_unreachable(self, serve):
        server = serve()

        async def run() -> None:
            target = Target(server.url, retries=0)
            async with Server(target) as ours:
                offer = await probe(ours.lane(), Settings(target))
                server.restart = server.die
                with pytest.raises(Unreachable, match="did not answer again within 1 s"):
                    await Restarter(restarting(server), ours, offer, ready_seconds=1).restart()

        asyncio.run(run())


def test_soak_goes_on_for_its_time_over_many_prompts(serve, harness, tmp_path):
    done, content = found(harness, serve(), tmp_path, "--mode", "soak", *BRIEFLY)
    assert "Testing determinism for 0.02 minutes (10 concurrent)" in done.stdout
    assert 1.2 <= content["loaded_seconds"] < 10
    assert content["answered"] > 100
    assert not content["partial"]
    assert len(content["prompts"]) == 32


class TestAll:
    def run(self, harness, server, tmp_path, *more: str):
        xml = tmp_path / "result.xml"
        done, content = found(harness, server, tmp_path, "--mode", "all", "--junit", str(xml), *more)
        return done, content, ET.parse(xml).getroot()

    def test_it_runs_those_that_have_what_they_need(self, serve, harness, tmp_path):
        done, content, suites = self.run(harness, serve(), tmp_path)
        names = ["same", "mixed", "needle", "prefix", "stream", "seeded"]
        assert [part["mode"] for part in content["modes"]] == names
        assert (done.returncode, content["verdict"], len(suites)) == (0, "pass", len(names))
        assert done.stdout.rstrip().endswith("✓ SUCCESS: All outputs are identical (deterministic)!")
        assert all(f"\nMode {name}: " in "\n" + done.stdout for name in names)
        server = serve()
        _, content, _ = self.run(harness, server, tmp_path, *options("restart", server)[2:], *BRIEFLY)
        assert [part["mode"] for part in content["modes"]] == list(MODES)

    def test_one_that_fails_fails_it_and_the_others_are_still_run(self, serve, harness, tmp_path):
        done, content, suites = self.run(harness, serve(ignores_seed=True), tmp_path)
        assert (done.returncode, content["verdict"]) == (1, "fail")
        assert content["reason"].startswith("mode seeded: ")
        assert [part["verdict"] for part in content["modes"]] == ["pass"] * 5 + ["fail"]
        assert [int(suite.get("failures")) > 0 for suite in suites] == [False] * 5 + [True]

    def test_one_that_is_inconclusive_makes_it_so(self, serve, harness, tmp_path):
        done, content, _ = self.run(harness, serve(stream_logprobs=False), tmp_path)
        assert (done.returncode, content["verdict"]) == (3, "inconclusive")
        assert content["reason"].startswith("mode stream: ")

    def test_each_has_its_control(self, serve, harness, tmp_path):
        control = serve(rates={"token": 0.5}, faults_from=LOADED)
        enough = ("--requests", "300")  # needle compares 37 of them, of which one must differ
        done, content, _ = self.run(harness, serve(), tmp_path, "--control-url", control.url, *enough)
        assert done.returncode == 0
        assert {part["control"]["verdict"] for part in content["modes"]} == {"fail"}

    def test_quiet_prints_one_verdict(self, serve, harness):
        done = harness(serve(), *LOAD, "--mode", "all", "--quiet")
        assert done.stdout == "✓ SUCCESS: All outputs are identical (deterministic)!\n"

    def test_a_server_that_dies_ends_it_with_what_was_seen(self, serve, harness, tmp_path):
        done, content, _ = self.run(harness, serve(faults={150: "die"}), tmp_path, "--retries", "0")
        assert (done.returncode, content["partial"]) == (2, True)
        assert [part["verdict"] for part in content["modes"]] == ["pass", "inconclusive"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("--mode", "soak"), ("--mode", "soak", "--minutes")),
        (("--mode", "restart"), ("--mode", "restart", "--restart-command")),
        (("--minutes", "5"), ("--minutes", "5", "mixed")),
        (("--mode", "same", "--restart-command", "x"), ("--restart-command", "x", "same")),
        (("--mode", "soak", "--minutes", "0"), ("--minutes", "0", "above 0")),
        (("--mode", "soak", "--minutes", "nan"), ("--minutes", "nan", "above 0")),
        (("--mode", "none"), ("--mode", "none", "mixed")),
        (("--only", "9"), ("--only", "9", "8 prompts")),
        (("--mode", "same", "--only", "2"), ("--only", "2", "1 prompt")),
        (("--min-power", "1"), ("--min-power", "1", "below 1")),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(serve, harness, given, words):
    is_usage_error(harness(serve(), *given), *words)


@pytest.mark.parametrize("name", ["mixed", "same", "needle", "stream", "seeded"])
def test_the_line_that_repeats_a_difference_finds_it_again_and_nothing_else(serve, harness, tmp_path, name):
    path = tmp_path / "result.json"
    server = serve(rates={"token": 0.6}, faults_from=LOADED)
    done = harness(server, *LOAD, "--mode", name, "--json", str(path), "--quiet")
    content = json.loads(path.read_text())
    line = content["repeat"]
    assert done.returncode == 1
    assert line.startswith("python vllm/test_determinism.py --url ")
    prompt = asked(server)[content["divergences"][0]["prompt_id"]]["prompt"]
    path.unlink()
    server.bodies.clear()
    again = subprocess.run(
        [COMMAND[0], *shlex.split(line)[1:]], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60
    )
    assert again.returncode == 1
    assert not path.exists(), "a repetition does not write over the results"
    compared = [body for body in asked(server) if body.get("logprobs") is not None]
    assert {body["prompt"] for body in compared} == {prompt}


def test_the_line_that_repeats_holds_no_key(serve, harness, tmp_path):
    server = serve(rates={"token": 0.3}, faults_from=LOADED, api_key="s3cr3t")
    done, content = found(harness, server, tmp_path, "--api-key", "s3cr3t")
    assert done.returncode == 1
    assert "s3cr3t" not in done.stdout + json.dumps(content)
