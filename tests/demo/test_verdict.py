"""The demo's verdict: PASS only where the control was caught by the very test that our server passed."""

import pytest
from demo import judge


def test_pass_needs_a_control_that_failed_and_a_server_that_passed(harness_report):
    assert judge(harness_report("fail", changed=48), harness_report("pass")).status == 0


@pytest.mark.parametrize("control", ["pass", "fail", "inconclusive"])
def test_a_server_that_failed_is_a_failure_whatever_the_control_did(harness_report, control):
    assert judge(harness_report(control), harness_report("fail", changed=1)).status == 1


def test_a_control_that_passed_makes_it_inconclusive(harness_report):
    verdict = judge(harness_report("pass"), harness_report("pass"))
    assert (verdict.name, verdict.status) == ("INCONCLUSIVE", 3)


@pytest.mark.parametrize(("control", "ours"), [("fail", "inconclusive"), ("inconclusive", "pass")])
def test_an_inconclusive_run_is_never_a_pass_and_says_why(harness_report, control, ours):
    reason = "the connection dropped"
    verdict = judge(harness_report(control, reason=reason), harness_report(ours, reason=reason))
    assert verdict.status == 3
    assert reason in verdict.reason


def test_a_control_that_broke_was_not_caught(harness_report):
    """A plain server whose requests failed shows nothing about batches: calling that a pass would be a false proof."""
    broken = harness_report("fail", changed=0, reason="96 requests got no sound answer")
    verdict = judge(broken, harness_report("pass"))
    assert (verdict.name, verdict.status) == ("INCONCLUSIVE", 3)
    assert "no sound answer" in verdict.reason


def test_a_server_of_ours_that_broke_fails_for_that_reason_and_not_for_changed_answers(harness_report):
    broken = harness_report("fail", changed=0, reason="3 requests got no sound answer")
    verdict = judge(harness_report("fail", changed=48), broken)
    assert verdict.status == 1
    assert "no sound answer" in verdict.reason
    assert "changed" not in verdict.reason


def test_equal_texts_without_logprobs_are_no_pass(harness_report):
    assert judge(harness_report("fail", changed=48), harness_report("pass", level="text")).status == 3
