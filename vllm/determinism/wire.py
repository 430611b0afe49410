"""One HTTP/1.1 connection for httpx, straight on asyncio.

With a thousand requests in flight, httpx's own transport, made for pools, threads and other event loops, takes longer
for a request than a fast server does: the harness would be what is measured. Both leave the reading of HTTP to h11.
Proxies and TLS stay with httpx.
"""

import asyncio
import time
import urllib.request
from collections.abc import Coroutine
from typing import Any, TypeVar, cast

import h11
import httpx

LARGEST_HEAD = 100 * 1024
"""Bytes of a response's status line and headers, as httpx has it."""
OTHER_FAMILY_S = 0.25
"""A host's next address is tried after so long, so that one that leads nowhere does not take all of the timeout."""
NO_RESPONSE = "Server disconnected without sending a response."
Result = TypeVar("Result")


def direct(url: httpx.URL, trust_env: bool) -> bool:
    """Whether an address is reached over plain TCP, as far as the environment, where it counts, says."""
    return url.scheme == "http" and not url.userinfo and not (trust_env and urllib.request.getproxies())


async def within(seconds: float | None, awaited: Coroutine[Any, Any, Result]) -> Result:
    """Its result, or TimeoutError. Before Python 3.12, asyncio.wait_for loses a cancellation that comes just as the
    result does, and a stream of other traffic that nothing else ends then goes on for ever."""
    task = asyncio.ensure_future(awaited)
    try:
        await asyncio.wait({task}, timeout=seconds)
        if not task.done():
            raise asyncio.TimeoutError
        return task.result()
    finally:
        task.cancel()


class Wire(httpx.AsyncBaseTransport):
    """A connection that is opened when it is needed, and again when it was closed or has rested for too long.

    keepalive_s: how long it may rest. A request is sent once: to send it again is the caller's decision.
    """

    def __init__(self, keepalive_s: float) -> None:
        self.keepalive_s = keepalive_s
        self._connection: Connection | None = None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """The whole response.

        Raises:
            httpx.TransportError: no whole response came; its kind is as httpx's own transport has it.
            httpx.InvalidURL: no host can have that name.
        """
        timeouts = request.extensions.get("timeout", {})
        if self._connection is None or not self._connection.reusable(self.keepalive_s):
            await self.aclose()
            self._connection = await connect(request.url, timeouts.get("connect"))
        return await self._connection.exchange(request, timeouts.get("read"))

    async def aclose(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.transport.close()


async def connect(url: httpx.URL, timeout_s: float | None) -> "Connection":
    host = url.raw_host.decode("ascii")
    opening = asyncio.get_running_loop().create_connection(
        Connection, host, url.port or 80, happy_eyeballs_delay=OTHER_FAMILY_S
    )
    try:
        _, connection = await within(timeout_s, opening)
    except asyncio.TimeoutError:
        raise httpx.ConnectTimeout("") from None
    except OSError as error:
        raise httpx.ConnectError(str(error)) from None
    except UnicodeError as error:
        raise httpx.InvalidURL(f"{host!r} is no host's name ({error})") from None
    return connection


class Connection(asyncio.Protocol):
    """One request at a time, and the whole of its response."""

    transport: asyncio.Transport

    def __init__(self) -> None:
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=LARGEST_HEAD)
        self._usable = True
        self._rests_since = time.monotonic()
        self._whole: asyncio.Future[None] | None = None
        """Of the request in flight: done when the whole response is there, or why it is not."""
        self._head: h11.Response | None = None
        self._body: list[bytes | bytearray] = []

    def reusable(self, keepalive_s: float) -> bool:
        return self._usable and time.monotonic() - self._rests_since < keepalive_s

    async def exchange(self, request: httpx.Request, timeout_s: float | None) -> httpx.Response:
        loop = asyncio.get_running_loop()
        self._whole = loop.create_future()
        timer = None if timeout_s is None else loop.call_later(timeout_s, self._fail, httpx.ReadTimeout(""))
        try:
            self.transport.write(self._encoded(request))
            await self._whole
        finally:
            if timer is not None:
                timer.cancel()
            head, self._head = self._head, None
            body, self._body = self._body, []  # a thousand connections at rest must not keep their last answers
            self._whole = None
            self._rests_since = time.monotonic()
            if not self._next_cycle():
                self._close()
        assert head is not None
        return httpx.Response(
            head.status_code,
            headers=head.headers.raw_items(),
            stream=httpx.ByteStream(b"".join(body)),
            extensions={"reason_phrase": head.reason},
        )

    def _encoded(self, request: httpx.Request) -> bytes:
        """The bytes of a request, in one piece."""
        try:
            head = h11.Request(method=request.method, target=request.url.raw_path, headers=request.headers.raw)
            data = (h11.Data(request.content),) if request.content else ()
            parts = [self._http.send(event) for event in (head, *data, h11.EndOfMessage())]
        except h11.LocalProtocolError as error:
            raise httpx.LocalProtocolError(str(error)) from None
        return b"".join(part for part in parts if part)

    def _next_cycle(self) -> bool:
        """Make ready for the next request; False where this connection cannot be used for one."""
        http = self._http
        done = http.our_state is h11.DONE and http.their_state is h11.DONE
        if not self._usable or not done or http.trailing_data[0]:
            return False
        http.start_next_cycle()
        return True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._whole is None or self._whole.done():
            self._close()  # nobody asked for this: the next request must not take it for its answer
            return
        try:
            self._http.receive_data(data)
            self._take_events()
        except h11.RemoteProtocolError as error:
            self._fail(httpx.RemoteProtocolError(str(error)))

    def eof_received(self) -> None:
        self._usable = False
        if self._whole is None or self._whole.done():
            return
        if self._http.their_state is h11.SEND_RESPONSE:
            self._fail(httpx.RemoteProtocolError(NO_RESPONSE))
        else:  # the end of a response without a length, or one that is cut: h11 knows
            self.data_received(b"")

    def connection_lost(self, error: Exception | None) -> None:
        self._usable = False
        self._fail(httpx.RemoteProtocolError(NO_RESPONSE) if error is None else httpx.ReadError(str(error)))

    def _take_events(self) -> None:
        while True:
            event = self._http.next_event()
            if isinstance(event, h11.Response):
                self._head = event
            elif isinstance(event, h11.Data):
                self._body.append(event.data)
            elif isinstance(event, h11.EndOfMessage) and self._whole is not None:
                self._whole.set_result(None)
                return
            elif not isinstance(event, h11.InformationalResponse):  # no more for now
                return

    def _fail(self, error: httpx.TransportError) -> None:
        if self._whole is not None and not self._whole.done():
            self._whole.set_exception(error)

    def _close(self) -> None:
        self._usable = False
        self.transport.abort()
