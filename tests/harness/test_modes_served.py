"""Each mode against real servers: the batch-invariant one passes by what it says in tokens and logprobs, and the plain
one, under the same load, does not."""

import asyncio
import json
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from determinism.client import Server
from determinism.modes import TEMPERATURE
from determinism.probe import forms
from determinism.protocol import Request
from determinism.settings import Target
from fake_server import next_single
from real_server import KEY, MODEL, ON_GPU, SECONDS, harness, harness_command, harness_environment, needs_server
from tap import Tap, tapped

TOKENS = 48
REQUESTS = 48
LOAD = ("--requests", REQUESTS, "--concurrency", 12, "--max-tokens", TOKENS)
SHORT = ("--background", 0, *(word for prompt in range(6) for word in ("--prompt", f"the river number {prompt}")))
"""A plan for prompts that are never computed in pieces. vLLM's CPU build ends with "CPU Generator does not use offset"
where it does that to a request with a seed, batch-invariant or not."""
OPTIONS = {"same": (), "mixed": (), "needle": (), "prefix": (), "stream": (), "seeded": () if ON_GPU else SHORT}
NOTHING_BESIDE = ("--requests", 8, "--concurrency", 4, "--max-tokens", 8, "--background", 0, "--min-power", 0)


def found(done: subprocess.CompletedProcess[str], path: Path) -> dict:
    print(done.stdout, done.stderr)
    return json.loads(path.read_text())


def compared(tap: Tap, tokens: int = TOKENS) -> dict[int, dict]:
    """The requests whose answers are compared, by their place: other traffic and the probe have not all of this."""
    wanted = {"max_tokens": tokens, "logprobs": 5, "return_token_ids": True}
    return {place: body for place, body in enumerate(tap.asked) if wanted.items() <= body.items()}


def has_everything(answer: bytes, streamed: bool) -> bool:
    """Whether the server gave ids, logprobs and alternatives of all tokens asked for."""
    lines = [line[6:] for line in answer.decode().splitlines() if line.startswith("data: {")]
    contents = [json.loads(line) for line in lines] if streamed else [json.loads(answer)]
    choices = [choice for content in contents for choice in content["choices"]]
    ids = [token for choice in choices for token in choice["token_ids"] or ()]
    logprobs = [choice["logprobs"] for choice in choices if choice["logprobs"] is not None]
    numbers = [number for part in logprobs for number in part["token_logprobs"]]
    alternatives = [row for part in logprobs for row in part["top_logprobs"]]
    return (
        len(ids) == len(numbers) == len(alternatives) > 0
        and all(type(token) is int for token in ids)
        and all(type(number) is float for number in numbers)
        and all(len(row) >= 5 for row in alternatives)
    )


@pytest.fixture(scope="module")
def runs(batch_invariant_server, plain_server, tmp_path_factory):
    """A function that runs a mode against the batch-invariant server, seen by a tap, with the plain one as its control;
    the process, its report and the tap. Each mode is run once, and once more where the control was not caught: a busy
    machine may answer one request after the other, which is no load, and the report says so."""
    kept = {}

    def once(mode: str):
        path = tmp_path_factory.mktemp(mode) / "result.json"
        with tapped(batch_invariant_server.port) as tap:
            options = ("--mode", mode, *LOAD, *OPTIONS[mode], "--control-url", plain_server.url, "--json", path)
            done = harness(tap.url, *options)
        return done, found(done, path), tap

    def run(mode: str):
        if mode not in kept:
            kept[mode] = once(mode)
            if kept[mode][1]["verdict"] == "inconclusive":
                kept[mode] = once(mode)
        return kept[mode]

    return run


@needs_server
@pytest.mark.parametrize("mode", OPTIONS)
class TestEachMode:
    def test_the_batch_invariant_server_passes_in_every_bit(self, runs, mode):
        done, content, _ = runs(mode)
        assert (done.returncode, content["verdict"], content["mode"]) == (0, "pass", mode)
        assert (content["level"], content["levels_offered"]) == ("logprobs", ["text", "tokens", "logprobs"])
        assert content["answered"] + content["others"] == REQUESTS and content["failed"] == 0
        assert content["identical_to_solo"] == content["answered"] > 0
        assert content["text_variants"] == content["token_variants"] == content["logprob_variants"] == 1
        assert content["logprob_differences"] == [0.0] * content["answered"]

    def test_the_plain_server_is_caught_under_the_same_load(self, runs, mode):
        control = runs(mode)[1]["control"]
        assert (control["verdict"], control["level"], control["failed"]) == ("fail", "logprobs", 0)
        assert control["answered"] == runs(mode)[1]["answered"]
        assert control["logprob_variants"] > 1 and max(control["logprob_differences"]) > 0
        assert control["divergences"][0]["what"] in ("logprob", "alternatives", "token")

    def test_what_was_compared_are_the_servers_token_ids_and_logprobs(self, runs, mode):
        _, content, tap = runs(mode)
        bodies = compared(tap)
        assert len(bodies) == len(content["prompts"]) + content["answered"]
        for place, body in bodies.items():
            assert has_everything(tap.answers[place], body.get("stream", False)), tap.answers[place]

    def test_the_mode_asked_what_it_is_for(self, runs, mode):
        _, content, tap = runs(mode)
        bodies = list(compared(tap).values())
        alone, copies = bodies[: len(content["prompts"])], bodies[len(content["prompts"]) :]
        assert [body.get("stream", False) for body in copies] == [mode == "stream"] * len(copies)
        assert not any(body.get("stream") for body in alone)
        assert {body["temperature"] for body in bodies} == {TEMPERATURE if mode == "seeded" else 0.0}
        assert (len(alone) == 1) is (mode in ("same", "needle"))
        assert (content["others"] > 0) is (mode == "needle")
        assert len({body.get("seed") for body in bodies}) == (len(alone) if mode == "seeded" else 1)


