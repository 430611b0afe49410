"""--report writes the page of the very run: its verdict, power, modes, and where answers part."""

import re

from harness_kit import SHORT
from test_settings import is_usage_error

OTHER_FILES = re.compile(r"//[a-z]|<script|<link|<img|@import|url\((?!#)")


def page(harness, server, tmp_path, *options: str):
    path = tmp_path / "report.html"
    done = harness(server, *SHORT, "--report", str(path), *options)
    assert not OTHER_FILES.search(path.read_text().replace(server.url, "")), "a page in one file"
    return done, path.read_text()


def test_a_pass_says_what_it_is_worth(serve, harness, tmp_path):
    done, html = page(harness, serve(), tmp_path)
    assert done.returncode == 0
    assert "<h1>PASS</h1>" in html
    assert "What a pass is worth" in html
    assert "0.995 (128 tokens compared" in html
    assert html.count("<svg") == 2


def test_a_failure_shows_where_answers_part_and_how_to_repeat_it(serve, harness, tmp_path):
    done, html = page(harness, serve(rates={"logprob": 0.3}, faults_from=25), tmp_path)
    assert done.returncode == 1
    assert "<h1>FAIL</h1>" in html
    assert "Where server first parted" in html
    assert "What a pass is worth" not in html
    assert "1 float32 ulps away" in html
    assert "To repeat it: <code>python vllm/test_determinism.py" in html


def test_a_control_has_its_row(serve, harness, tmp_path):
    control = serve(rates={"token": 0.3}, faults_from=25)
    _, html = page(harness, serve(), tmp_path, "--control-url", control.url)
    assert 'scope="row">control<' in html
    assert "Where control first parted" in html
    assert "What a pass is worth" not in html


def test_every_mode_has_its_row(serve, harness, tmp_path):
    _, html = page(harness, serve(), tmp_path, "--mode", "all", "--max-tokens", "64")
    for name in ("same", "mixed", "needle", "prefix", "stream", "seeded"):
        assert f'scope="row">{name}: server<' in html


def test_a_report_that_cannot_be_written_is_refused_before_the_run(serve, harness, tmp_path):
    server = serve()
    is_usage_error(harness(server, "--report", str(tmp_path / "none" / "x.html")), "--report", "x.html", "")
    is_usage_error(harness(server, "--report", "-"), "--report", "-", "a file is needed")
    assert server.requests == 0
