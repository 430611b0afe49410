"""What the parsers may make of any bytes: an answer that the rest of the harness can rely on, or a failed request."""

import json
import math
from collections.abc import Callable, Iterator
from typing import Any

from determinism.compare import digests, first_difference, largest_difference
from determinism.errors import RequestFailed
from determinism.protocol import Answer, Dialect, parse
from fake_server import Behaviour, FakeServer

DIALECTS = [Dialect("completions", 5, True), Dialect("chat", 5, True), Dialect("chat", None, False)]


def parsed(dialect: Dialect, data: bytes, read: Callable[[Dialect, bytes], Answer] = parse) -> Answer | None:
    """The answer, checked, or None for a request that failed in a way the harness knows."""
    try:
        answer = read(dialect, data)
    except RequestFailed as error:
        assert str(error)
        assert error.kind in ("malformed", "http", "nan")
        return None
    assert isinstance(answer, Answer)
    check(answer)
    return answer


def check(answer: Answer) -> None:
    """What the rest of the harness relies on."""
    assert isinstance(answer.text, str)
    if answer.logprobs is not None:
        assert answer.tokens is not None
        assert len(answer.tokens) == len(answer.logprobs)
        assert all(math.isfinite(value) for value in answer.logprobs)
        assert not any(math.isnan(value) for values in answer.top_logprobs for value in values)
        assert len(answer.top_logprobs) in (0, len(answer.logprobs))
    assert set(digests(answer)) == {"text", "tokens", "logprobs"} - (
        {"tokens", "logprobs"} if answer.level == "text" else {"logprobs"} if answer.level == "tokens" else set()
    )


def agree(own: Answer, other: Answer) -> None:
    """Two answers to one prompt part at a level just where their digests do."""
    for level in set(digests(own)) & set(digests(other)):
        parted = first_difference(own, other, level, 1, 0)
        assert (parted is None) == (digests(own)[level] == digests(other)[level])
    largest_difference(own, other)


def asked(dialect: Dialect, words: int) -> dict:
    """The body of a request that has everything in it which the dialect asks for."""
    found = {"prompt": "a b", "messages": [{"content": "a b"}], "max_tokens": words, "model": "m"}
    found |= {"return_token_ids": dialect.vllm_fields, "return_tokens_as_token_ids": dialect.vllm_fields}
    return found if dialect.top_logprobs is None else found | {"logprobs": 5}


def sound(dialect: Dialect, words: int = 3) -> dict:
    """A whole answer, with logprobs in any dialect."""
    return FakeServer(Behaviour()).answer(asked(dialect, words) | {"logprobs": 5}, dialect.endpoint == "chat", None)


class Kept:
    """A connection that keeps what is written to it."""

    def raw(self, status: int, data: bytes, kind: str = "") -> None:
        assert status == 200
        self.data = data


def streamed(dialect: Dialect, words: int = 3) -> tuple[bytes, bytes]:
    """The same answer as a stream and whole."""
    chat, connection = dialect.endpoint == "chat", Kept()
    FakeServer(Behaviour()).stream(connection, asked(dialect, words), chat, None)  # type: ignore[arg-type]
    return connection.data, json.dumps(FakeServer(Behaviour()).answer(asked(dialect, words), chat, None)).encode()


def places(content: Any, path: tuple = ()) -> Iterator[tuple]:
    """Every path into a JSON value."""
    yield path
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def replaced(content: Any, path: tuple, value: Any) -> Any:
    """The JSON value with another one at a place."""
    if not path:
        return value
    copy = dict(content) if isinstance(content, dict) else list(content)
    copy[path[0]] = replaced(copy[path[0]], path[1:], value)
    return copy
