"""The JSON report and the JUnit file: whole or not there, and never a pass where the run was none."""

import json
import os
import stat
import xml.etree.ElementTree as ET

import pytest
from determinism.files import write, write_json
from harness_kit import ONE_PROMPT, SHORT


def test_the_json_report_holds_all_that_the_run_saw(serve, harness, tmp_path):
    path = tmp_path / "result.json"
    server = serve(fingerprints=("fp_1",))
    assert harness(server, *SHORT, "--seed", "3", "--json", str(path)).returncode == 0
    content = json.loads(path.read_text())
    assert {
        "schema": 1,
        "url": server.url,
        "model": "fake",
        "level": "logprobs",
        "levels_offered": ["text", "tokens", "logprobs"],
        "requests": 100,
        "concurrency": 10,
        "max_tokens": 16,
        "seed": 3,
        "verdict": "pass",
        "partial": False,
        "answered": 100,
        "failed": 0,
        "text_variants": 1,
        "token_variants": 1,
        "logprob_variants": 1,
        "identical_to_solo": 100,
        "divergences": [],
        "divergences_total": 0,
        "control": None,
        "server": {"version": "0.0.fake", "system_fingerprint": "fp_1"},
    }.items() <= content.items()
    assert len(content["latencies"]["loaded"]) == len(content["logprob_differences"]) == 100
    assert sum(prompt["requests"] for prompt in content["prompts"]) == 100


def test_a_key_is_in_no_file(serve, harness, tmp_path):
    paths = tmp_path / "result.json", tmp_path / "result.xml"
    done = harness(
        serve(api_key="s3cr3t"), *SHORT, "--json", str(paths[0]), "--junit", str(paths[1]), VLLM_API_KEY="s3cr3t"
    )
    assert done.returncode == 0
    assert not any("s3cr3t" in text for text in (done.stdout, *(path.read_text() for path in paths)))


def junit(harness, server, tmp_path, *options: str) -> ET.Element:
    path = tmp_path / "result.xml"
    harness(server, *SHORT, "--junit", str(path), *options)
    return ET.parse(path).getroot()[0]


def counts(suite: ET.Element) -> tuple[int, int]:
    return int(suite.get("failures")), int(suite.get("errors"))


def test_junit_of_a_pass_has_a_case_for_each_prompt_and_no_problem(serve, harness, tmp_path):
    suite = junit(harness, serve(), tmp_path)
    assert counts(suite) == (0, 0)
    assert len(suite) == int(suite.get("tests")) == 9


def test_junit_of_a_failure_names_prompt_and_reason(serve, harness, tmp_path):
    suite = junit(harness, serve(faults={30: "token"}), tmp_path, *ONE_PROMPT)
    assert counts(suite) == (2, 0)
    assert "1 of 100 answers differ" in suite[0].find("failure").get("message")


def test_junit_of_an_inconclusive_run_is_an_error_and_never_a_pass(serve, harness, tmp_path):
    assert counts(junit(harness, serve(same_id=True), tmp_path)) == (0, 1)
    suite = junit(harness, serve(), tmp_path, "--control-url", serve().url)
    assert counts(suite) == (0, 2)
    assert counts(junit(harness, serve(faults={30: "die"}), tmp_path, *ONE_PROMPT, "--retries", "0"))[1] == 1


def test_a_servers_message_cannot_break_the_xml(serve, harness, tmp_path):
    suite = junit(harness, serve(faults={30: "error_500"}, message="\x00\x1b<&\ud800]]>"), tmp_path, *ONE_PROMPT)
    assert "<&" in suite[-1].find("failure").get("message")


def test_a_number_that_json_has_none_for_is_null(tmp_path):
    write_json(str(tmp_path / "a.json"), {"a": [float("inf"), {"b": -float("inf")}], "c": 1.5})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [None, {"b": None}], "c": 1.5}


def test_a_file_is_replaced_as_a_whole_and_a_link_stays_a_link(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    write(str(tmp_path / "link"), "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == ["link", "real"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    (tmp_path / "result").write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write(str(tmp_path / "result"), "new \ud800")
    assert (tmp_path / "result").read_text() == "old"
    assert os.listdir(tmp_path) == ["result"]


def test_a_device_is_written_to_and_stays_a_device(serve, harness, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write(str(pipe), "through")
    assert os.read(reader, 100) == b"through"
    os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
