"""What the example calculates, refuses and prints; and all of it with two real servers."""

import asyncio
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import rl_logprobs
from fake_server import Behaviour, serving
from local_server import Failure, members
from real_server import needs_vllm
from rl_logprobs import MODE, OURS, PLAIN, SERVED, SHIPPED, Difference, Differences, ask, compare, tell

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, str(ROOT / "examples" / "rl_logprobs.py")]
SECONDS = 900


def test_a_difference_is_counted_by_its_size_in_both_directions():
    found = compare([-1.0, -2.0, -3.0, -4.0], [-1.0, -2.5, -2.75, -4.0])
    assert (found.tokens, found.differing, found.largest, found.mean) == (4, 2, 0.5, 0.1875)
    assert found.ratio_error == pytest.approx((1 - math.exp(-0.5) + math.exp(0.25) - 1) / 4)


def test_equal_logprobs_have_no_difference_and_one_ulp_is_one():
    assert compare([-1.5] * 3, [-1.5] * 3) == Difference(tokens=3, differing=0, largest=0, mean=0, ratio_error=0)
    assert compare([-1.5] * 3, [-1.5, math.nextafter(-1.5, 0), -1.5]).differing == 1


@pytest.mark.parametrize(
    ("sampler", "trainer", "words"),
    [
        ([], [], "0 logprobs"),
        ([-1.0], [-1.0, -2.0], "1 logprobs of the sampler, 2 of the trainer"),
        ([-1.0], [math.nan], "no finite number"),
        ([-math.inf], [-math.inf], "no finite number"),
    ],
)
def test_what_cannot_be_compared_is_refused(sampler, trainer, words):
    with pytest.raises(ValueError, match=words):
        compare(sampler, trainer)


