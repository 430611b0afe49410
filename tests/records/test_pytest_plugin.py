"""The fixture for users' own suites: it passes, fails, skips and warns where it should, in a suite of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from harness_kit import ROOT, environment

CHECK = """
def test_prompts(deterministic_server):
    report = deterministic_server.check(["one river\\nof two lines", "two roads"], max_tokens=8, {more})
    assert report["answered"] == 40
"""
VERIFY = """
def test_record(deterministic_server):
    deterministic_server.verify({path!r})
"""
FINGERPRINT = """
def test_which(deterministic_server):
    assert deterministic_server.fingerprint == "bi-0123456789abcdef"
"""
CONTROL_FAULTS = {"rates": {"token": 0.5}, "faults_from": 3}


@pytest.fixture
def suite(tmp_path):
    """A function that runs a suite of one file with the plugin."""

    def run(test: str, *options: str, **env: str) -> tuple[int, str]:
        folder = tmp_path / "suite"
        folder.mkdir(exist_ok=True)
        (folder / "conftest.py").write_text('pytest_plugins = ["determinism.pytest_plugin"]\n')
        (folder / "test_it.py").write_text(test)
        command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", *options]
        path = os.pathsep.join([str(ROOT / "vllm"), *filter(None, [os.environ.get("PYTHONPATH")])])
        kept = {name: value for name, value in environment().items() if not name.startswith("DETERMINISM")}
        done = subprocess.run(
            command, cwd=folder, env=kept | {"PYTHONPATH": path} | env, capture_output=True, text=True, timeout=120
        )
        return done.returncode, done.stdout + done.stderr

    return run


def test_a_deterministic_server_passes(serve, suite):
    control = serve(**CONTROL_FAULTS)
    code, output = suite(CHECK.format(more=f"control_url={control.url!r}"), "--determinism-url", serve().url)
    assert code == 0, output


def test_one_other_token_fails_with_the_place(serve, suite):
    code, output = suite(CHECK.format(more=""), "--determinism-url", serve(faults={20: "token"}).url)
    assert code == 1 and "First difference" in output and "Traceback" not in output, output


def test_a_control_that_is_not_caught_fails_unless_that_is_allowed(serve, suite):
    more = f"control_url={serve().url!r}"
    code, output = suite(CHECK.format(more=more), "--determinism-url", serve().url)
    assert code == 1 and "INCONCLUSIVE" in output, output
    code, output = suite(CHECK.format(more=more + ", allow_inconclusive=True"), "--determinism-url", serve().url)
    assert code == 0 and "UserWarning" in output and "INCONCLUSIVE" in output, output


def test_allowing_the_inconclusive_allows_no_difference(serve, suite):
    code, output = suite(CHECK.format(more="allow_inconclusive=True"), DETERMINISM_URL=serve(faults={20: "token"}).url)
    assert code == 1, output


def test_a_record_is_verified(serve, suite, record):
    path = str(record(serve()))
    assert suite(VERIFY.format(path=path), DETERMINISM_URL=serve().url)[0] == 0
    code, output = suite(VERIFY.format(path=path), DETERMINISM_URL=serve(faults={5: "logprob"}).url)
    assert code == 1 and "EQUAL BUT IN LOGPROBS" in output
    code, output = suite(VERIFY.format(path=str(Path(path).parent / "none")), DETERMINISM_URL=serve().url)
    assert code == 1 and "cannot be read" in output


def test_the_fingerprint_can_be_asserted(serve, suite):
    assert suite(FINGERPRINT, DETERMINISM_URL=serve().url)[0] == 0
    assert suite(FINGERPRINT, DETERMINISM_URL=serve(digest="plain-0").url)[0] == 1


def test_without_an_address_the_skip_is_told(suite):
    code, output = suite(CHECK.format(more=""))
    assert code == 0 and "1 skipped" in output and "--determinism-url URL or DETERMINISM_URL is needed" in output


def test_a_server_that_is_gone_is_a_failure_and_no_skip(serve, suite):
    server = serve()
    server.die()
    code, output = suite(CHECK.format(more=""), DETERMINISM_URL=server.url)
    assert code == 1 and "skipped" not in output, output
