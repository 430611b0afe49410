"""Recording: in order, to the disk at once, and nothing that was kept is lost or replaced unasked."""

import json
import os
import pty
import resource
import signal
import subprocess
from pathlib import Path

import pytest
from harness_kit import COMMAND, environment
from record_server import FIELDS, OTHER, PROMPTS, refusal

PROBES = 1  # the harness's own request before the first prompt


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def begun(server, path: Path, prompts, **streams) -> subprocess.Popen:
    """A recording, one request at a time, in a process."""
    options = "--record", str(path), *prompts, "--max-tokens", "8", "--concurrency", "1"
    return subprocess.Popen([*COMMAND, "--url", server.url, *options], env=environment(), **streams)


def asked(path: Path) -> list[str]:
    return [line["request"]["prompt"] for line in lines(path) if "request" in line]


def test_a_record_holds_the_questions_the_answers_and_the_server(serve, record):
    path = record(serve())
    first, *answers, end = lines(path)
    assert first["server"] == {"vllm": "0.0.fake", "fingerprint": "bi-0123456789abcdef", "fields": FIELDS}
    assert [line["request"]["prompt"] for line in answers] == PROMPTS
    assert all(len(line["answer"]["logprobs"]) == len(line["answer"]["tokens"]) == 8 for line in answers)
    assert end["end"] == len(PROMPTS)
    assert not partial(path).exists()


def test_answers_are_kept_in_order_whatever_order_they_come_in(serve, record):
    faults = {PROBES + number: "busy" for number in range(0, 20, 3)}  # these are asked again, and so come later
    assert asked(record(serve(faults=faults), "--concurrency", 8)) == PROMPTS


def test_one_at_a_time_and_many_at_a_time_give_one_record(serve, record):
    server = serve()
    paths = [record(server, "--concurrency", count, name=f"{count}.jsonl") for count in (1, 16)]
    one, many = ([line["answer"] for line in lines(path)[1:-1]] for path in paths)
    assert one == many


def test_more_prompts_than_the_load_has_requests_are_all_asked(serve, harness, tmp_path):
    (tmp_path / "many.txt").write_text("\n".join(f"question {number}" for number in range(250)))
    path = tmp_path / "r"
    done = harness(serve(), "--record", path, "--prompt-file", tmp_path / "many.txt", "--max-tokens", 1)
    assert done.returncode == 0 and len(asked(path)) == 250


def test_generated_prompts_are_recorded_where_none_are_given(serve, harness, tmp_path):
    done = harness(serve(), "--record", tmp_path / "r", "--max-tokens", 2)
    assert done.returncode == 0 and len(asked(tmp_path / "r")) == 8
    assert "fingerprint:  bi-0123456789abcdef" in done.stdout


def test_a_record_is_not_replaced_unasked(serve, record, harness, prompts):
    path = record(serve())
    content = path.read_bytes()
    line = refusal(harness(serve(), "--record", path, *prompts, "--max-tokens", 8))
    assert "--force" in line and path.read_bytes() == content


def test_force_replaces_a_record_only_once_the_new_one_is_whole(serve, record, harness, prompts):
    path = record(serve())
    content = path.read_bytes()
    dying = serve(faults={PROBES + 10: "die"})
    done = harness(dying, "--record", path, *prompts, "--max-tokens", 8, "--force", "--retries", 0)
    assert done.returncode == 2 and path.read_bytes() == content
    assert record(serve(), "--force") == path
    assert len(lines(path)) == 22 and not partial(path).exists()


def test_a_record_begun_is_neither_gone_on_with_nor_replaced_unasked(serve, record, harness, prompts, tmp_path):
    path = tmp_path / "record.jsonl"
    dying = serve(faults={PROBES + 10: "die"})
    harness(dying, "--record", path, *prompts, "--max-tokens", 8, "--concurrency", 1, "--retries", 0)
    before = partial(path).read_bytes()
    line = refusal(harness(serve(), "--record", path, *prompts, "--max-tokens", 8))
    assert "--resume" in line and "--force" in line and partial(path).read_bytes() == before


def test_a_server_that_dies_costs_nothing_that_was_written(serve, record, harness, prompts, tmp_path):
    path = tmp_path / "record.jsonl"
    dying = serve(faults={PROBES + 10: "die"})
    done = harness(dying, "--record", path, *prompts, "--max-tokens", 8, "--concurrency", 1, "--retries", 0)
    line = refusal(done)
    assert f"10 of 20 answers are kept in {partial(path)}" in line and "--resume" in line
    kept = partial(path).read_bytes()
    assert record(serve(), "--resume") == path
    assert path.read_bytes().startswith(kept) and asked(path) == PROMPTS


