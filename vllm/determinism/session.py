"""One whole session: probe, the modes in turn, control, verdict, output. Knows no protocol and no argument's syntax."""

import asyncio
import contextlib
import signal
import sys
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

from . import modes
from .client import Lane, Server
from .errors import EXIT_INTERRUPTED, EXIT_USAGE, HarnessError, LevelNotOffered, RequestFailed
from .files import report, report_of_all, write_json, write_junit
from .output import Screen, Silent, print_control, print_details, print_power, print_results, print_summary
from .power import Power, estimate
from .probe import Offer, compared_level, probe, stream_level
from .repeat import repeat
from .restart import NotRestarted, Restarter
from .runner import Pause, Progress, run
from .settings import Settings, Target
from .tally import Tally
from .verdict import Verdict, cut_short, judge, judge_control, together, with_control, with_power
from .workload import Workload


@dataclass(frozen=True)
class Outputs:
    """Where results go; None is nowhere. `command` is what the user typed, for the line that repeats a part of it."""

    screen: Screen
    json_path: str | None = None
    junit_path: str | None = None
    report_path: str | None = None
    command: tuple[str, ...] = ()


def execute(settings: Settings, outputs: Outputs) -> int:
    """Run a session to its end, or to SIGINT or SIGTERM; returns the exit status."""
    try:
        return asyncio.run(watched(session(settings, outputs)))
    except HarnessError as error:
        print(f"test_determinism: {error}", file=sys.stderr)
        return error.exit_code
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("test_determinism: interrupted before any request of the load was sent", file=sys.stderr)
        return EXIT_INTERRUPTED


async def watched(work: Coroutine[Any, Any, int]) -> int:
    """Run to the end; a signal cancels, so that what was seen so far can still be told."""
    task = asyncio.ensure_future(work)
    with contextlib.suppress(NotImplementedError):  # on Windows, where Ctrl-C stays an exception
        for name in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(name, task.cancel)
    return await task


class Side:
    """One server in one mode, the one under test or its control, and what was seen of it."""

    def __init__(self, party: "Party", settings: Settings, level: str, endless: bool) -> None:
        self.party = party
        self.settings = settings
        self.tally = Tally(level, 0 if endless else settings.requests)
        self.ended: BaseException | None = None

    async def run(self, workload: Workload, progress: Progress, pause: Pause | None = None) -> None:
        """Run to the end, or to what ended it early, which is kept."""
        try:
            await run(self.party.server, self.party.offer, workload, self.tally, progress, pause)
        except (HarnessError, asyncio.CancelledError) as error:
            self.ended = error

    def report(self, mode: str, verdict: Verdict) -> dict[str, Any]:
        party = self.party
        return report(mode, self.settings, party.target, party.offer, self.tally, verdict, party.server.counters)


@dataclass(frozen=True)
class Party:
    """A server that was reached, and what it offers."""

    target: Target
    server: Server
    offer: Offer


@dataclass(frozen=True)
class Part:
    """What one mode found."""

    mode: str
    subject: Side
    verdict: Verdict
    power: Power | None
    content: dict[str, Any]
    words: dict[int, str]
    """The text of tokens where the first answer parts."""


async def session(settings: Settings, outputs: Outputs) -> int:
    """The exit status of a run that got as far as its load.

    Raises:
        HarnessError: it did not get so far.
    """
    names = modes.chosen(settings)
    parts: list[Part] = []
    screen = outputs.screen
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(Server(settings.target))
        offer = await probe(server.lane(), settings)
        level = compared_level(offer, settings.level)
        subject = Party(settings.target, server, offer)
        control = await open_control(stack, settings, offer, level) if settings.control is not None else None
        # what one of them refuses, it refuses before the first of them runs
        workloads = {name: modes.workload(name, settings, offer) for name in names}
        for name, workload in workloads.items():
            if len(names) > 1 and not screen.quiet:
                screen.line(f"{chr(10) if parts else ''}Mode {name}: {modes.MODES[name].summary}")
            part = await run_mode(name, workload, subject, control, level, outputs)
            ended = part.subject.ended
            if ended is not None and len(names) == 1 and not part.subject.tally.seen:
                write(outputs, part.content)
                raise ended
            parts.append(part)
            show(screen, part, alone=len(names) == 1)
            if ended is not None and not isinstance(ended, LevelNotOffered | NotRestarted):
                break
    if len(names) == 1:
        verdict, content = parts[0].verdict, parts[0].content
    else:
        verdict = together({part.mode: part.verdict for part in parts}, len(names))
        content = report_of_all(verdict, [part.content for part in parts])
        rows = [(part.mode, part.verdict, part.subject.tally) for part in parts]
        print_summary(screen, rows, verdict)
    written = write(outputs, content)
    return verdict.exit_code if written else verdict.exit_code or EXIT_USAGE


