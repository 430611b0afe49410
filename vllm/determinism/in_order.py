"""Many requests in flight, their answers in the order of the requests."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable

from .client import Lane, Server
from .errors import RequestFailed
from .identity import Watch
from .protocol import Answer, Dialect, Request

WINDOW = 4
"""Answers that may wait for one before them, so that they are written in order, for each that is in flight."""


async def answers(
    server: Server, dialect: Dialect, model: str, requests: Iterable[Request], concurrency: int
) -> AsyncIterator[tuple[Request, Answer | RequestFailed]]:
    """Each request with its answer, or with why it has none, in the order of the requests; so many are in flight.

    Raises:
        RunFailed: the answers come from more than one server.
        HarnessError: the server is gone, or refuses the key.
    """
    watch = Watch()
    lanes: asyncio.Queue[Lane] = asyncio.Queue()
    for _ in range(concurrency):
        lanes.put_nowait(watch.over(server.lane()))

    async def ask(request: Request) -> Answer | RequestFailed:
        lane = await lanes.get()
        try:
            answer = await lane.ask(dialect, model, request)
            watch.check(lane, answer)
            return answer
        except RequestFailed as error:
            return error
        finally:
            lanes.put_nowait(lane)

    waiting: deque[tuple[Request, asyncio.Task[Answer | RequestFailed]]] = deque()
    try:
        for request in requests:
            waiting.append((request, asyncio.ensure_future(ask(request))))
            if len(waiting) >= WINDOW * concurrency:
                first, task = waiting.popleft()
                yield first, await task
        while waiting:
            first, task = waiting.popleft()
            yield first, await task
    finally:
        for _, task in waiting:
            task.cancel()
        await asyncio.gather(*(task for _, task in waiting), return_exceptions=True)
