"""A fast OpenAI-compatible server that answers deterministically, unless it is told to misbehave.

It exists to inject faults that a real server shows once in a month; what a real server answers is tested on a real one.
Also a command: `python fake_server.py --port 8000`, where `--behaviour '{"logprobs": false}'` changes what it does.
"""

import argparse
import asyncio
import contextlib
import functools
import hashlib
import json
import random
import signal
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WORDS = [f" w{index}" for index in range(1000)]


@dataclass
class Behaviour:
    """What the server offers, and how it misbehaves.

    faults: by the number of a completion request, counted from 0 in order of arrival (the harness's probe is 0, its
    prompts alone come next). rates: by fault, the share of completion requests, drawn from `seed`.
    Faults: drop, stall, truncate, not_json, error_500, busy (503, Retry-After), limited (429, Retry-After), nan, null,
    no_choice, two_choices, swap (another prompt's answer), logprob (one ulp), alternative (one ulp), token, text,
    no_logprobs, no_alternatives, die (the server is gone), restart (it is gone, and there again a moment later),
    stream_error, stream_cut. A POST to /restart restarts it, too.
    """

    model: str = "fake"
    models: tuple[str, ...] = ()
    api_key: str | None = None
    context: int = 100_000
    logprobs: bool = True
    max_logprobs: int = 20
    token_ids: bool = True
    rejects_vllm_fields: bool = False
    completions: bool = True
    chat: bool = True
    model_list: bool = True
    same_id: bool = False
    empty: bool = False
    reorders: bool = False
    """Of two requests that wait, each gets the other's answer."""
    fingerprints: tuple[str, ...] = ()
    """system_fingerprint of the answers, in turn."""
    stream_logprobs: bool = True
    """Whether streams have logprobs and token ids where they are asked for."""
    ignores_seed: bool = False
    """Each answer at a temperature above 0 is another, whatever the seed."""
    other_after_restart: bool = False
    says_start: bool = False
    """Whether /metrics says when the process began, which every restart changes."""
    background_fault: str | None = None
    """The fault of every request that asks for no logprobs, as other traffic does."""
    message: str = "engine died"
    retry_after: str = "0"
    faults: dict[int, str] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)
    faults_from: int = 0
    """`rates` begin with this request."""
    seed: int = 0


@functools.lru_cache(maxsize=4096)
def answer_tokens(prompt: str, count: int) -> tuple[tuple[int, float, tuple[float, ...]], ...]:
    """By token: id, logprob and five largest logprobs, all float32 values that the prompt alone decides."""
    generator = random.Random(hashlib.blake2b(prompt.encode()).digest())
    found = []
    for _ in range(count):
        values = sorted((single(-8 * generator.random()) for _ in range(5)), reverse=True)
        found.append((generator.randrange(1000), values[0], tuple(values)))
    return tuple(found)


def single(value: float) -> float:
    return struct.unpack("<f", struct.pack("<f", value))[0]


def next_single(value: float) -> float:
    return struct.unpack("<f", struct.pack("<I", struct.unpack("<I", struct.pack("<f", value))[0] + 1))[0]


def altered(tokens: tuple, fault: str | None) -> tuple:
    """The same answer with one thing other than it should be, in its last token."""
    token, logprob, values = tokens[-1]
    if fault == "logprob":
        last = (token, next_single(logprob), values)
    elif fault == "alternative":
        last = (token, logprob, (*values[:-1], next_single(values[-1])))
    elif fault == "token":
        last = ((token + 1) % 1000, logprob, values)
    elif fault in ("nan", "null"):
        last = (token, float("nan") if fault == "nan" else None, values)
    else:
        return tokens
    return (*tokens[:-1], last)


