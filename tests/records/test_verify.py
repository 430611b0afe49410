"""Verifying: equal is said only of equal answers; else where they part, and which change of the server explains it."""

import json
import signal
import subprocess

import pytest
from harness_kit import COMMAND, environment
from record_server import OTHER, PROMPTS, refusal

PROBES = 1
PLACE = PROBES + 6  # the seventh answer
ONE = ("--concurrency", "1")


def test_the_same_server_gives_the_same_record(serve, record, harness):
    path = record(serve())
    done = harness(serve(), "--verify", path)
    assert done.returncode == 0, done.stdout
    assert "✓ EQUAL: all 20 answers equal the record, in logprobs" in done.stdout
    assert "The fingerprint is the recorded one, bi-0123456789abcdef." in done.stdout


def test_everything_is_asked_as_it_was(serve, record, harness):
    first, second = serve(), serve()
    path = record(first)
    harness(second, "--verify", path)
    was, now = ([{**body, "cache_salt": None} for body in server.bodies[PROBES:]] for server in (first, second))
    key = lambda body: body["prompt"]  # noqa: E731
    assert sorted(was, key=key) == sorted(now, key=key)


def test_no_answer_comes_from_another_requests_cache(serve, record, harness):
    server = serve()
    path = record(server)
    harness(server, "--verify", path)
    salts = [body["cache_salt"] for body in server.bodies[PROBES : PROBES + 20] + server.bodies[-20:]]
    assert len({*salts}) == 40


@pytest.mark.parametrize("fault", ["token", "text", "swap"])
def test_another_answer_is_different_and_told_where(serve, record, harness, fault):
    path = record(serve())
    done = harness(serve(faults={PLACE: fault}), "--verify", path, *ONE)
    assert done.returncode == 1
    assert "✗ DIFFERENT: 1 of 20 answers differ from the record in tokens" in done.stdout
    assert "First difference: answer 7 of the record" in done.stdout
    assert "Equal:                  19 of 20" in done.stdout


@pytest.mark.parametrize(
    ("fault", "what"), [("logprob", "logprob"), ("alternative", "logprob of an alternative token")]
)
def test_one_ulp_is_a_difference_in_logprobs_alone(serve, record, harness, fault, what):
    path = record(serve())
    done = harness(serve(faults={PLACE: fault}), "--verify", path, *ONE)
    assert done.returncode == 1
    assert "✗ EQUAL BUT IN LOGPROBS: 1 of 20 answers differ in logprobs alone" in done.stdout
    assert f"token index:  7, in the {what}" in done.stdout and "1 float32 ulps" in done.stdout


def test_logprobs_may_be_left_out_of_the_judgement(serve, record, harness):
    path = record(serve())
    done = harness(serve(faults={PLACE: "logprob"}), "--verify", path, *ONE, "--level", "tokens")
    assert done.returncode == 0 and "in tokens" in done.stdout
    assert harness(serve(faults={PLACE: "token"}), "--verify", path, *ONE, "--level", "tokens").returncode == 1


def test_a_changed_field_explains_a_difference(serve, record, harness):
    path = record(serve())
    other = serve(changed={"torch": "2.14.0", "quantization": "fp8"}, digest=OTHER, faults={PLACE: "token"})
    done = harness(other, "--verify", path, *ONE)
    assert done.returncode == 1
    assert "2 of what its bits depend on changed, which explains a difference" in done.stdout
    changed = [line.split() for line in done.stdout.splitlines() if "→" in line]
    assert changed == [["quantization:", "none", "→", "fp8"], ["torch:", "2.13.0", "→", "2.14.0"]]


def test_a_changed_field_without_a_difference_is_told_too(serve, record, harness):
    path = record(serve())
    done = harness(serve(changed={"torch": "2.14.0"}, digest=OTHER), "--verify", path)
    assert done.returncode == 0 and "changed, and no answer with it" in done.stdout and "2.14.0" in done.stdout


