"""From what was seen to pass, fail or inconclusive, and the exit status of each."""

from collections import Counter
from dataclasses import dataclass

from .errors import EXIT_FAIL, EXIT_INCONCLUSIVE, EXIT_INTERRUPTED, EXIT_PASS, HarnessError
from .power import Power
from .tally import Tally

KINDS = {
    "http": "was refused or broke inside the server",
    "malformed": "came back malformed",
    "dropped": "lost its connection at every try",
    "timeout": "was not answered in time",
    "busy": "was sent away at every try, because the server was busy",
    "nan": "came back with a logprob that is no number",
    "replaced": "got the answer to another prompt",
}


@dataclass(frozen=True)
class Verdict:
    """kind is pass, fail or inconclusive; reason is one sentence; partial says that the run did not end."""

    kind: str
    reason: str
    exit_code: int
    partial: bool = False


def judge(tally: Tally) -> Verdict:
    """The verdict on one server's whole run, without a control."""
    if tally.failed:
        return Verdict("fail", unanswered(tally), EXIT_FAIL)
    if tally.diverged or tally.unique_outputs > 1:
        share = f"{tally.diverged} of {tally.answered} answers under load differ from the same prompt alone"
        return Verdict("fail", f"{share}, at the level of {tally.level}", EXIT_FAIL)
    if tally.seen < tally.planned or not tally.answered:
        return inconclusive(f"only {tally.seen} of {tally.planned} requests were sent", partial=True)
    if not tally.compared_tokens:
        return inconclusive("every answer is empty, so nothing was compared")
    if tally.repeated_ids:
        return inconclusive(
            f"{tally.repeated_ids} answers bear the id of an earlier one, as from a cache of answers before the server"
        )
    if len(tally.fingerprints) > 1:
        return inconclusive(
            f"the answers bear {len(tally.fingerprints)} system fingerprints, so more than one server gave them"
        )
    if tally.background_failed > tally.background_requests:
        return inconclusive(
            f"{tally.background_failed} of {tally.background_failed + tally.background_requests} requests of the other"
            " traffic failed, so the load was not what it should be"
        )
    return Verdict(
        "pass", f"all {tally.answered} answers under load equal the same prompt alone, in {tally.level}", EXIT_PASS
    )


def inconclusive(reason: str, partial: bool = False) -> Verdict:
    return Verdict("inconclusive", reason, EXIT_INCONCLUSIVE, partial)


def unanswered(tally: Tally) -> str:
    """How many requests got no sound answer, and why, the commonest reason first."""
    kinds = Counter(error.kind for _, error in tally.failures)
    reasons = [f"{count} {KINDS[kind]}" for kind, count in kinds.most_common()]
    number, error = tally.failures[0]
    return f"{tally.failed} requests got no sound answer ({'; '.join(reasons)}): request {number}: {error}"


def with_control(verdict: Verdict, control: Verdict | None, level: str) -> Verdict:
    """A pass stands only where the control, a plain server under the same load, was caught."""
    if verdict.kind != "pass" or control is None:
        return verdict
    if control.kind == "inconclusive":
        return Verdict("inconclusive", f"the control showed nothing: {control.reason}", control.exit_code)
    if control.kind == "pass":
        return inconclusive(
            f"the control passed, too: this load does not tell a plain server from a deterministic one in {level};"
            " try more requests, more at a time, or longer answers"
        )
    return verdict


def together(found: dict[str, Verdict], planned: int) -> Verdict:
    """One verdict on several modes: a failure of any is a failure, and a pass needs every one."""
    failed = [name for name, verdict in found.items() if verdict.kind == "fail"]
    open_ = [name for name, verdict in found.items() if verdict.kind == "inconclusive"]
    partial = len(found) < planned or any(verdict.partial for verdict in found.values())
    if failed:
        worst = found[failed[0]]
        codes = {found[name].exit_code for name in failed}
        status = EXIT_INTERRUPTED if EXIT_INTERRUPTED in codes else EXIT_FAIL
        return Verdict("fail", f"mode {', '.join(failed)}: {worst.reason}", status, partial)
    if open_:
        worst = found[open_[-1]]
        return Verdict("inconclusive", f"mode {', '.join(open_)}: {worst.reason}", worst.exit_code, partial)
    return Verdict("pass", f"every answer is the same in each of {len(found)} modes", EXIT_PASS)


def with_power(verdict: Verdict, power: Power, least: float) -> Verdict:
    """A pass without a control stands only where the load was likely enough to catch a server that is not sound."""
    if verdict.kind != "pass" or least <= 0:
        return verdict
    if power.value is None:
        return inconclusive(
            f"nothing differs in {power.level}, but without logprobs it cannot be estimated whether a difference would"
            " have been seen; --control-url takes a plain server of the same model"
        )
    if power.value < least:
        return inconclusive(
            f"nothing differs, but this load would have caught a plain server with a probability of {power.value:.2f}"
            f" only, by estimate; more or longer answers, more at a time or --control-url give more"
        )
    return verdict


def judge_control(tally: Tally, ended: BaseException | None) -> Verdict:
    """The control's verdict: it has failed only if its answers differ; a control that breaks shows nothing."""
    if tally.diverged:
        return Verdict("fail", f"{tally.diverged} of {tally.answered} answers differ, as they should", EXIT_FAIL)
    found = judge(tally) if ended is None else cut_short(tally, ended)
    if found.kind == "pass":
        return found
    return Verdict("inconclusive", found.reason, max(found.exit_code, EXIT_INCONCLUSIVE), found.partial)


def cut_short(tally: Tally, error: BaseException) -> Verdict:
    """The verdict on a run that ended early: what was seen stands, and nothing more can be said."""
    if isinstance(error, HarnessError):
        exit_code, why = error.exit_code, str(error)
    else:
        exit_code, why = EXIT_INTERRUPTED, "interrupted"
    why = f"{why}; partial results: {tally.seen - tally.failed} of {tally.planned} requests were answered"
    if tally.diverged:
        exit_code = EXIT_INTERRUPTED if exit_code == EXIT_INTERRUPTED else EXIT_FAIL
        return Verdict("fail", f"{why}, {tally.diverged} of them other than alone", exit_code, partial=True)
    kind = "fail" if exit_code == EXIT_FAIL else "inconclusive"
    return Verdict(kind, why, exit_code, partial=True)
