"""One whole session: probe, run, control, verdict, output. Knows no protocol and no argument's syntax."""

import asyncio
import contextlib
import signal
import sys
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

from .client import Lane, Server
from .errors import EXIT_INTERRUPTED, EXIT_USAGE, HarnessError, LevelNotOffered, RequestFailed
from .files import report, write_json, write_junit
from .output import Screen, Silent, print_control, print_details, print_results
from .probe import Offer, compared_level, probe
from .runner import Progress, run
from .settings import Settings, Target
from .tally import Tally
from .verdict import Verdict, cut_short, judge, judge_control, with_control
from .workload import Workload


@dataclass(frozen=True)
class Outputs:
    """Where results go; None is nowhere."""

    screen: Screen
    json_path: str | None = None
    junit_path: str | None = None


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
    """One server of a session, the one under test or its control, and what was seen of it."""

    def __init__(self, settings: Settings, target: Target, server: Server, offer: Offer, level: str) -> None:
        self.settings = settings
        self.target = target
        self.server = server
        self.offer = offer
        self.tally = Tally(level, settings.requests)
        self.ended: BaseException | None = None

    async def run(self, workload: Workload, progress: Progress) -> None:
        """Run to the end, or to what ended it early, which is kept."""
        try:
            await run(self.server, self.offer, workload, self.tally, progress)
        except (HarnessError, asyncio.CancelledError) as error:
            self.ended = error

    def report(self, verdict: Verdict) -> dict[str, Any]:
        return report(self.settings, self.target, self.offer, self.tally, verdict, self.server.counters)


async def session(settings: Settings, outputs: Outputs) -> int:
    """The exit status of a run that got as far as its load.

    Raises:
        HarnessError: it did not get so far.
    """
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(Server(settings.target))
        offer = await probe(server.lane(), settings)
        level = compared_level(offer, settings.level)
        subject = Side(settings, settings.target, server, offer, level)
        control = await open_control(stack, settings, offer, level) if settings.control is not None else None
        workload = Workload(settings, offer)
        await subject.run(workload, outputs.screen)
        verdict = judge(subject.tally) if subject.ended is None else cut_short(subject.tally, subject.ended)
        content = subject.report(verdict)
        if control is not None and subject.ended is None:
            await control.run(workload, Silent("Control"))
            control_verdict = judge_control(control.tally, control.ended)
            verdict = with_control(verdict, control_verdict, level)
            content |= {"verdict": verdict.kind, "reason": verdict.reason, "control": control.report(control_verdict)}
        words = {} if verdict.partial else await token_words(server.lane(), offer, subject.tally)
    written = write(outputs, content)
    if subject.ended is not None and not workload_begun(subject.tally):
        raise subject.ended
    print_results(outputs.screen, subject.tally, verdict, words)
    if not outputs.screen.quiet:
        print_details(outputs.screen, subject.tally, offer, server.counters)
        print_control(outputs.screen, content["control"])
    return verdict.exit_code if written else verdict.exit_code or EXIT_USAGE


def workload_begun(tally: Tally) -> bool:
    return bool(tally.answered or tally.failed)


async def open_control(stack: contextlib.AsyncExitStack, settings: Settings, offer: Offer, level: str) -> Side:
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
    return Side(settings, settings.control, server, found, level)


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
    ):
        try:
            if path is not None:
                writer(path, content)
        except OSError as error:
            print(f"test_determinism: {name}={path!r} could not be written: {error.strerror}", file=sys.stderr)
            written = False
    return written