def test_a_field_that_comes_or_goes_is_a_change(serve, record, harness):
    path = record(serve(changed={"old": "1"}))
    done = harness(serve(changed={"new": "2"}, digest=OTHER), "--verify", path)
    changed = [line.split() for line in done.stdout.splitlines() if "→" in line]
    assert changed == [["new:", "none", "→", "2"], ["old:", "1", "→", "none"]]


def test_an_unexplained_difference_of_a_server_that_promises_is_a_fault_of_it(serve, record, harness):
    path = record(serve())
    done = harness(serve(faults={PLACE: "token"}), "--verify", path, *ONE)
    assert "this is a fault of the server, and worth a report" in done.stdout


def test_a_difference_of_a_plain_server_is_no_surprise(serve, record, harness):
    plain = "plain-0123456789abcdef"
    path = record(serve(digest=plain))
    done = harness(serve(digest=plain, faults={PLACE: "token"}), "--verify", path, *ONE)
    assert done.returncode == 1 and "may depend on what else it serves" in done.stdout


def test_where_no_server_tells_a_fingerprint_nothing_is_explained(serve, record, harness):
    path = record(serve(digest=None, says=False))
    done = harness(serve(digest=None, says=False, faults={PLACE: "token"}), "--verify", path, *ONE)
    assert done.returncode == 1 and "nothing can be said of what changed" in done.stdout


def test_a_server_that_stopped_telling_its_fingerprint_is_another(serve, record, harness):
    path = record(serve())
    done = harness(serve(digest=None, says=False), "--verify", path)
    assert "bi-0123456789abcdef → none" in done.stdout


@pytest.mark.parametrize("fault", ["not_json", "error_500", "nan", "null", "no_choice", "truncate", "no_logprobs"])
def test_an_answer_that_did_not_come_is_no_equal_one(serve, record, harness, fault):
    path = record(serve())
    done = harness(serve(faults={PLACE: fault}), "--verify", path, *ONE)
    assert done.returncode == 1
    assert "✗ UNANSWERED: 1 of 20 answers did not come" in done.stdout and "answer 7: " in done.stdout


@pytest.mark.parametrize("fault", ["drop", "busy", "limited"])
def test_what_passes_by_itself_is_asked_again(serve, record, harness, fault):
    path = record(serve())
    assert harness(serve(faults={PLACE: fault}), "--verify", path, *ONE).returncode == 0


def test_a_prompt_that_no_longer_fits_is_not_answered(serve, record, harness):
    path = record(serve(), "--prompt", "word " * 30)
    done = harness(serve(context=20), "--verify", path)
    assert done.returncode == 1 and "1 of 21 answers did not come" in done.stdout
    assert "maximum context length is 20" in done.stdout


def test_a_server_that_dies_gives_partial_results_and_no_pass(serve, record, harness):
    path = record(serve())
    done = harness(serve(faults={PLACE: "die"}), "--verify", path, *ONE, "--retries", 0)
    assert done.returncode == 2
    assert "? INCONCLUSIVE: nothing answers" in done.stdout and "6 of 20 answers were compared" in done.stdout


def test_a_server_that_dies_after_a_difference_has_differed(serve, record, harness):
    path = record(serve())
    done = harness(serve(faults={PLACE: "die", PLACE - 1: "token"}), "--verify", path, *ONE, "--retries", 0)
    assert done.returncode == 1 and "partial results: 1 of 20 answers differ" in done.stdout


def test_ctrl_c_tells_what_was_compared(serve, record):
    path = record(serve())
    server = serve(faults={PLACE: "stall"})
    command = [*COMMAND, "--url", server.url, "--verify", str(path), *ONE]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True)
    server.wait_for_requests(PLACE + 1)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted; partial results: 6 of 20 answers were compared" in output and "EQUAL:" not in output


def test_answers_of_two_servers_are_not_taken_for_one(serve, record, harness):
    path = record(serve())
    server = serve()
    server.other_from = PLACE
    done = harness(server, "--verify", path, *ONE)
    assert done.returncode == 1 and "2 fingerprints" in done.stdout


