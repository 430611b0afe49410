"""The run itself: each prompt alone on an idle server, then the load with other traffic beside."""

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from typing import Protocol

from .client import Server
from .errors import HarnessError, Refused, RequestFailed, RunFailed
from .probe import Offer
from .protocol import Dialect, Request
from .settings import Settings
from .tally import Tally
from .workload import Shot, Workload


class Progress(Protocol):
    """Where a run tells how far it is."""

    def alone(self, done: int, total: int) -> None: ...

    def begin(self, settings: Settings, endless: bool) -> None: ...

    def answered(self, batch: int, done: int, size: int, failed: int) -> None: ...


Pause = Callable[[], Awaitable[None]]


async def run(
    server: Server, offer: Offer, workload: Workload, tally: Tally, progress: Progress, pause: Pause | None = None
) -> None:
    """Fill the tally. It holds what was seen so far whenever this ends, by an error or a cancellation, too.

    pause: what happens in the middle of the load, while nothing is asked.

    Raises:
        Refused: the server takes a prompt of the run in no way.
        RunFailed: a prompt got no sound answer alone.
        Unreachable: the server is gone.
    """
    settings = workload.settings
    await run_alone(server, offer, workload, tally, progress)
    progress.begin(settings, workload.endless)
    batches = Batches(workload, progress)
    shots = enumerate(workload.shots(), start=1)
    try:
        if workload.endless:
            end = time.monotonic() + 60 * (settings.minutes or 0)
            shots = itertools.takewhile(lambda _: time.monotonic() < end, shots)
        elif pause is not None:
            await run_loaded(server, offer, workload, itertools.islice(shots, settings.requests // 2), tally, batches)
            await pause()
        await run_loaded(server, offer, workload, shots, tally, batches)
    finally:
        if workload.endless:
            tally.planned = tally.seen
            batches.end()


async def run_alone(server: Server, offer: Offer, workload: Workload, tally: Tally, progress: Progress) -> None:
    lane = server.lane()
    total = len(workload.prompts)
    started = time.perf_counter()
    for prompt_id in range(total):
        progress.alone(prompt_id, total)
        request = workload.alone(prompt_id)
        try:
            tally.add_alone(await lane.ask(offer.dialect, offer.model, request))
        except RequestFailed as error:
            asked_wrongly = error.status is not None and error.status < 500
            raise (Refused if asked_wrongly else RunFailed)(unanswered(prompt_id, request, error)) from None
        finally:
            tally.solo_seconds = time.perf_counter() - started
    progress.alone(total, total)


def unanswered(prompt_id: int, request: Request, error: RequestFailed) -> str:
    start = str(request.prompt)[:40]
    return f"prompt {prompt_id + 1} ({start!r}..., max_tokens={request.max_tokens}) got no answer alone: {error}"


class Batches:
    """Counts the answers of consecutive batches of requests, and reports each batch in its turn."""

    def __init__(self, workload: Workload, progress: Progress) -> None:
        settings = workload.settings
        self.size = settings.requests if workload.endless else settings.concurrency
        self.total = None if workload.endless else settings.requests
        self.done: Counter[int] = Counter()
        self.failed: Counter[int] = Counter()
        self.next = 0
        self.progress = progress

    def add(self, request: int, failed: bool) -> None:
        batch = (request - 1) // self.size
        self.done[batch] += 1
        self.failed[batch] += failed
        while self.done[self.next]:
            size = self.size if self.total is None else min(self.size, self.total - self.next * self.size)
            self.progress.answered(self.next + 1, self.done[self.next], size, self.failed[self.next])
            if self.done[self.next] < size:
                return
            self.next += 1

    def end(self) -> None:
        """No more will come: report the batch that was begun."""
        if done := self.done[self.next]:
            self.progress.answered(self.next + 1, done, done, self.failed[self.next])


async def run_loaded(
    server: Server, offer: Offer, workload: Workload, shots: Iterator[tuple[int, Shot]], tally: Tally, batches: Batches
) -> None:
    """Keep `concurrency` of these in flight until all are answered, with the background streams beside them."""
    settings = workload.settings
    background = [
        asyncio.ensure_future(send_background(server, offer, workload.background(stream), tally))
        for stream in range(settings.background_streams)
    ]
    workers = [
        asyncio.ensure_future(send_copies(server, offer, shots, tally, batches))
        for _ in range(min(settings.concurrency, settings.requests))
    ]
    started = time.perf_counter()
    try:
        await asyncio.gather(*workers)
    finally:
        tally.loaded_seconds += time.perf_counter() - started
        for task in (*workers, *background):
            task.cancel()
        await asyncio.gather(*workers, *background, return_exceptions=True)


async def send_copies(
    server: Server, offer: Offer, shots: Iterator[tuple[int, Shot]], tally: Tally, batches: Batches
) -> None:
    lane = server.lane()
    plain = Dialect(offer.dialect.endpoint, None, False)
    for number, shot in shots:
        try:
            if shot.prompt_id is None:
                tally.add_other(await lane.ask(plain, offer.model, shot.request))
            else:
                tally.add(number, shot.prompt_id, await lane.ask(offer.dialect, offer.model, shot.request))
        except RequestFailed as error:
            tally.add_failure(number, error)
            batches.add(number, failed=True)
        else:
            batches.add(number, failed=False)


async def send_background(server: Server, offer: Offer, requests: Iterator[Request], tally: Tally) -> None:
    """Other traffic: its answers are thrown away, its errors are counted."""
    lane = server.lane()
    plain = Dialect(offer.dialect.endpoint, None, False)
    for request in requests:
        try:
            answer = await lane.ask(plain, offer.model, request)
        except RequestFailed:
            tally.background_failed += 1
            await asyncio.sleep(server.target.backoff_s)
        except HarnessError:
            tally.background_failed += 1
            return
        else:
            tally.background_requests += 1
            tally.other_seconds += answer.seconds