class FakeServer:
    """The server's state; `run` in a thread of its own."""

    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour = behaviour
        self.random = random.Random(behaviour.seed)
        self.requests = 0
        self.faults_given = 0
        self.faults_by_name: Counter[str] = Counter()
        self.prompts: Counter[str] = Counter()
        self.answers = 0
        self.bodies: list[dict[str, Any]] = []
        self.connections: set[Connection] = set()
        self.most_connections = 0
        self.restarts = 0
        self.held: tuple[Connection, bytes] | None = None
        self.server: asyncio.Server | None = None
        self.port = 0
        self.keep_bodies = True
        self.seen = threading.Condition()

    async def start(self, port: int = 0) -> None:
        loop = asyncio.get_running_loop()
        self.server = await loop.create_server(lambda: Connection(self), "127.0.0.1", port, backlog=4096)
        self.port = self.server.sockets[0].getsockname()[1]

    def restart(self) -> None:
        """Die, and be there again on the same port."""
        self.restarts += 1
        self.die()
        loop = asyncio.get_running_loop()
        loop.call_later(0.3, lambda: loop.create_task(self.start(self.port)))

    def die(self) -> None:
        """Close the port and every connection."""
        if self.server is not None:
            self.server.close()
        for connection in list(self.connections):
            connection.transport.abort()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait_for_requests(self, count: int) -> None:
        """Block the calling thread until that many completion requests have arrived."""
        with self.seen:
            assert self.seen.wait_for(lambda: self.requests >= count, timeout=30)

    def fault(self, number: int) -> str | None:
        if number in self.behaviour.faults:
            return self.behaviour.faults[number]
        draw = self.random.random()
        if number >= self.behaviour.faults_from:
            for name, rate in self.behaviour.rates.items():
                if draw < rate:
                    return name
                draw -= rate
        return None

    def respond(self, connection: "Connection", method: str, path: str, headers: dict[str, str], data: bytes) -> None:
        behaviour = self.behaviour
        if behaviour.api_key and headers.get("authorization") != f"Bearer {behaviour.api_key}":
            connection.reply(401, {"error": "Unauthorized"})
        elif path == "/health":
            connection.reply(200, {})
        elif path == "/version":
            connection.reply(200, {"version": "0.0.fake"})
        elif path == "/restart" and method == "POST":
            connection.reply(200, {})
            self.restart()
        elif path == "/metrics" and behaviour.says_start:
            connection.raw(200, f"process_start_time_seconds {self.restarts}.5e+09\n".encode(), "text/plain")
        elif path == "/v1/models" and behaviour.model_list:
            names = behaviour.models or (behaviour.model,)
            cards = [{"id": name, "object": "model", "max_model_len": behaviour.context} for name in names]
            connection.reply(200, {"object": "list", "data": cards})
        elif path == "/detokenize":
            connection.reply(200, {"prompt": "".join(WORDS[token] for token in json.loads(data)["tokens"])})
        elif path == "/v1/completions" and behaviour.completions:
            self.complete(connection, json.loads(data), chat=False)
        elif path == "/v1/chat/completions" and behaviour.chat:
            self.complete(connection, json.loads(data), chat=True)
        else:
            connection.reply(404, {"detail": "Not Found"})

    def complete(self, connection: "Connection", asked: dict[str, Any], chat: bool) -> None:
        number = self.requests
        with self.seen:
            self.requests += 1
            self.seen.notify_all()
        if self.keep_bodies:
            self.bodies.append(asked)
        fault = self.fault(number)
        if self.behaviour.background_fault and "logprobs" not in asked:
            fault = self.behaviour.background_fault
        self.faults_given += fault is not None
        self.faults_by_name.update(() if fault is None else (fault,))
        self.prompts[self.prompt(asked, chat)] += 1
        refusal = self.refusal(asked, chat)
        if fault == "die":
            self.die()
        elif fault == "restart":
            self.restart()
        elif fault == "drop":
            connection.transport.abort()
        elif fault == "stall":
            pass
        elif fault in ("busy", "limited"):
            status = 503 if fault == "busy" else 429
            error = {"error": {"message": "too many requests", "type": "overloaded", "code": status}}
            connection.reply(status, error, {"retry-after": self.behaviour.retry_after})
        elif fault == "error_500":
            error = {"message": self.behaviour.message, "type": "InternalServerError", "code": 500}
            connection.reply(500, {"error": error})
        elif refusal is not None:
            error = {"message": refusal, "type": "BadRequestError", "param": None, "code": 400}
            connection.reply(400, {"error": error})
        elif fault == "not_json":
            connection.raw(200, b"<html>gateway</html>", "text/html")
        elif asked.get("stream"):
            self.stream(connection, asked, chat, fault)
        else:
            data = json.dumps(self.answer(asked, chat, fault)).encode()
            data = data[: len(data) // 2] if fault == "truncate" else data
            self.answers += 1
            if self.behaviour.reorders and number > 10:
                self.reorder(connection, data)
            else:
                connection.raw(200, data)

    def reorder(self, connection: "Connection", data: bytes) -> None:
        if self.held is None:
            self.held = connection, data
        else:
            (other, its), self.held = self.held, None
            connection.raw(200, its)
            other.raw(200, data)

    def refusal(self, asked: dict[str, Any], chat: bool) -> str | None:
        behaviour = self.behaviour
        if behaviour.rejects_vllm_fields and {"return_token_ids", "return_tokens_as_token_ids"} & asked.keys():
            return "Unrecognized request argument supplied: return_token_ids"
        wanted = asked.get("top_logprobs" if chat else "logprobs") or 0
        if type(wanted) is int and wanted > behaviour.max_logprobs:
            return f"Requested sample logprobs of {wanted}, which is greater than max allowed: {behaviour.max_logprobs}"
        length = len(self.prompt(asked, chat).split())
        if length > behaviour.context:
            return (
                f"This model's maximum context length is {behaviour.context} tokens. However, your prompt contains "
                f"{length} input tokens, which exceeds this limit even without any output tokens. "
                "Please reduce the length of the input prompt."
            )
        return None

    @staticmethod
    def prompt(asked: dict[str, Any], chat: bool) -> str:
        if chat:
            return str(asked["messages"][-1]["content"])
        prompt = asked["prompt"]
        return prompt if isinstance(prompt, str) else " ".join(map(str, prompt))

    def answer(self, asked: dict[str, Any], chat: bool, fault: str | None) -> dict[str, Any]:
        behaviour = self.behaviour
        prompt = self.prompt(asked, chat)
        own = prompt + " swapped" if fault == "swap" else prompt
        drawn = own
        if asked.get("temperature"):
            drawn += f" drawn with {self.answers if behaviour.ignores_seed else asked.get('seed')}"
        if behaviour.other_after_restart and self.restarts:
            drawn += " by another process"
        count = asked.get("max_tokens") or 16
        tokens = altered(answer_tokens(drawn, count), fault) if not behaviour.empty else ()
        choice = {"index": 0, "finish_reason": "length", "stop_reason": None}
        text = "".join(WORDS[token] for token, _, _ in tokens) + ("!" if fault == "text" else "")
        choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        wants = asked.get("logprobs") is not None and asked.get("logprobs") is not False
        choice["logprobs"] = None
        if wants and behaviour.logprobs and fault != "no_logprobs":
            as_ids = behaviour.token_ids and bool(asked.get("return_tokens_as_token_ids"))
            choice["logprobs"] = (chat_logprobs if chat else completion_logprobs)(tokens, as_ids)
            if fault == "no_alternatives":
                choice["logprobs"].pop("top_logprobs", None)
        ids = {}
        if behaviour.token_ids and asked.get("return_token_ids"):
            choice["token_ids"] = [token for token, _, _ in tokens]
            ids = {"prompt_token_ids": [len(word) for word in own.split()]}
            if not chat:
                choice |= ids
        choices = {"no_choice": [], "two_choices": [choice, choice]}.get(fault or "", [choice])
        prompt_tokens = len(own.split())
        content = {
            "id": "cmpl-same" if behaviour.same_id else f"cmpl-{self.answers}",
            "object": "chat.completion" if chat else "text_completion",
            "model": asked.get("model", self.behaviour.model),
            "choices": choices,
            "usage": {
                "prompt_tokens": prompt_tokens,
                "completion_tokens": count,
                "total_tokens": prompt_tokens + count,
            },
        }
        if behaviour.fingerprints:
            content["system_fingerprint"] = behaviour.fingerprints[self.answers % len(behaviour.fingerprints)]
        return content | (ids if chat else {})

    def stream(self, connection: "Connection", asked: dict[str, Any], chat: bool, fault: str | None) -> None:
        """The whole stream at once; the reader must cope with events that share a packet."""
        whole = self.answer(asked, chat, fault)
        choice = whole["choices"][0]
        text = choice["message"]["content"] if chat else choice["text"]
        pieces = [{"text": text[start : start + 4]} for start in range(0, len(text), 4)]
        if self.behaviour.stream_logprobs and (choice["logprobs"] or "token_ids" in choice):
            pieces = token_pieces(choice, text)
        shared = {name: whole[name] for name in ("id", "system_fingerprint") if name in whole}
        events = []
        for index, piece in enumerate(pieces):
            if chat:
                piece = {"delta": {"content": piece.pop("text")}} | piece
            piece |= {"index": 0, "finish_reason": "length" if index == len(pieces) - 1 else None}
            own = {"prompt_token_ids": whole.get("prompt_token_ids")} if chat and index == 0 else {}
            events.append(json.dumps(shared | own | {"choices": [piece]}, ensure_ascii=False))
        events.append(json.dumps(shared | {"choices": [], "usage": whole["usage"]}))
        if fault == "stream_error":
            events = [*events[:1], json.dumps({"error": {"message": "engine died", "type": "x", "code": 500}})]
        data = "".join(f"data: {event}\n\n" for event in (*events, "[DONE]")).encode()
        if fault == "truncate":
            data = data[: len(data) // 2]
        if fault == "stream_cut":
            connection.head(200, "text/event-stream", len(data))
            connection.transport.write(data[: len(data) // 2])
            connection.transport.close()
        else:
            connection.raw(200, data, "text/event-stream")
            self.answers += 1


def token_pieces(choice: dict[str, Any], text: str) -> list[dict[str, Any]]:
    """A choice cut into its tokens, as vLLM streams it."""
    ids, logprobs = choice.get("token_ids"), choice["logprobs"]
    words = [" " + word for word in text.split(" ")[1:]]
    pieces = []
    for index, word in enumerate(words):
        piece: dict[str, Any] = {"text": word}
        if ids is not None:
            piece["token_ids"] = [ids[index]]
        if index == 0 and "prompt_token_ids" in choice:
            piece["prompt_token_ids"] = choice["prompt_token_ids"]
        if logprobs is not None:
            piece["logprobs"] = {name: values[index : index + 1] for name, values in logprobs.items()}
        pieces.append(piece)
    return pieces


def completion_logprobs(tokens: tuple, as_ids: bool) -> dict[str, Any]:
    names = [f"token_id:{token}" if as_ids else WORDS[token] for token, _, _ in tokens]
    return {
        "tokens": names,
        "token_logprobs": [logprob for _, logprob, _ in tokens],
        "top_logprobs": [{f"token_id:{place}": value for place, value in enumerate(values)} for _, _, values in tokens],
        "text_offset": [0] * len(tokens),
    }


def chat_logprobs(tokens: tuple, as_ids: bool) -> dict[str, Any]:
    content = []
    for token, logprob, values in tokens:
        top = [{"token": f"token_id:{place}", "logprob": value} for place, value in enumerate(values)]
        name = f"token_id:{token}" if as_ids else WORDS[token]
        content.append({"token": name, "logprob": logprob, "top_logprobs": top})
    return {"content": content}


class Connection(asyncio.Protocol):
    """HTTP/1.1 with keep-alive, as little of it as an honest client needs."""

    transport: asyncio.Transport

    def __init__(self, server: FakeServer) -> None:
        self.server = server
        self.buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.server.connections.add(self)
        self.server.most_connections = max(self.server.most_connections, len(self.server.connections))

    def connection_lost(self, error: Exception | None) -> None:
        self.server.connections.discard(self)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            lines = self.buffer[:end].decode("latin-1").split("\r\n")
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
            length = int(headers.get("content-length", 0))
            if len(self.buffer) < end + 4 + length:
                return
            content = self.buffer[end + 4 : end + 4 + length]
            self.buffer = self.buffer[end + 4 + length :]
            method, path, _ = lines[0].split(" ")
            self.server.respond(self, method, path, headers, content)

    def head(self, status: int, kind: str, length: int, extra: dict[str, str] | None = None) -> None:
        lines = [f"HTTP/1.1 {status} Status", f"content-type: {kind}", f"content-length: {length}"]
        lines += [f"{name}: {value}" for name, value in (extra or {}).items()]
        self.transport.write(("\r\n".join(lines) + "\r\n\r\n").encode())

    def raw(
        self, status: int, data: bytes, kind: str = "application/json", extra: dict[str, str] | None = None
    ) -> None:
        self.head(status, kind, len(data), extra)
        self.transport.write(data)

    def reply(self, status: int, content: dict[str, Any], extra: dict[str, str] | None = None) -> None:
        self.raw(status, json.dumps(content).encode(), extra=extra)


@contextlib.contextmanager
def serving(behaviour: Behaviour, kind: type[FakeServer] = FakeServer) -> Iterator[FakeServer]:
    """The server in a thread of its own, until the block ends; `kind` is a server with more ways to misbehave."""
    server = kind(behaviour)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--behaviour", type=json.loads, default={}, metavar="JSON", help="fields of Behaviour")
    parser.add_argument("--counts", type=Path, help="a file for what it was asked, as JSON, written when it ends")
    arguments = parser.parse_args()
    server = FakeServer(Behaviour(**arguments.behaviour))
    server.keep_bodies = False

    async def until_ended() -> None:
        await server.start(arguments.port)
        ended = asyncio.Event()
        for name in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(name, ended.set)
        await ended.wait()

    asyncio.run(until_ended())
    if arguments.counts is not None:
        names = ("requests", "answers", "most_connections", "prompts", "faults_by_name")
        arguments.counts.write_text(json.dumps({name: getattr(server, name) for name in names}), encoding="utf-8")


if __name__ == "__main__":
    main()
