"""What the client's tests share: running it, servers with more ways to misbehave, and what these answer."""

import json
import os
import subprocess
import sys
from pathlib import Path

from fake_server import WORDS, FakeServer, answer_tokens

ROOT = Path(__file__).resolve().parents[2]
CLIENT = ROOT / "vllm" / "example_client.py"
OURS = ("VLLM_", "BATCH_", "HTTP_", "http_", "HTTPS_", "https_", "ALL_PROXY", "all_proxy")


def environment(**env):
    return {name: value for name, value in os.environ.items() if not name.startswith(OURS)} | env


def run_python(arguments, **env):
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=environment(**env), capture_output=True, encoding="utf-8", timeout=120)


class NamesItsModels(FakeServer):
    """Refuses a model that it does not have, in vLLM's words."""

    def complete(self, connection, asked, chat):
        if asked["model"] != self.behaviour.model:
            message = f"The model `{asked['model']}` does not exist."
            connection.reply(
                404, {"error": {"message": message, "type": "NotFoundError", "param": "model", "code": 404}}
            )
        else:
            super().complete(connection, asked, chat)


def streaming(pieces, ends=True):
    """A kind of server whose stream is these pieces, each an HTTP chunk of its own; without an end it breaks off."""

    class Streams(FakeServer):
        def stream(self, connection, asked, chat, fault):
            head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
            connection.transport.write(head.encode())
            for piece in pieces:
                connection.transport.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
            if ends:
                connection.transport.write(b"0\r\n\r\n")
            else:
                connection.transport.close()

    return Streams


def event(text, **more):
    """One event of a chat's stream, with the characters as they are."""
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None} | more
    return f"data: {json.dumps({'choices': [choice]}, ensure_ascii=False)}\n\n".encode()


def spoken(prompt, count=32):
    """What the fake server answers."""
    return "".join(WORDS[token] for token, _, _ in answer_tokens(prompt, count))


def only_line(done, status):
    """The one line of a failure."""
    assert done.returncode == status, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    return line