async def run_mode(
    name: str, workload: Workload, party: Party, control: Party | None, level: str, outputs: Outputs
) -> Part:
    """One mode against the server and, where there is one, its control, which gets the same load."""
    settings = workload.settings
    subject = Side(party, settings, level, workload.endless)
    pause = None
    if name == "restart":
        pause = Restarter(settings.restart_command or "", party.server, party.offer).restart
    try:
        if name == "stream":
            subject.tally.level = await stream_level(party.server.lane(), party.offer, level, settings.level)
        await subject.run(workload, outputs.screen, pause)
    except HarnessError as error:
        subject.ended = error
    verdict = judge(subject.tally) if subject.ended is None else cut_short(subject.tally, subject.ended)
    content = subject.report(name, verdict)
    power = None
    if control is not None and subject.ended is None:
        other = Side(control, settings, subject.tally.level, workload.endless)
        await other.run(workload, Silent("Control"))
        control_verdict = judge_control(other.tally, other.ended)
        verdict = with_control(verdict, control_verdict, subject.tally.level)
        content["control"] = other.report(name, control_verdict)
    elif subject.ended is None:
        power = estimate(subject.tally, [workload.alone(number) for number in range(len(workload.prompts))])
        verdict = with_power(verdict, power, settings.least_power)
        content["power"] = power.to_json()
    content |= {"verdict": verdict.kind, "reason": verdict.reason}
    if (first := subject.tally.first()) is not None:
        content["repeat"] = repeat(outputs.command, name, settings.only or first.prompt_id + 1)
    words = {} if verdict.partial else await token_words(party.server.lane(), party.offer, subject.tally)
    return Part(name, subject, verdict, power, content, words)


def show(screen: Screen, part: Part, alone: bool) -> None:
    """A mode's results; of several modes with --quiet, the one verdict on all comes at the end."""
    side = part.subject
    if screen.quiet and not alone:
        return
    print_results(screen, side.tally, part.verdict, part.words, part.content["repeat"] or "")
    if not screen.quiet:
        print_details(screen, side.tally, side.party.offer, side.party.server.counters)
        if part.content["control"] is not None:
            print_control(screen, part.content["control"])
        elif part.power is not None:
            print_power(screen, part.power)


async def open_control(stack: contextlib.AsyncExitStack, settings: Settings, offer: Offer, level: str) -> Party:
    """The control, reached and probed before the long run, not after it.

    Raises:
        LevelNotOffered: it offers less than what is to be compared.
        HarnessError: it cannot be reached.
    """
    assert settings.control is not None
    server = await stack.enter_async_context(Server(settings.control))
    try:
        found = await probe(server.lane(), settings, prefer=offer.model)
    except HarnessError as error:
        error.args = (f"--control-url: {error}",)
        raise
    if level not in found.levels:
        raise LevelNotOffered(f"--control-url: the control offers {', '.join(found.levels)}, but {level} are compared")
    return Party(settings.control, server, found)


async def token_words(lane: Lane, offer: Offer, tally: Tally) -> dict[int, str]:
    """The text of the tokens where the first answer parts, from a vLLM server; nothing where it cannot be had."""
    found = tally.first()
    words: dict[int, str] = {}
    for value in () if found is None else (found.token_a, found.token_b):
        if isinstance(value, int):
            with contextlib.suppress(RequestFailed, HarnessError):
                words[value] = await lane.detokenize(offer.model, value)
    return words


def write(outputs: Outputs, content: dict[str, Any]) -> bool:
    """Write the files that were asked for; a disk that is full is one line, and the results are still printed."""
    written = True
    for name, path, writer in (
        ("--json", outputs.json_path, write_json),
        ("--junit", outputs.junit_path, write_junit),
        ("--report", outputs.report_path, write_page),
    ):
        try:
            if path is not None:
                writer(path, content)
        except OSError as error:
            print(f"test_determinism: {name}={path!r} could not be written: {error.strerror}", file=sys.stderr)
            written = False
    return written


def write_page(path: str, content: dict[str, Any]) -> None:
    from .report import write_report  # it needs matplotlib and jinja2, which a run without --report does without

    write_report(path, content)