@needs_server
def test_prefixes_are_found_in_the_real_cache(batch_invariant_server, tmp_path):
    def hits() -> float:
        text = httpx.get(batch_invariant_server.url + "/metrics").text
        return sum(map(float, re.findall(r"^vllm:prefix_cache_hits_total\S* (\S+)$", text, re.MULTILINE)))

    path = tmp_path / "result.json"
    before = hits()
    done = harness(batch_invariant_server.url, "--mode", "prefix", *LOAD, "--background", 0, "--json", path)
    content = found(done, path)
    assert done.returncode == 0
    asked = sum(prompt["prompt_tokens"] * prompt["requests"] for prompt in content["prompts"])
    assert hits() - before > asked / 4


@needs_server
@pytest.mark.parametrize("mode", ["same", "mixed", "needle"])
def test_a_plain_server_fails_at_the_level_of_logprobs(plain_server, tmp_path, mode):
    path = tmp_path / "result.json"
    done = harness(plain_server.url, "--mode", mode, *LOAD, "--json", path)
    content = found(done, path)
    assert (done.returncode, content["verdict"], content["level"]) == (1, "fail", "logprobs")
    assert content["failed"] == 0 and content["divergences_total"] > 0
    assert content["reason"].endswith("differ from the same prompt alone, at the level of logprobs")


@needs_server
@pytest.mark.parametrize("form", forms("auto"), ids=str)
def test_a_real_stream_is_the_answer_that_it_would_be_whole(batch_invariant_server, form):
    async def ask() -> list:
        async with Server(Target(batch_invariant_server.url, KEY)) as server:
            lane = server.lane()
            texts = ("the river", "Größe 東京 🚲", "a" * 700)
            asked = [Request(text, TOKENS, stream=stream) for text in texts for stream in (False, True)]
            return [await lane.ask(form, MODEL, request) for request in asked]

    answers = asyncio.run(ask())
    for whole, stream in zip(answers[::2], answers[1::2], strict=True):
        assert whole.level == stream.level
        assert (stream.tokens, stream.logprobs, stream.top_logprobs) == (
            whole.tokens,
            whole.logprobs,
            whole.top_logprobs,
        )
        assert (stream.text, stream.finish_reason) == (whole.text, whole.finish_reason)
        assert (stream.prompt_ids, stream.prompt_tokens) == (whole.prompt_ids, whole.prompt_tokens)


CHANGES = {
    "token": (rb'"token_ids":\s*\[(\d+)', lambda number: int(number) + 1),
    "logprob": (rb'"token_logprobs":\s*\[(-[\d.e-]+)', lambda number: next_single(float(number))),
}
"""By what differs, where its first number stands in an answer, and another number."""


@needs_server
@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("mode", ["mixed", "stream"])
def test_one_number_of_one_real_answer_that_is_another_is_found(batch_invariant_server, tmp_path, mode, what):
    """The twin of every pass above: the text of that answer is as it was."""
    pattern, other = CHANGES[what]
    path = tmp_path / "result.json"

    def change(place: int, answer: bytes) -> bytes:
        if list(compared(tap, 8))[11:12] != [place]:  # the fourth copy, after eight prompts alone
            return answer
        return re.sub(
            pattern, lambda at: at[0][: at.start(1) - at.start()] + str(other(at[1])).encode(), answer, count=1
        )

    with tapped(batch_invariant_server.port, change) as tap:
        done = harness(tap.url, "--mode", mode, *NOTHING_BESIDE, "--json", path)
    content = found(done, path)
    assert (done.returncode, content["answered"], content["divergences_total"]) == (1, 8, 1)
    (divergence,) = content["divergences"]
    assert (divergence["what"], divergence["token_index"]) == (what, 0)
    if what == "logprob":
        assert divergence["ulps"] == 1
    else:
        assert divergence["token_b"] == divergence["token_a"] + 1


@needs_server
def test_the_answers_after_a_restart_are_those_before_it(batch_invariant_server, tmp_path):
    """The command asks this test to restart the server, and waits until its processes have ended."""
    server, path = batch_invariant_server, tmp_path / "result.json"
    with socket.create_server(("127.0.0.1", 0)) as door:
        door.settimeout(SECONDS / 4)
        wait = f"import socket; socket.create_connection(('127.0.0.1', {door.getsockname()[1]})).recv(1)"
        command = shlex.join([sys.executable, "-c", wait])
        options = ("--mode", "restart", "--restart-command", command, *LOAD, "--json", path)
        run = subprocess.Popen(
            harness_command(server.url, *options), env=harness_environment(), stdout=subprocess.PIPE, text=True
        )
        caller, _ = door.accept()
        before = server.processes()
        with caller:
            server.restart()
        output, _ = run.communicate(timeout=SECONDS)
    content = found(subprocess.CompletedProcess(run.args, run.returncode, output, ""), path)
    assert len(before) > 1 and not before & server.processes(), "no process of the server is an old one"
    assert (run.returncode, content["verdict"], content["level"]) == (0, "pass", "logprobs")
    assert content["identical_to_solo"] == content["answered"] == REQUESTS
    assert content["logprob_differences"] == [0.0] * REQUESTS
    metrics = httpx.get(server.url + "/metrics").text
    answered = sum(map(float, re.findall(r"^vllm:request_success_total\S* (\S+)$", metrics, re.MULTILINE)))
    assert answered >= REQUESTS / 2, "the new process gave the second half"