def test_answers_that_are_all_empty_prove_nothing(serve, record, harness):
    path = record(serve(empty=True))
    done = harness(serve(empty=True), "--verify", path)
    assert done.returncode == 3 and "nothing was compared" in done.stdout


def test_a_level_that_the_server_lost_is_not_silently_dropped(serve, record, harness):
    path = record(serve())
    done = harness(serve(logprobs=False), "--verify", path)
    assert done.returncode == 3 and "--level='logprobs' cannot be compared" in done.stderr


def test_a_level_that_the_record_does_not_hold_is_refused(serve, record, harness):
    path = record(serve(), "--level", "tokens")
    assert harness(serve(), "--verify", path).returncode == 0
    assert "the record holds no more than tokens" in refusal(harness(serve(), "--verify", path, "--level", "logprobs"))


def test_a_record_of_chats_is_asked_as_chats(serve, record, harness):
    server = serve()
    path = record(serve(), "--endpoint", "chat")
    assert harness(server, "--verify", path).returncode == 0
    assert all("messages" in body for body in server.bodies)
    assert harness(serve(chat=False), "--verify", path).returncode == 2


def test_a_model_of_another_name_is_asked_where_it_is_the_only_one(serve, record, harness):
    path = record(serve())
    assert harness(serve(model="renamed"), "--verify", path).returncode == 0
    line = refusal(harness(serve(models=("a", "b")), "--verify", path))
    assert "--model='fake'" in line and "a, b" in line


def test_the_report_for_programs_holds_it_all(serve, record, harness, tmp_path):
    path = record(serve())
    other = serve(changed={"torch": "2.14.0"}, digest=OTHER, faults={PLACE: "token", PLACE + 1: "error_500"})
    harness(other, "--verify", path, *ONE, "--json", tmp_path / "j")
    content = json.loads((tmp_path / "j").read_text())
    assert (content["kind"], content["verdict"], content["equal"], content["different"]) == (
        "verify",
        "different",
        18,
        1,
    )
    assert [found["request"] for found in content["differences"]] == [7]
    assert [found["answer"] for found in content["failures"]] == [8]
    assert content["changed"] == [{"field": "torch", "recorded": "2.13.0", "now": "2.14.0"}]
    assert content["sha256"] == json.loads(path.read_bytes().splitlines()[-1])["sha256"]


def test_quiet_is_one_line(serve, record, harness):
    path = record(serve())
    (line,) = harness(serve(faults={PLACE: "token"}), "--verify", path, *ONE, "--quiet").stdout.splitlines()
    assert line.startswith("✗ DIFFERENT")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda content: content[:-1], "is cut short after 20 answers"),
        (lambda content: content[: len(content) // 2], "is cut short"),
        (lambda content: content.replace(b"w1", b"w2", 1), "was altered"),
        (
            lambda content: content.replace(b'"version":1', b'"version":7', 1),
            "version 7; this release reads versions up to 1",
        ),
        (lambda content: b'{"some": "json"}\n', "is not a record"),
        (lambda content: content + content, "something follows its end"),
    ],
)
def test_a_file_that_is_no_whole_record_is_refused_before_anything_is_asked(serve, record, harness, change, reason):
    path = record(serve())
    path.write_bytes(change(path.read_bytes()))
    server = serve()
    line = refusal(harness(server, "--verify", path))
    assert reason in line and str(path) in line
    assert server.requests == 0


def test_a_record_that_is_not_whole_yet_is_told_by_its_name(serve, harness, prompts, tmp_path):
    path = tmp_path / "r"
    dying = serve(faults={PLACE: "die"})
    harness(dying, "--record", path, *prompts, "--retries", 0)
    line = refusal(harness(serve(), "--verify", path))
    assert f"--record {path} --resume" in line


def test_every_answer_is_compared_with_its_own(serve, record, harness):
    """Many in flight, some late: a mix-up would show as a difference."""
    path = record(serve())
    faults = {PROBES + number: "busy" for number in range(0, len(PROMPTS), 2)}
    assert harness(serve(faults=faults), "--verify", path, "--concurrency", 8).returncode == 0
