"""A streamed answer: its events put together into the object that the same answer not streamed would be.

A stream is read to its end before it is looked at: what is compared is what came, not when.
"""

import re
from collections.abc import Iterator
from typing import Any

from .errors import RequestFailed
from .protocol import Answer, Dialect, answer_in, error_message, load, malformed

DONE = "[DONE]"
END_OF_LINE = re.compile(r"\r\n|\r|\n")


def parse_stream(dialect: Dialect, data: bytes) -> Answer:
    """The answer in a whole stream of server-sent events.

    Raises:
        RequestFailed: malformed, cut before `[DONE]`, an error among the events, or what `parse` refuses.
    """
    whole: dict[str, Any] = {}
    choice: dict[str, Any] = {}
    chunks = 0
    ended = False
    for event in events(data):
        if ended:
            raise malformed("an event after the end of the stream")
        if event == DONE:
            ended = True
            continue
        chunk = load(event)
        if (message := error_message(chunk)) is not None:
            raise RequestFailed("http", f"the server sent an error in the stream: {message}")
        take(whole, chunk, ("id", "system_fingerprint", "usage", "prompt_token_ids"))
        choices = chunk.get("choices")
        if not isinstance(choices, list) or len(choices) > 1:
            raise malformed("an event that has not one choice or none")
        for part in choices:
            if not isinstance(part, dict) or part.get("index", 0) != 0:
                raise malformed("another choice than the one that was asked for")
            add(dialect, choice, part)
            chunks += 1
    if not ended:
        raise malformed("the stream was cut before its end")
    if dialect.endpoint == "chat":
        choice["message"] = {"content": choice.pop("text", None)}
    return answer_in(dialect, whole | {"choices": [choice] if chunks else []})


def events(data: bytes) -> Iterator[str]:
    """The data of each event, as the HTML standard reads them; comments and other fields are passed over."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise malformed("a stream that is not UTF-8") from None
    lines: list[str] = []
    for line in END_OF_LINE.split(text):
        if not line:
            if lines:
                yield "\n".join(lines)
            lines = []
            continue
        name, _, value = line.partition(":")
        if name == "data":
            lines.append(value.removeprefix(" "))
        elif len(name) > 20 or (name and not name.isidentifier()):
            raise malformed("no stream of events")
    # An event without the empty line that ends it was cut.


def take(whole: dict[str, Any], part: dict[str, Any], names: tuple[str, ...]) -> None:
    for name in names:
        if part.get(name) is not None:
            whole[name] = part[name]


def add(dialect: Dialect, choice: dict[str, Any], part: dict[str, Any]) -> None:
    """Add one event's piece to the choice so far."""
    take(choice, part, ("finish_reason", "prompt_token_ids"))
    if dialect.endpoint == "chat":
        delta = part.get("delta")
        if not isinstance(delta, dict):
            raise malformed("a choice without a delta")
        piece = delta.get("content")
        piece = "" if piece is None else piece
    else:
        piece = part.get("text")
    if not isinstance(piece, str):
        raise malformed("a choice without text")
    choice["text"] = choice.get("text", "") + piece
    extend(choice, part, "token_ids")
    logprobs = part.get("logprobs")
    if logprobs is None:
        return
    if not isinstance(logprobs, dict):
        raise malformed("logprobs of an unknown form (in a stream)")
    so_far = choice.setdefault("logprobs", {})
    for name in ("content",) if dialect.endpoint == "chat" else ("tokens", "token_logprobs", "top_logprobs"):
        extend(so_far, logprobs, name)


def extend(whole: dict[str, Any], part: dict[str, Any], name: str) -> None:
    value = part.get(name)
    if value is None:
        return
    if not isinstance(value, list):
        raise malformed(f"{name} that are no list")
    whole.setdefault(name, []).extend(value)
