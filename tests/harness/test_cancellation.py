"""A request that is cancelled ends, also where its answer comes in the same moment: other traffic must not go on."""

import asyncio
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "vllm"))

from determinism.client import within


async def ended_by_cancel(wait, steps):
    """Whether a task that waits is ended by a cancellation `steps` turns of the loop after its answer came."""
    answer = asyncio.Event()

    async def ask():
        await answer.wait()

    task = asyncio.ensure_future(wait(ask()))
    for _ in range(3):
        await asyncio.sleep(0)
    answer.set()
    for _ in range(steps):
        await asyncio.sleep(0)
    if task.done():
        return True
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return task.cancelled()


def swallowed(wait):
    return [steps for steps in range(8) if not asyncio.run(ended_by_cancel(wait, steps))]


def test_a_cancellation_is_never_lost():
    assert swallowed(lambda asked: within(10, asked)) == []


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="asyncio.wait_for is mended there")
def test_wait_for_would_lose_it():
    assert swallowed(lambda asked: asyncio.wait_for(asked, 10)) != []


def test_what_takes_too_long_is_a_timeout():
    with pytest.raises(asyncio.TimeoutError):
        asyncio.run(within(0.01, asyncio.sleep(60)))