def test_going_on_asks_only_what_is_missing(serve, record, harness, prompts, tmp_path):
    path = tmp_path / "record.jsonl"
    dying = serve(faults={PROBES + 10: "die"})
    harness(dying, "--record", path, *prompts, "--max-tokens", 8, "--concurrency", 1, "--retries", 0)
    server = serve()
    record(server, "--resume")
    assert server.requests == PROBES + 10


def test_a_killed_recording_goes_on(serve, record, prompts, tmp_path):
    path = tmp_path / "record.jsonl"
    server = serve(faults={PROBES + 10: "stall"})
    process = begun(server, path, prompts, stdout=subprocess.DEVNULL)
    server.wait_for_requests(PROBES + 11)
    process.kill()
    process.wait()
    assert len(lines(partial(path))) == 11 and not path.exists()
    assert asked(record(serve(), "--resume")) == PROMPTS


def test_ctrl_c_keeps_what_was_written_and_says_that_it_is_partial(serve, record, prompts, tmp_path):
    path = tmp_path / "record.jsonl"
    server = serve(faults={PROBES + 10: "stall"})
    process = begun(server, path, prompts, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    server.wait_for_requests(PROBES + 11)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    (line,) = errors.splitlines()
    assert "interrupted" in line and "partial record: 10 of 20 answers are kept" in line
    assert asked(record(serve(), "--resume")) == PROMPTS


def no_more_than(size: int):
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_file_that_may_not_grow_loses_nothing_that_was_written(serve, record, harness, prompts, tmp_path):
    path = tmp_path / "record.jsonl"
    options = ("--record", path, *prompts, "--max-tokens", "8", "--concurrency", "1")
    line = refusal(harness(serve(), *options, preexec_fn=no_more_than(10_000)))
    written = lines(partial(path))
    assert "cannot be written" in line and f"{len(written) - 1} answers are kept" in line and len(written) > 2
    assert asked(record(serve(), "--resume")) == PROMPTS


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 16 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small disk; the limit on a file's size is tried above")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_one_line_and_loses_nothing_that_was_written(serve, harness, prompts, small_disk):
    path = small_disk / "record.jsonl"
    options = ("--record", path, *prompts, "--max-tokens", "8", "--concurrency", "1")
    line = refusal(harness(serve(), *options))
    assert "No space left on device" in line and "--resume" in line
    kept = partial(path).read_bytes()
    assert kept.endswith(b"\n") and len(lines(partial(path))) > 2
    subprocess.run(["mount", "-o", "remount,size=1m", small_disk], check=True)
    assert harness(serve(), *options, "--resume").returncode == 0
    assert path.read_bytes().startswith(kept) and asked(path) == PROMPTS


def test_two_recordings_do_not_write_one_file(serve, harness, prompts, tmp_path):
    path = tmp_path / "record.jsonl"
    server = serve(faults={PROBES + 5: "stall"})
    options = ["--record", str(path), *prompts, "--max-tokens", "8", "--concurrency", "1"]
    process = subprocess.Popen([*COMMAND, "--url", server.url, *options], env=environment())
    try:
        server.wait_for_requests(PROBES + 6)
        for switch in ("--resume", "--force"):
            before = partial(path).read_bytes()
            assert "another process" in refusal(harness(serve(), *options, switch))
            assert partial(path).read_bytes() == before
    finally:
        process.kill()
        process.wait()


def test_a_finished_record_is_resumed_to_nothing(serve, record, harness, prompts):
    path = record(serve())
    server, content = serve(), path.read_bytes()
    done = harness(server, "--record", path, *prompts, "--max-tokens", 8, "--resume")
    assert done.returncode == 0 and "is finished" in done.stdout
    assert server.requests == PROBES and path.read_bytes() == content


@pytest.mark.parametrize(
    ("options", "server", "reason"),
    [
        (("--max-tokens", "9"), {}, "another prompt or setting at answer 1"),
        (("--max-tokens", "8", "--prompt", "one more"), {}, "another answers (20, now 21)"),
        (("--max-tokens", "8", "--level", "tokens"), {}, "another level (logprobs, now tokens)"),
        (("--max-tokens", "8", "--endpoint", "chat"), {}, "another dialect"),
        (("--max-tokens", "8"), {"changed": {"torch": "2.14.0"}}, "another server: torch was 2.13.0 and is 2.14.0"),
        (("--max-tokens", "8"), {"model": "other"}, "another model (fake, now other)"),
    ],
)
def test_only_the_same_recording_of_the_same_server_is_gone_on_with(
    serve, harness, prompts, tmp_path, options, server, reason
):
    path = tmp_path / "record.jsonl"
    dying = serve(faults={PROBES + 10: "die"})
    harness(dying, "--record", path, *prompts, "--max-tokens", 8, "--concurrency", 1, "--retries", 0)
    kept = partial(path).read_bytes()
    assert reason in refusal(harness(serve(**server), "--record", path, *prompts, *options, "--resume"))
    assert partial(path).read_bytes() == kept


def test_an_altered_partial_record_is_not_gone_on_with(serve, harness, prompts, tmp_path):
    path = tmp_path / "record.jsonl"
    dying = serve(faults={PROBES + 10: "die"})
    harness(dying, "--record", path, *prompts, "--max-tokens", 8, "--concurrency", 1, "--retries", 0)
    partial(path).write_bytes(partial(path).read_bytes().replace(b"number 3", b"number 7", 1))
    line = refusal(harness(serve(), "--record", path, *prompts, "--max-tokens", 8, "--resume"))
    assert "was altered: line 5" in line


def test_a_server_that_changes_in_between_ends_the_recording(serve, harness, prompts, tmp_path):
    path = tmp_path / "record.jsonl"
    server = serve()
    server.other_from = PROBES + 10
    done = harness(server, "--record", path, *prompts, "--max-tokens", 8, "--concurrency", 1)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert f"2 fingerprints (bi-0123456789abcdef, {OTHER})" in line and "10 of 20 answers are kept" in line


@pytest.mark.parametrize("fault", ["not_json", "error_500", "nan", "no_choice", "no_logprobs"])
def test_an_unsound_answer_ends_the_recording_and_is_not_kept(serve, record, harness, prompts, tmp_path, fault):
    path = tmp_path / "record.jsonl"
    done = harness(
        serve(faults={PROBES + 10: fault}), "--record", path, *prompts, "--max-tokens", 8, "--concurrency", 1
    )
    assert done.returncode == 1 and "prompt 11" in done.stderr and len(done.stderr.splitlines()) == 1
    assert len(lines(partial(path))) == 11
    assert asked(record(serve(), "--resume")) == PROMPTS


def test_a_server_without_a_fingerprint_is_recorded_all_the_same(serve, record):
    assert lines(record(serve(digest=None, says=False)))[0]["server"] == {
        "vllm": "0.0.fake",
        "fingerprint": None,
        "fields": {},
    }


def test_recording_a_plain_server_says_what_that_means(serve, harness, prompts, tmp_path):
    done = harness(serve(digest="plain-0123456789abcdef"), "--record", tmp_path / "r", *prompts)
    assert done.returncode == 0 and "plain vLLM" in done.stdout


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--record", "r", "--verify", "r"), "one of --record and --verify"),
        (("--record", "r", "--resume", "--force"), "one of --resume and --force"),
        (("--resume",), "it goes with --record"),
        (("--force", "--verify", "r"), "it goes with --record"),
        (("--record", "-"), "a file is needed"),
        (("--record", "no/such/folder/r"), "existing folder"),
        (("--record", "r", "--requests", "5"), "--requests=5 is not valid: it has no meaning with --record"),
        (("--record", "r", "--background", "0"), "no meaning with --record"),
        (("--record", "r", "--control-url", "http://127.0.0.1:1"), "no meaning with --record"),
        (("--record", "r", "--json", "j"), "no meaning with --record"),
        (("--verify", "r", "--max-tokens", "5"), "no meaning with --verify"),
        (("--verify", "r", "--prompt", "x"), "no meaning with --verify"),
        (("--verify", "r", "--junit", "x"), "no meaning with --verify"),
    ],
)
def test_what_makes_no_sense_together_is_refused(serve, harness, options, reason, tmp_path):
    server = serve()
    assert reason in refusal(harness(server, *options, cwd=tmp_path))
    assert server.requests == 0 and not list(tmp_path.iterdir())


def test_a_broken_recording_is_on_the_disk_before_the_next_answer(serve, prompts, tmp_path):
    """Streamed, not kept until the end: while answer 11 does not come, 10 are in the file."""
    path = tmp_path / "record.jsonl"
    server = serve(faults={PROBES + 10: "stall"})
    terminal, stdout = pty.openpty()
    process = begun(server, path, prompts, stdout=stdout)
    os.close(stdout)
    try:
        server.wait_for_requests(PROBES + 11)
        with open(terminal, "rb", buffering=0) as screen:
            shown = b""
            while b"Recording: 10/20" not in shown:
                shown += screen.read(1024)  # an error once the process ended
        assert len(lines(partial(path))) == 11
    finally:
        process.kill()
        process.wait()