@pytest.mark.parametrize(
    "setting",
    [
        *("--answers=0", "--answers=x", "--max-tokens=1025", "--temperature=nan", "--temperature=-1", "--seed=-1"),
        *("--json=/", "--json=/no/such/folder/file.json", "--no-such-flag"),
    ],
)
def test_a_setting_that_cannot_work_gets_one_line_before_anything_starts(setting):
    done = subprocess.run([*COMMAND, setting], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("rl_logprobs: ") and setting.split("=")[0] in line


@pytest.mark.parametrize("error", [Failure("no vLLM is installed"), OSError("no space is left")])
def test_what_the_machine_lacks_gets_one_line(error, monkeypatch, capsys):
    def fail():
        raise error

    monkeypatch.setattr(rl_logprobs, "scale", fail)
    monkeypatch.setattr(sys, "argv", COMMAND[1:])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert rl_logprobs.main() == 2
    assert capsys.readouterr().err == f"rl_logprobs: {error}\n"


def test_vllm_for_gpus_is_refused(monkeypatch):
    monkeypatch.setattr(rl_logprobs, "scale", lambda: object())
    with pytest.raises(Failure, match="vLLM's CPU build is needed"):
        rl_logprobs.run(SimpleNamespace())


def asked(behaviour: Behaviour, answers: int = 5):
    settings = SimpleNamespace(answers=answers, max_tokens=4, temperature=1.0, seed=7)
    with serving(behaviour) as server:
        return asyncio.run(ask(server.url, settings)), server.bodies


def test_each_answer_is_asked_for_with_a_seed_of_its_own_and_comes_with_ids_and_logprobs():
    samples, bodies = asked(Behaviour(model="demo"))
    assert sorted(body["seed"] for body in bodies) == [7, 8, 9, 10, 11]
    assert {body["max_tokens"] for body in bodies} == {4}
    assert len(samples) == 5
    for sample in samples:
        assert sample.prompt and len(sample.tokens) == len(sample.logprobs) == 4


@pytest.mark.parametrize(
    ("behaviour", "words"),
    [
        (Behaviour(model="demo", token_ids=False), "lacks its token ids or logprobs"),
        (Behaviour(model="demo", rates={"no_logprobs": 1.0}), "lacks its token ids or logprobs"),
        (Behaviour(model="demo", rates={"nan": 1.0}), "which no sound computation gives"),
        (Behaviour(model="demo", rates={"error_500": 1.0}), "HTTP 500"),
    ],
)
def test_a_server_that_cannot_be_compared_is_a_failure(behaviour, words):
    with pytest.raises(Failure, match=words):
        asked(behaviour)


def differences(left: Difference) -> Differences:
    row = {SHIPPED: Difference(4, 4, 0.125, 0.0625, 0.0625), MODE: Difference(4, 4, 0.125, 0.0625, 0.0625)}
    return Differences(
        {PLAIN: {**row, SERVED: row[MODE]}, OURS: {**row, SERVED: left}}, {"rotary": left}, {"rotary": left}
    )


def test_zero_is_told_with_status_0(capsys):
    assert tell(differences(Difference(100000, 0, 0.0, 0.0, 0.0)), {"rotary": ("two", "one")}) == 0
    output = capsys.readouterr().out
    assert "ZERO: all 100000 logprobs" in output and "LEFT" not in output


def test_one_logprob_that_is_left_is_not_rounded_away(capsys):
    assert tell(differences(Difference(100000, 1, 1e-7, 1e-12, 1e-12)), {"rotary": ("two", "one")}) == 1
    output = capsys.readouterr().out
    assert "LEFT: 1 of 100000 logprobs differ, by up to 1e-07" in output and "ZERO" not in output


def test_the_tables_are_markdown_with_every_row_as_wide_as_its_heading(capsys):
    tell(differences(Difference(4, 0, 0.0, 0.0, 0.0)), {"rotary": ("two roundings", "one")})
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(rows) == 8 + 3
    assert {row.count("|") for row in rows[:8]} == {7} and {row.count("|") for row in rows[8:]} == {8}
    assert {len(row) for row in rows[:8]} == {len(rows[0])} and {len(row) for row in rows[8:]} == {len(rows[8])}


def test_the_documented_tables_have_the_programs_own_rows():
    forms = pytest.importorskip("llama_as_served", reason="transformers comes with vLLM").FORMS
    text = (ROOT / "docs" / "records.md").read_text(encoding="utf-8")
    for name, (without, as_served) in forms.items():
        assert f"| {name} | {without} | {as_served} |" in text
    for sampler in (PLAIN, OURS):
        for trainer in (SHIPPED, MODE, SERVED):
            assert f"| {sampler} | {trainer} |" in text


@needs_vllm
@pytest.mark.server
@pytest.mark.timeout(SECONDS)
def test_the_trainer_in_the_servers_form_has_the_batch_invariant_servers_logprobs_and_no_other(tmp_path):
    """The proof, and its controls: transformers as shipped, each step before the last, and the plain server."""
    file = tmp_path / "differences.json"
    done = subprocess.run([*COMMAND, "--json", str(file)], capture_output=True, text=True)
    print(done.stdout, done.stderr)
    assert done.returncode == 0
    assert "ZERO: all 1024 logprobs" in done.stdout
    found = json.loads(file.read_text())
    ours, plain = found["pairs"][OURS], found["pairs"][PLAIN]
    assert (ours[SERVED]["tokens"], ours[SERVED]["differing"], ours[SERVED]["largest"]) == (1024, 0, 0.0)
    assert ours[SHIPPED]["differing"] == ours[MODE]["differing"] == 1024
    assert plain[SERVED]["differing"] > 0
    *before, last = found["steps"].values()
    assert all(step["differing"] for step in before) and not last["differing"]
    needed = {name for name, without in found["without"].items() if without["differing"]}
    # With as many rows as a whole sequence has, torch's own products may have these bits, too.
    assert needed | {"matrix products"} == set(found["without"])


@needs_vllm
@pytest.mark.server
@pytest.mark.timeout(SECONDS)
def test_interrupting_it_while_a_server_starts_ends_the_server():
    example = subprocess.Popen(COMMAND, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert "plain vLLM" in next(line for line in example.stdout if " s  " in line)
    sessions = {
        session for session in map(int, filter(str.isdigit, os.listdir("/proc"))) if child(session, example.pid)
    }
    assert [session for session in sessions if members(session)], "the server should run before it is interrupted"
    example.send_signal(signal.SIGINT)
    _, errors = example.communicate(timeout=120)
    assert example.returncode == 130
    assert errors.strip() == "rl_logprobs: interrupted; its servers have ended"
    assert not [session for session in sessions if members(session)]


def child(process: int, parent: int) -> bool:
    """Whether `parent` started this process, which then leads a session of its own."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False
    return int(fields[1]) == parent and int(fields[3]) == process
