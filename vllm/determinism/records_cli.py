"""--record and --verify: their options, and the recording of answers into a file."""

import argparse
import asyncio
import datetime
import sys
from collections.abc import Coroutine
from contextlib import aclosing
from pathlib import Path
from typing import Any

from . import verify
from .client import Server
from .errors import EXIT_INTERRUPTED, EXIT_PASS, HarnessError, Refused, RequestFailed, RunFailed, UsageError
from .files import check_writable
from .identity import Identity, changes, identify
from .in_order import answers
from .output import GREEN, Screen
from .probe import Offer, compared_level, probe
from .protocol import LEVELS, Request
from .recorder import Recorder, kept, partial_name
from .records import Entry, Header, Reader, RecordError, State
from .session import watched
from .settings import Settings
from .workload import Workload

COMMON = {"record", "verify", "url", "model", "api_key", "timeout", "retries", "concurrency", "level", "quiet"}
USED = {
    "record": COMMON | {"resume", "force", "endpoint", "prompt", "prompt_file", "max_tokens", "seed", "no_color"},
    "verify": COMMON | {"json", "no_color"},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("records (docs/records.md), instead of a test under load")
    group.add_argument(
        "--record", metavar="FILE", help="keep the answers to the prompts, with the server's fingerprint"
    )
    group.add_argument("--resume", action="store_true", help="go on with a recording that was cut short")
    group.add_argument("--force", action="store_true", help="replace a record, or one that was cut short")
    group.add_argument(
        "--verify",
        metavar="FILE",
        help="ask again what a record holds: 0 where all answers are equal, 1 where they differ, and where and why",
    )


def concerns(arguments: argparse.Namespace) -> bool:
    return bool(arguments.record or arguments.verify or arguments.resume or arguments.force)


def prepare(arguments: argparse.Namespace, defaults: argparse.Namespace) -> None:
    """Refuse what makes no sense together, before the rest is checked.

    Raises:
        UsageError: the first of it.
    """
    if not concerns(arguments):
        return
    for name in ("resume", "force"):
        if getattr(arguments, name) and not arguments.record:
            raise UsageError(f"--{name}", "on", "it goes with --record FILE")
    if arguments.record and arguments.verify:
        raise UsageError("--verify", arguments.verify, "one of --record and --verify at a time is needed")
    if arguments.resume and arguments.force:
        raise UsageError("--force", "on", "one of --resume and --force is needed")
    what = "record" if arguments.record else "verify"
    for name, value in vars(arguments).items():
        if name not in USED[what] and value != getattr(defaults, name):
            raise UsageError(f"--{name.replace('_', '-')}", value, f"it has no meaning with --{what}")
    if what == "record":
        if arguments.record == "-":
            raise UsageError("--record", "-", "a file is needed, as a record is written piece by piece")
        check_writable("--record", arguments.record)
        arguments.requests = 10_000_000  # each prompt is asked once, however many there are


def execute(arguments: argparse.Namespace, settings: Settings, screen: Screen) -> int:
    """Record or verify; returns the exit status."""
    if arguments.record:
        work = record(settings, Path(arguments.record), arguments.resume, arguments.force, screen)
    else:
        work = verify.verify(settings, Path(arguments.verify), arguments.json, screen)
    return ended(work)


def ended(work: Coroutine[Any, Any, int]) -> int:
    try:
        return asyncio.run(watched(work))
    except HarnessError as error:
        print(f"test_determinism: {error}", file=sys.stderr)
        return error.exit_code
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("test_determinism: interrupted before anything was asked", file=sys.stderr)
        return EXIT_INTERRUPTED


async def record(settings: Settings, path: Path, resume: bool, force: bool, screen: Screen) -> int:
    """Ask every prompt once and keep the answers.

    Raises:
        HarnessError: it did not get to the end; what was answered is kept, and the text says where.
    """
    check_free(path, resume, force)
    async with Server(settings.target) as server:
        lane = server.lane()
        offer = await probe(lane, settings)
        level = compared_level(offer, settings.level)
        workload = Workload(settings, offer)
        requests = [workload.alone(number) for number in range(len(workload.prompts))]
        header = header_of(await identify(lane, offer), offer, level, len(requests))
        state = resumed(path, header, requests) if resume else State()
        if path.exists() and resume:
            screen.line(f"{path} is finished: {header.answers} answers")
            return EXIT_PASS
        with Recorder(path, header, state) as recorder:
            if recorder.answers:
                screen.line(f"Going on after {recorder.answers} of {header.answers} answers")
            try:
                return await fill(recorder, server, requests, settings.concurrency, screen)
            except (HarnessError, asyncio.CancelledError) as error:
                return cut_short(recorder, error)


def check_free(path: Path, resume: bool, force: bool) -> None:
    """Nothing that was recorded is replaced unasked.

    Raises:
        RecordError: there is a record of that name, whole or not, and neither switch says what to do with it.
    """
    if resume or force:
        return
    if path.exists():
        raise RecordError(path, "is there already; --force replaces it, once the new record is whole")
    if partial_name(path).exists():
        raise RecordError(
            path, f"was begun already ({partial_name(path).name}); --resume goes on with it, --force begins anew"
        )


def header_of(identity: Identity, offer: Offer, level: str, answers: int) -> Header:
    return Header(
        model=offer.model,
        dialect=offer.dialect,
        level=level,
        answers=answers,
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        fingerprint=identity.fingerprint,
        fields=identity.fields,
        vllm=identity.vllm,
    )


def resumed(path: Path, header: Header, requests: list[Request]) -> State:
    """How far the recording of these very requests from this very server went.

    Raises:
        RecordError: what is there was asked otherwise, of another server, or is not sound.
    """
    if path.exists():
        with Reader(path) as reader:
            check_same(path, reader, header, requests)
        with Reader(path) as reader:
            return reader.check()
    found = kept(path)
    if found is None:
        return State()
    with Reader(partial_name(path)) as reader:
        check_same(path, reader, header, requests[: max(0, found[1].lines - 1)])
    return found[1]


def check_same(path: Path, reader: Reader, header: Header, requests: list[Request]) -> None:
    old = reader.header
    for name in ("model", "dialect", "level", "answers"):
        was, now = getattr(old, name), getattr(header, name)
        if was != now:
            raise RecordError(path, f"was begun with another {name} ({was}, now {now}); --force begins anew")
    moved = changes(identity_of(old), identity_of(header))
    if moved:
        what = ", ".join(f"{name} was {verify.short(was)} and is {verify.short(now)}" for name, was, now in moved)
        raise RecordError(path, f"was begun with another server: {what}; --force begins anew")
    for number, (asked, entry) in enumerate(zip(requests, reader.entries(), strict=False), start=1):
        if bare(entry.request) != bare(asked):
            raise RecordError(path, f"was begun with another prompt or setting at answer {number}; --force begins anew")


def bare(request: Request) -> tuple[Any, ...]:
    return (request.prompt, request.max_tokens, float(request.temperature), request.seed)


def identity_of(header: Header) -> Identity:
    return Identity(header.fingerprint, header.fields, header.vllm)


async def fill(recorder: Recorder, server: Server, requests: list[Request], concurrency: int, screen: Screen) -> int:
    header = recorder.header
    first = recorder.answers
    async with aclosing(answers(server, header.dialect, header.model, requests[first:], concurrency)) as found:
        async for request, answer in found:
            number = recorder.answers + 1
            if isinstance(answer, RequestFailed):
                asked_wrongly = answer.status is not None and answer.status < 500
                start = f"prompt {number} ({str(request.prompt)[:40]!r}...)"
                raise (Refused if asked_wrongly else RunFailed)(f"{start} got no sound answer: {answer}")
            if LEVELS.index(answer.level) < LEVELS.index(header.level):
                raise RunFailed(
                    f"the answer to prompt {number} is without {header.level}, which the server gave before"
                )
            recorder.add(Entry(request, answer))
            screen.unfinished(f"Recording: {recorder.answers}/{header.answers}")
    checksum = recorder.finish()
    screen.painted(GREEN, f"✓ RECORDED: {header.answers} answers in {recorder.path}")
    if not screen.quiet:
        screen.line(f"  sha256:       {checksum}")
        screen.line(f"  fingerprint:  {header.fingerprint or 'none; a later difference cannot be explained'}")
        if identity_of(header).says_plain:
            screen.line("  This server is plain vLLM: its answers may depend on what else it serves.")
    return EXIT_PASS


def cut_short(recorder: Recorder, error: BaseException) -> int:
    """Say what is kept of a recording that did not end; returns the exit status."""
    kept_so_far = f"{recorder.answers} of {recorder.header.answers} answers are kept in {partial_name(recorder.path)}"
    advice = "the same command with --resume goes on"
    if isinstance(error, HarnessError):
        what, exit_code = str(error), error.exit_code
        if isinstance(error, RecordError):
            print(f"test_determinism: {what}; {advice}", file=sys.stderr)
            return exit_code
    else:
        what, exit_code = "interrupted", EXIT_INTERRUPTED
    print(f"test_determinism: {what}; partial record: {kept_so_far}; {advice}", file=sys.stderr)
    return exit_code
