"""The report is one file that a phone without a network can show, and it shows what the harness found."""

import re
import xml.etree.ElementTree as ET

import pytest
from demo import OURS, PLAIN, judge
from determinism import report


def render(verdict, results) -> str:
    return report.render(verdict, {name: [result] for name, result in results.items()}, "how it was done")


@pytest.fixture
def page(harness_report) -> str:
    results = {PLAIN: harness_report("fail", changed=48), OURS: harness_report("pass")}
    return render(judge(results[PLAIN], results[OURS]), results)


def test_report_needs_no_other_file(page):
    assert not re.search(r"https?:|//[a-z]|<script|<link|<img|@import|url\((?!#)", page)


def test_report_says_verdict_and_numbers(page):
    assert "<h1>PASS</h1>" in page
    for cell in ("0 of 48", "48 of 48", "13", "0.32.0", "logprob -1.25"):
        assert cell in " ".join(page.split())


def test_report_shows_where_either_server_parted(harness_report):
    results = {PLAIN: harness_report("fail", changed=48), OURS: harness_report("fail", changed=1)}
    assert re.findall(r"Where (.*) first parted", render(judge(results[PLAIN], results[OURS]), results)) == [
        PLAIN,
        OURS,
    ]


def test_report_escapes_what_the_model_said(page):
    assert "&lt;script&gt;" in page


def test_each_request_is_a_point_in_each_picture(page):
    pictures = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(pictures) == 2
    points = [len(ET.fromstring(re.sub(r"xlink:|xml:", "", svg)).findall(".//use")) for svg in pictures]
    assert points[0] >= 96
    assert points[1] >= 2 * (6 + 48)


def test_pictures_share_no_id(page):
    ids = re.findall(r'<(?:path|clipPath)[^>]* id="([^"]+)"', page)
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize(
    "overrides", [{"logprob_variants": None, "logprob_differences": []}, {"latencies": {"solo": [], "loaded": []}}]
)
def test_report_of_a_server_that_gave_less_is_still_made(harness_report, overrides):
    results = {PLAIN: harness_report("pass", **overrides), OURS: harness_report("pass", **overrides)}
    assert "<h1>INCONCLUSIVE</h1>" in render(judge(results[PLAIN], results[OURS]), results)
