"""A fake server that has a fingerprint, and how the command is run against it."""

import asyncio
import contextlib
import functools
import subprocess
import threading
from collections.abc import Iterator

from fake_server import Behaviour, Connection, FakeServer

FIELDS = {"batch_invariant": True, "torch": "2.13.0", "threads": 4, "weights": "ab" * 32, "quantization": None}
OTHER = "bi-ffffffffffffffff"
PROMPTS = [f"prompt number {number}" for number in range(20)]


class Fingerprinted(FakeServer):
    """A fake server that says what its bits depend on; `other_from` is the request from which on it is another."""

    def __init__(self, behaviour: Behaviour, fields: dict | None, digest: str | None) -> None:
        super().__init__(behaviour)
        self.fields, self.digest = fields, digest
        self.other_from: int | None = None

    def respond(self, connection: Connection, method: str, path: str, headers: dict[str, str], data: bytes) -> None:
        if path == "/batch_invariant/fingerprint" and self.fields is not None:
            connection.reply(200, {"fingerprint": self.digest, "fields": self.fields})
            return
        if self.other_from is not None and self.requests >= self.other_from:
            self.digest = OTHER
        extra = {} if self.digest is None else {"x-batch-invariant-fingerprint": self.digest}
        plain_head = functools.partial(Connection.head, connection)
        connection.head = lambda status, kind, length, more=None: plain_head(  # type: ignore[method-assign]
            status, kind, length, extra | (more or {})
        )
        super().respond(connection, method, path, headers, data)


@contextlib.contextmanager
def running(server: FakeServer) -> Iterator[FakeServer]:
    """The server in a thread of its own, until the block ends."""
    loop = asyncio.new_event_loop()
    loop.run_until_complete(server.start())
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(server.die)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of a refusal."""
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    return line
