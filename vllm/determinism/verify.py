"""--verify: ask again what a record holds, say what differs and where, and which change of the server explains it."""

import asyncio
import itertools
import secrets
import sys
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .client import Server
from .compare import Divergence, digests, first_difference, largest_difference
from .errors import (
    EXIT_FAIL,
    EXIT_INCONCLUSIVE,
    EXIT_INTERRUPTED,
    EXIT_PASS,
    EXIT_USAGE,
    HarnessError,
    RequestFailed,
    UsageError,
)
from .files import check_writable, write_json
from .identity import Change, Identity, changes, identify
from .in_order import answers
from .output import GREEN, RED, YELLOW, Screen, number, of_what, token
from .probe import Offer, compared_level, probe
from .protocol import LEVELS, Answer, Request
from .recorder import partial_name
from .records import Entry, Reader, RecordError
from .settings import Settings

KEPT = 100
"""Differences and failures kept in full; the rest are counted."""
LONGEST_VALUE = 60
SCHEMA = 1


@dataclass
class Findings:
    """What the answers showed, of all that the record holds."""

    level: str
    planned: int
    equal: int = 0
    in_logprobs: int = 0
    different: int = 0
    other_prompts: int = 0
    empty: int = 0
    failed: int = 0
    largest: float = 0.0
    differences: list[Divergence] = field(default_factory=list)
    failures: list[tuple[int, RequestFailed]] = field(default_factory=list)
    ended: BaseException | None = None

    @property
    def done(self) -> int:
        return self.equal + self.in_logprobs + self.different + self.failed

    def add(self, place: int, entry: Entry, now: Answer | RequestFailed) -> None:
        """Count the answer number `place`, from 1."""
        if isinstance(now, Answer) and LEVELS.index(now.level) < LEVELS.index(self.level):
            now = RequestFailed("malformed", f"an answer without {self.level}")
        if isinstance(now, RequestFailed):
            self.failed += 1
            if len(self.failures) < KEPT:
                self.failures.append((place, now))
            return
        before = entry.answer
        self.empty += not before.text and not before.tokens
        self.other_prompts += None not in (before.prompt_ids, now.prompt_ids) and before.prompt_ids != now.prompt_ids
        was, found = digests(before), digests(now)
        if was[self.level] == found[self.level]:
            self.equal += 1
            return
        if self.level == "logprobs" and was["tokens"] == found["tokens"]:
            self.in_logprobs += 1
            self.largest = max(self.largest, largest_difference(before, now) or 0.0)
        else:
            self.different += 1
        parted = first_difference(before, now, self.level, place, place - 1)
        if parted is not None and len(self.differences) < KEPT:
            self.differences.append(parted)

    def verdict(self) -> tuple[str, str, int]:
        """(kind, one sentence, exit status); kind is equal, logprobs, different, unanswered, empty or partial."""
        of = f"of {self.planned} answers"
        exit_code = EXIT_FAIL
        if self.different:
            kind, reason = "different", f"{self.different} {of} differ from the record in {self._what()}"
            if self.in_logprobs:
                reason += f", {self.in_logprobs} more in logprobs alone"
        elif self.in_logprobs:
            kind = "logprobs"
            reason = (
                f"{self.in_logprobs} {of} differ in logprobs alone, by up to {self.largest:.3g}; every token is equal"
            )
        elif self.failed:
            kind, reason = "unanswered", f"{self.failed} {of} did not come"
        elif self.ended is None and self.empty == self.planned:
            return "empty", "every answer of the record is empty, so nothing was compared", EXIT_INCONCLUSIVE
        elif self.ended is None:
            return "equal", f"all {self.planned} answers equal the record, in {self.level}", EXIT_PASS
        else:
            kind, reason = "partial", f"{self.equal} {of} were compared, and equal the record"
        if self.ended is not None:
            if isinstance(self.ended, HarnessError):
                why, exit_code = str(self.ended), EXIT_FAIL if kind != "partial" else self.ended.exit_code
            else:
                why, exit_code = "interrupted", EXIT_INTERRUPTED
            reason = f"{why}; partial results: {reason}"
        return kind, reason, exit_code

    def _what(self) -> str:
        return "text" if self.level == "text" else "tokens"


async def verify(settings: Settings, path: Path, json_path: str | None, screen: Screen) -> int:
    """Replay the record; returns the exit status: 0 equal, 1 not, 3 where nothing can be said.

    Raises:
        RecordError: the file is no whole record.
        HarnessError: the server cannot be asked.
    """
    check_writable("--json", json_path)
    if not path.exists() and partial_name(path).exists():
        raise RecordError(path, f"is not whole yet; --record {path} --resume goes on with it")
    with Reader(path) as reader:
        checksum = reader.check().checksum
        header = reader.header
    level = header.level if settings.level is None else settings.level
    if LEVELS.index(level) > LEVELS.index(header.level):
        raise UsageError("--level", level, f"the record holds no more than {header.level}")
    async with Server(settings.target) as server:
        as_recorded = replace(settings, endpoint=header.dialect.endpoint)
        offer = await probe(server.lane(), as_recorded, prefer=None if settings.model else header.model)
        compared_level(offer, level)
        now = await identify(server.lane(), offer)
        found = Findings(level, header.answers)
        await replay(server, path, offer, settings.concurrency, found, screen)
    before = Identity(header.fingerprint, header.fields, header.vllm)
    changed = changes(before, now)
    kind, reason, exit_code = found.verdict()
    show(screen, found, kind, reason)
    if not screen.quiet:
        print_difference(screen, found)
        print_why(screen, before, now, changed, kind)
    if json_path is not None:
        content = report(found, kind, reason, before, now, changed) | {"record": str(path), "sha256": checksum}
        try:
            write_json(json_path, content)
        except OSError as error:
            print(f"test_determinism: --json={json_path!r} could not be written: {error.strerror}", file=sys.stderr)
            return exit_code or EXIT_USAGE
    return exit_code


