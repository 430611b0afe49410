"""A relay in front of a real server that keeps what passes through, and changes an answer where a test says so."""

import contextlib
import http.client
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEPT_HEADERS = ("authorization", "content-type")


class Tap:
    """asked: the bodies of all completion requests, in order of arrival; answers: what each got, by its place there.

    change: what is sent in an answer's place, from the request's place and the answer.
    """

    def __init__(self, port: int, change: Callable[[int, bytes], bytes]) -> None:
        self.port = port
        self.change = change
        self.asked: list[dict[str, Any]] = []
        self.answers: dict[int, bytes] = {}
        self.lock = threading.Lock()
        tap = self

        class Relay(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def relay(self) -> None:
                sent = self.rfile.read(int(self.headers.get("content-length", 0)))
                status, kind, answer = tap.passed(self.command, self.path, dict(self.headers), sent)
                self.send_response(status)
                self.send_header("content-type", kind)
                self.send_header("content-length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            do_GET = do_POST = relay

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, *_: object) -> None:
                """Other traffic is cut off when the load ends."""

        self.http = Server(("127.0.0.1", 0), Relay)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"

    def passed(self, method: str, path: str, headers: dict[str, str], sent: bytes) -> tuple[int, str, bytes]:
        """Ask the server; the status, the kind of content and the content to answer with."""
        place = None
        if "/completions" in path:
            with self.lock:
                place = len(self.asked)
                self.asked.append(json.loads(sent))
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)) as connection:
            kept = {name: value for name, value in headers.items() if name.lower() in KEPT_HEADERS}
            connection.request(method, path, sent, kept)
            response = connection.getresponse()
            answer = response.read()
        if place is not None:
            self.answers[place] = answer = self.change(place, answer)
        return response.status, response.headers["content-type"], answer


@contextlib.contextmanager
def tapped(port: int, change: Callable[[int, bytes], bytes] = lambda place, answer: answer) -> Iterator[Tap]:
    """A tap in a thread of its own before the server at that port, until the block ends."""
    tap = Tap(port, change)
    thread = threading.Thread(target=tap.http.serve_forever, daemon=True)
    thread.start()
    try:
        yield tap
    finally:
        tap.http.shutdown()
        thread.join()
        tap.http.server_close()
