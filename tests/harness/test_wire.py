"""The harness's own connection reads and fails as httpx's does, and never takes one request's answer for another's."""

import asyncio
import gzip
import sys
from pathlib import Path

import httpx
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "vllm"))

from determinism.wire import Wire, direct

BODY = b'{"choices": []}'
LENGTH = b"content-length: %d\r\n" % len(BODY)
OK = b"HTTP/1.1 200 OK\r\n"
WHOLE = OK + LENGTH + b"\r\n" + BODY
CHUNKS = OK + b"transfer-encoding: chunked\r\n\r\n" + b"5\r\n" + BODY[:5] + b"\r\na;x=y\r\n" + BODY[5:] + b"\r\n"
PACKED = gzip.compress(BODY)
STATUS, NO_LENGTH = b"HTTP/1.1 503 Too Busy\r\nretry-after: 1\r\n" + LENGTH + b"\r\n" + BODY, OK + b"\r\n" + BODY
RESPONSES = {
    "whole": WHOLE,
    "a status with a reason": STATUS,
    "chunks": CHUNKS + b"0\r\n\r\n",
    "chunks with a trailer": CHUNKS + b"0\r\nx: y\r\n\r\n",
    "chunks that are cut": CHUNKS,
    "chunks of no size": OK + b"transfer-encoding: chunked\r\n\r\nz\r\n" + BODY,
    "no length": NO_LENGTH,
    "version 1.0": NO_LENGTH.replace(b"1.1", b"1.0"),
    "more to come": b"HTTP/1.1 100 Continue\r\n\r\n" + WHOLE,
    "a close announced": OK + b"connection: close\r\n" + LENGTH + b"\r\n" + BODY,
    "compressed": OK + b"content-encoding: gzip\r\ncontent-length: %d\r\n\r\n" % len(PACKED) + PACKED,
    "badly compressed": OK + b"content-encoding: gzip\r\n" + LENGTH + b"\r\n" + BODY,
    "nothing": b"",
    "half a head": OK[:9],
    "a head alone": OK + LENGTH + b"\r\n",
    "half a body": WHOLE[:-5],
    "more than the length": WHOLE + b"and more",
    "no HTTP": b"SSH-2.0-OpenSSH_9.6\r\n",
    "two lengths": OK + b"content-length: 3\r\n" + LENGTH + b"\r\n" + BODY,
    "a head without end": OK + b"x: " + b"y" * 200_000,
}


async def answered(transport: httpx.AsyncBaseTransport, *responses: bytes, closes: bool = True, rest_s: float = 0):
    """What a client with this transport makes of a server that sends these bytes, one of them for each request; and how
    many connections it took."""
    left, connections = list(responses), 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        while left and await reader.readline():
            await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(2)
            writer.write(left.pop(0))
            if closes:
                break
        else:
            await reader.read()
        writer.close()

    found = []
    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
        async with httpx.AsyncClient(transport=transport, trust_env=False, timeout=5) as client:
            for _ in responses:
                try:
                    got = await client.post(url, content=b"{}")
                    found.append((got.status_code, got.reason_phrase, got.content, sorted(got.headers.items())))
                except httpx.HTTPError as error:
                    found.append(type(error))
                await asyncio.sleep(rest_s)
    return found, connections


@pytest.mark.parametrize("name", RESPONSES)
def test_what_a_server_sends_is_read_as_httpx_reads_it(name):
    ours, theirs = (asyncio.run(answered(kind, RESPONSES[name])) for kind in (Wire(3), httpx.AsyncHTTPTransport()))
    assert ours == theirs


@pytest.mark.parametrize("closes", [False, True])
def test_a_connection_is_used_again_unless_the_server_closes_it(closes):
    found, connections = asyncio.run(answered(Wire(3), WHOLE, STATUS, CHUNKS + b"0\r\n\r\n", closes=closes))
    assert [status for status, *_ in found] == [200, 503, 200]
    assert connections == (3 if closes else 1)


def test_a_connection_that_rested_too_long_is_not_used_again():
    assert asyncio.run(answered(Wire(0), WHOLE, WHOLE, closes=False))[1] == 2


@pytest.mark.parametrize("rest_s", [0, 0.01])
def test_an_answer_that_was_not_asked_for_is_nobodys(rest_s):
    stray = WHOLE.replace(b"choices", b"strayed")
    found, connections = asyncio.run(answered(Wire(3), WHOLE + stray, STATUS, closes=False, rest_s=rest_s))
    assert [status for status, *_ in found] == [200, 503]
    assert connections == 2


def test_what_does_not_come_in_time_is_a_timeout_and_its_late_answer_nobodys():
    async def late() -> list:
        found, replies = [], [WHOLE.replace(b"choices", b"delayed"), WHOLE]

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            reply = replies.pop(0)
            if replies:
                await timed_out.wait()
            writer.write(reply)

        timed_out = asyncio.Event()
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
            async with httpx.AsyncClient(transport=Wire(3), trust_env=False) as client:
                for timeout_s in (0.05, 5):
                    try:
                        found.append((await client.get(url, timeout=timeout_s)).content)
                    except httpx.TimeoutException as error:
                        found.append(type(error))
                    timed_out.set()
        return found

    assert asyncio.run(late()) == [httpx.ReadTimeout, BODY]


def test_a_port_without_a_server_is_a_connect_error():
    async def ask() -> None:
        async with httpx.AsyncClient(transport=Wire(3), trust_env=False) as client:
            await client.get("http://localhost:9/")

    with pytest.raises(httpx.ConnectError):
        asyncio.run(ask())


@pytest.mark.parametrize(
    ("url", "proxy", "trust_env", "is_direct"),
    [
        ("http://gpu:8000", None, True, True),
        ("http://gpu:8000", "http://proxy:3128", True, False),
        ("http://127.0.0.1:8000", "http://proxy:3128", False, True),
        ("http://name:word@gpu:8000", None, True, False),
        ("https://gpu:8000", None, True, False),
    ],
)
def test_proxies_passwords_and_tls_stay_with_httpx(monkeypatch, url, proxy, trust_env, is_direct):
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    if proxy:
        monkeypatch.setenv("http_proxy", proxy)
    assert direct(httpx.URL(url), trust_env) is is_direct