async def replay(server: Server, path: Path, offer: Offer, concurrency: int, found: Findings, screen: Screen) -> None:
    """Ask everything again, the prompts computed anew. What ends it early is kept in the findings."""
    with Reader(path) as reader:
        entries, asked = itertools.tee(reader.entries())
        dialect = reader.header.dialect
        try:
            async with aclosing(answers(server, dialect, offer.model, salted(asked), concurrency)) as replies:
                async for _, answer in replies:
                    found.add(found.done + 1, next(entries), answer)
                    screen.unfinished(f"Verifying: {found.done}/{found.planned}")
        except (HarnessError, asyncio.CancelledError) as error:
            found.ended = error


def salted(entries: Iterator[Entry]) -> Iterator[Request]:
    """The requests, none of which may find its prompt in the server's cache."""
    run = secrets.token_hex(8)
    for place, entry in enumerate(entries):
        yield replace(entry.request, cache_salt=f"{run} {place}")


def show(screen: Screen, found: Findings, kind: str, reason: str) -> None:
    if not screen.quiet:
        screen.line("Results:")
        screen.line(f"  Equal:                  {found.equal} of {found.planned}")
        if found.level == "logprobs":
            screen.line(f"  Equal but in logprobs:  {found.in_logprobs}")
        screen.line(f"  Different:              {found.different}")
        screen.line(f"  Not answered:           {found.failed}")
        if found.failures:
            place, error = found.failures[0]
            screen.line(f"    answer {place}: {error}")
        screen.line()
    if kind == "equal":
        screen.painted(GREEN, f"✓ EQUAL: {reason}")
    elif kind in ("empty", "partial"):
        screen.painted(YELLOW, f"? INCONCLUSIVE: {reason}")
    else:
        screen.painted(RED, f"✗ {'EQUAL BUT IN LOGPROBS' if kind == 'logprobs' else kind.upper()}: {reason}")


def print_difference(screen: Screen, found: Findings) -> None:
    """Where the first answer that differs leaves the record."""
    first = min(found.differences, key=lambda one: one.request, default=None)
    if first is None:
        return
    screen.line()
    screen.line(f"First difference: answer {first.request} of the record")
    if found.other_prompts:
        screen.line(f"  {found.other_prompts} prompts became other tokens: the tokenizer or the chat template changed")
    if first.token_index is None:
        screen.line(f"  in the {first.what}, after {first.character} equal characters")
        return
    screen.line(f"  token index:  {first.token_index}, in the {of_what(first)}")
    screen.line(f"  recorded:     token {token(first.token_a)}, logprob {number(first.logprob_a)}")
    screen.line(f"  now:          token {token(first.token_b)}, logprob {number(first.logprob_b)}")
    if first.difference is not None:
        ulps = "" if first.ulps is None else f", {first.ulps} float32 ulps"
        screen.line(f"  difference:   {first.difference:.3g}{ulps}")


def print_why(screen: Screen, before: Identity, now: Identity, changed: list[Change], kind: str) -> None:
    """What the fingerprints say of the outcome."""
    screen.line()
    for line in why(before, now, kind, len(changed)):
        screen.line(line)
    for name, was, value in changed:
        screen.line(f"  {name + ':':<24}{short(was)} → {short(value)}")


def why(before: Identity, now: Identity, kind: str, changed: int) -> list[str]:
    """The explanation in lines, without the list of what changed."""
    equal = kind == "equal"
    if changed:
        what = "changed, and no answer with it" if equal else "changed, which explains a difference"
        return [f"The server is not the one that was recorded: {changed} of what its bits depend on {what}:"]
    if before.fingerprint is None:
        return ["The server tells no fingerprint, so nothing can be said of what changed."]
    same = f"The fingerprint is the recorded one, {now.fingerprint}."
    if equal or kind in ("empty", "partial", "unanswered"):
        return [same]
    if now.promises:
        return [same, "It promises equal answers: this is a fault of the server, and worth a report."]
    if now.says_plain:
        return [same, "It is of plain vLLM, whose answers may depend on what else it serves; --concurrency 1 may help."]
    return [same, "It makes no promise of equal answers."]


def short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE // 2]}…{text[-8:]}"


def report(
    found: Findings, kind: str, reason: str, before: Identity, now: Identity, changed: list[Change]
) -> dict[str, Any]:
    """The JSON report."""
    return {
        "schema": SCHEMA,
        "kind": "verify",
        "verdict": kind,
        "reason": reason,
        "level": found.level,
        "answers": found.planned,
        "compared": found.done - found.failed,
        "equal": found.equal,
        "equal_but_in_logprobs": found.in_logprobs,
        "different": found.different,
        "failed": found.failed,
        "other_prompt_tokens": found.other_prompts,
        "largest_logprob_difference": found.largest,
        "differences": [one.to_json() for one in sorted(found.differences, key=lambda one: one.request)],
        "failures": [{"answer": place, "kind": e.kind, "message": str(e)} for place, e in found.failures],
        "fingerprint": {"recorded": before.fingerprint, "now": now.fingerprint},
        "changed": [{"field": name, "recorded": was, "now": value} for name, was, value in changed],
    }
