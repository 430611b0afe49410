"""One server over HTTP: connections, retries, and what an error of it means.

A lane is one connection. A pool that many requests share costs a search over all of them at each request; a thousand
lanes cost nothing of the kind.
"""

import asyncio
import contextlib
import email.utils
import errno
import json
import os
import ssl
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from .errors import Refused, RequestFailed, Unreachable
from .protocol import Answer, Dialect, Request, body, error_message, load, parse
from .settings import Target
from .stream import parse_stream
from .wire import Wire, direct, within

COME_BACK_LATER = (429, 502, 503, 504)
KEEPALIVE_S = 3.0
"""How long a connection may rest; servers close theirs after five seconds and more."""
MOST_FILES = 65536
LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass
class Counters:
    """What had to be asked again."""

    retried_connections: int = 0
    retried_busy: int = 0


class Server:
    """A target, its counters, and what all lanes to it share. Use as an async context manager."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.counters = Counters()
        self.trust_env = (urlsplit(target.url).hostname or "") not in LOOPBACK
        self.tls: ssl.SSLContext | bool = httpx.create_ssl_context() if target.url.startswith("https:") else False
        self._lanes: list[Lane] = []
        allow_connections()

    def lane(self) -> "Lane":
        lane = Lane(self)
        self._lanes.append(lane)
        return lane

    async def __aenter__(self) -> "Server":
        return self

    async def __aexit__(self, *exception: object) -> None:
        lanes, self._lanes = self._lanes, []
        await asyncio.gather(*(lane.close() for lane in lanes), return_exceptions=True)

    async def reachable(self) -> bool:
        """Whether anything at all answers HTTP at the address."""
        lane = Lane(self)
        try:
            await lane.http.get("/health", timeout=min(10.0, self.target.timeout_s))
        except httpx.HTTPError:
            return False
        finally:
            await lane.close()
        return True


class Lane:
    """One connection, used by one request at a time."""

    def __init__(self, server: Server) -> None:
        self.server = server
        target = server.target
        headers = {"content-type": "application/json", "cache-control": "no-store", "accept": "*/*"}
        if target.api_key:
            headers["authorization"] = f"Bearer {target.api_key}"
        self.http = httpx.AsyncClient(
            base_url=target.url,
            headers=headers,
            verify=server.tls,
            trust_env=server.trust_env,
            transport=Wire(KEEPALIVE_S) if direct(httpx.URL(target.url), server.trust_env) else None,
            timeout=httpx.Timeout(target.timeout_s, connect=min(10.0, target.timeout_s), pool=None),
            limits=httpx.Limits(max_connections=1, max_keepalive_connections=1, keepalive_expiry=KEEPALIVE_S),
        )

    async def close(self) -> None:
        await self.http.aclose()

    async def ask(self, dialect: Dialect, model: str, request: Request) -> Answer:
        """The answer to one request, retried where a connection dropped or the server was busy.

        Raises:
            RequestFailed: no answer that can be compared; see its kind.
            Refused: the key is wrong.
            Unreachable: the server is gone for good.
        """
        content = json.dumps(body(dialect, model, request), separators=(",", ":")).encode()
        started = time.perf_counter()
        response = await self.post(dialect.path, content)
        seconds = time.perf_counter() - started
        answer = (parse_stream if request.stream else parse)(dialect, response)
        answer.seconds = seconds
        return answer

    async def detokenize(self, model: str, token: int) -> str:
        """The text of a token, from vLLM's endpoint for it."""
        content = json.dumps({"model": model, "tokens": [token]}).encode()
        return str(load(await self.post("/detokenize", content)).get("prompt", ""))

    async def post(self, path: str, content: bytes) -> bytes:
        """The body of the 200 response to a POST; every other end is an exception, see `ask`."""
        return await self.send("POST", path, content)

    async def get(self, path: str) -> dict[str, Any]:
        """The JSON object at a path."""
        return load(await self.send("GET", path, None))

    async def send(self, method: str, path: str, content: bytes | None) -> bytes:
        target, counters = self.server.target, self.server.counters
        attempt = 0
        while True:
            wait = min(target.backoff_s * 2**attempt, 10.0)
            try:
                response = await within(target.timeout_s, self.http.request(method, path, content=content))
            except (asyncio.TimeoutError, httpx.TimeoutException) as error:
                if not isinstance(error, httpx.ConnectTimeout):
                    raise RequestFailed("timeout", f"no whole answer within {target.timeout_s:g} s") from None
                failure: str | None = "the connection timed out"
            except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
                raise Unreachable(f"{target.url} cannot be asked: {error}") from None
            except httpx.DecodingError as error:
                raise RequestFailed("malformed", f"the body cannot be decoded: {error}") from None
            except httpx.TransportError as error:
                failure = str(error) or type(error).__name__
                if os.strerror(errno.EMFILE) in failure:
                    raise Unreachable(
                        f"{failure}: no more connections can be opened; raise `ulimit -n`, or ask for fewer at a time"
                    ) from None
            else:
                if response.status_code == 200:
                    return response.content
                if response.status_code not in COME_BACK_LATER or attempt >= target.retries:
                    raise refusal(response)
                counters.retried_busy += 1
                wait = min(retry_after(response) or wait, target.longest_wait_s)
                failure = None
            if failure is not None:
                if attempt >= target.retries:
                    raise await self.lost(failure)
                counters.retried_connections += 1
            attempt += 1
            await asyncio.sleep(wait)

    async def lost(self, failure: str) -> Exception:
        """What it means that every try at a request lost its connection."""
        url = self.server.target.url
        if await self.server.reachable():
            return RequestFailed(
                "dropped", f"the connection dropped {self.server.target.retries + 1} times ({failure})"
            )
        return Unreachable(f"nothing answers at {url} ({failure})")


def allow_connections() -> None:
    """Let this process open more files: a login's usual 1024 are too few for a thousand connections."""
    try:
        import resource
    except ImportError:  # on Windows, which has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    wanted = MOST_FILES if hard == unlimited else min(MOST_FILES, hard)
    if soft != unlimited and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def refusal(response: httpx.Response) -> Exception:
    """The exception that a response other than 200 stands for."""
    status = response.status_code
    try:
        message = error_message(json.loads(response.content))
    except (ValueError, RecursionError):
        message = None
    message = (message or response.reason_phrase or "no reason given")[:500]
    if status in (401, 403):
        return Refused(
            f"the server refused the API key (HTTP {status}, {message}): set VLLM_API_KEY to the server's key"
        )
    if status in COME_BACK_LATER:
        return RequestFailed("busy", f"the server stayed busy (HTTP {status}, {message})", status)
    return RequestFailed("http", f"HTTP {status}: {message}", status)


def retry_after(response: httpx.Response) -> float | None:
    """Seconds to wait, from a Retry-After header in either of its forms; None without a sound one."""
    value = response.headers.get("retry-after", "")
    try:
        return max(0.0, float(int(value)))
    except (ValueError, OverflowError):
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None
