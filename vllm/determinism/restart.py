"""Restarting the server in the middle of a run, and seeing that it really was another process afterwards."""

import asyncio
import re
import time

from .client import Lane, Server
from .errors import HarnessError, RequestFailed, Unreachable, UsageError
from .probe import PROBE_PROMPT, Offer
from .protocol import Request

READY_SECONDS = 1800.0
"""A large model is a while in loading."""
STARTED = re.compile(rb"^process_start_time_seconds (\S+)$", re.MULTILINE)


class NotRestarted(HarnessError):
    """The command ran, and the server was there all along."""

    exit_code = 3


class Restarter:
    """Runs the user's command and waits until the server answers again."""

    def __init__(self, command: str, server: Server, offer: Offer, ready_seconds: float = READY_SECONDS) -> None:
        self.command = command
        self.server = server
        self.offer = offer
        self.ready_seconds = ready_seconds

    async def restart(self) -> None:
        """
        Raises:
            UsageError: the command failed.
            Unreachable: the server did not come back.
            NotRestarted: it was never away, and does not say that its process is another.
        """
        lane = self.server.lane()
        before = await started(lane)
        watch = asyncio.ensure_future(self.gone())
        try:
            await self.run_command()
            await self.until_ready(lane)
        finally:
            away = watch.done()
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)
        now = await started(lane)
        if not away and (before is None or before == now):
            raise NotRestarted(
                f"--restart-command={self.command!r} ended, but the server was there all along and does not say that it"
                " is another process: nothing was shown of a restart"
            )

    async def run_command(self) -> None:
        process = await asyncio.create_subprocess_shell(
            self.command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        try:
            output, _ = await process.communicate()
        except asyncio.CancelledError:
            process.terminate()
            raise
        if process.returncode:
            lines = output.decode(errors="replace").split("\n")
            last = next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
            raise UsageError("--restart-command", self.command, f"it ended with status {process.returncode}: {last}")

    async def gone(self) -> None:
        """Ends when nothing answers at the address."""
        while await self.server.reachable():
            await asyncio.sleep(0.05)

    async def until_ready(self, lane: Lane) -> None:
        """Wait for a sound answer to a short question."""
        end = time.monotonic() + self.ready_seconds
        while True:
            try:
                await lane.ask(self.offer.dialect, self.offer.model, Request(PROBE_PROMPT, max_tokens=1))
                return
            except (RequestFailed, Unreachable) as error:
                if time.monotonic() > end:
                    raise Unreachable(
                        f"--restart-command: the server did not answer again within {self.ready_seconds:g} s: {error}"
                    ) from None
            await asyncio.sleep(0.5)


async def started(lane: Lane) -> str | None:
    """When the server's process began, where it says so among its metrics."""
    try:
        found = STARTED.search(await lane.send("GET", "/metrics", None))
    except (RequestFailed, HarnessError):
        return None
    return found.group(1).decode() if found else None
