"""The OpenAI protocol as vLLM speaks it: from a request to a JSON body, from a JSON body to an answer.

A logprob stays the double that its JSON number names, so that two answers are equal exactly when the server sent equal
numbers. vLLM sends float32 values in full, hence equal numbers are equal bits.
"""

import json
import math
from dataclasses import dataclass, field
from typing import Any

from .errors import RequestFailed

LEVELS = ("text", "tokens", "logprobs")
PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}


@dataclass(frozen=True)
class Dialect:
    """How to ask this server: which endpoint, how many alternatives, whether with vLLM's own fields.

    `top_logprobs` None asks for no logprobs at all; 0 asks for the chosen token's alone.
    """

    endpoint: str
    top_logprobs: int | None
    vllm_fields: bool

    @property
    def path(self) -> str:
        return PATHS[self.endpoint]


@dataclass(frozen=True)
class Request:
    """What to generate. A prompt is text, or token ids where the endpoint is completions."""

    prompt: str | tuple[int, ...]
    max_tokens: int
    temperature: float = 0.0
    seed: int | None = None
    stream: bool = False
    cache_salt: str | None = None
    """Keeps the server from reusing another request's prefix, so that the prompt is computed anew."""


@dataclass(slots=True)
class Answer:
    """One completion. Tokens are ids, or their text where the server gives no ids; None where it gives neither."""

    text: str
    finish_reason: str
    tokens: tuple[int | str, ...] | None = None
    logprobs: tuple[float, ...] | None = None
    top_logprobs: tuple[tuple[float, ...], ...] = ()
    """By token, the largest logprobs in falling order: their values alone, since equal ones have no order."""
    prompt_ids: tuple[int, ...] | None = None
    prompt_tokens: int | None = None
    response_id: str = ""
    fingerprint: str | None = None
    seconds: float = field(default=0.0, compare=False)

    @property
    def level(self) -> str:
        """The strictest level that this answer can be compared at."""
        if self.logprobs is not None:
            return "logprobs"
        return "text" if self.tokens is None else "tokens"


def body(dialect: Dialect, model: str, request: Request) -> dict[str, Any]:
    """The JSON object to post."""
    content: dict[str, Any] = {
        "model": model,
        "max_tokens": request.max_tokens,
        "temperature": request.temperature,
    }
    if dialect.endpoint == "chat":
        content["messages"] = [{"role": "user", "content": request.prompt}]
        if dialect.top_logprobs is not None:
            content |= {"logprobs": True, "top_logprobs": dialect.top_logprobs}
    else:
        content["prompt"] = request.prompt
        if dialect.top_logprobs is not None:
            content["logprobs"] = dialect.top_logprobs
    if dialect.vllm_fields:
        content["return_token_ids"] = True
        if dialect.top_logprobs is not None:
            content["return_tokens_as_token_ids"] = True
        if request.cache_salt is not None:
            content["cache_salt"] = request.cache_salt
    if request.seed is not None:
        content["seed"] = request.seed
    if request.stream:
        content |= {"stream": True, "stream_options": {"include_usage": True}}
    return content


def malformed(what: str) -> RequestFailed:
    return RequestFailed("malformed", f"the server's answer is malformed: {what}")


def load(data: bytes | str) -> dict[str, Any]:
    """The JSON object in `data`.

    Raises:
        RequestFailed: it is cut short, or something else.
    """
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise malformed(f"no JSON ({type(error).__name__}, {len(data)} bytes)") from None
    if not isinstance(content, dict):
        raise malformed(f"a JSON {type(content).__name__} where an object belongs")
    return content


def error_message(content: Any) -> str | None:
    """The text of an error object in any of the forms that servers give it; None where there is none."""
    if not isinstance(content, dict):
        return None
    error = content.get("error", content.get("detail"))
    if content.get("object") == "error":
        error = content
    if isinstance(error, dict):
        error = error.get("message", error)
    return None if error is None else " ".join(str(error).split())


def parse(dialect: Dialect, data: bytes) -> Answer:
    """The answer in a whole response body.

    Raises:
        RequestFailed: malformed, an error object, not exactly one choice, or a logprob that is no number.
    """
    return answer_in(dialect, load(data))


def answer_in(dialect: Dialect, content: dict[str, Any]) -> Answer:
    """The answer in the JSON object of a whole response; raises what `parse` does."""
    if (message := error_message(content)) is not None:
        raise RequestFailed("http", f"the server answered with an error: {message}")
    choices = content.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise malformed(f"{len(choices) if isinstance(choices, list) else 'no'} choices where one belongs")
    choice = choices[0]
    if dialect.endpoint == "chat":
        message_object = choice.get("message")
        text = message_object.get("content") if isinstance(message_object, dict) else None
        text = "" if text is None and isinstance(message_object, dict) else text
    else:
        text = choice.get("text")
    if not isinstance(text, str):
        raise malformed("a choice without text")
    usage = content.get("usage")
    prompt_tokens = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    tokens, logprobs, tops = read_logprobs(dialect, choice.get("logprobs"))
    ids = token_ids(choice.get("token_ids"), "token_ids")
    if ids is not None and logprobs is not None and len(ids) != len(logprobs):
        raise malformed(f"{len(ids)} token ids with {len(logprobs)} logprobs")
    return Answer(
        text=text,
        finish_reason=str(choice.get("finish_reason")),
        tokens=tokens if ids is None else ids,
        logprobs=logprobs,
        top_logprobs=tops,
        prompt_ids=token_ids(choice.get("prompt_token_ids", content.get("prompt_token_ids")), "prompt_token_ids"),
        prompt_tokens=prompt_tokens if isinstance(prompt_tokens, int) else None,
        response_id=str(content.get("id") or ""),
        fingerprint=content["system_fingerprint"] if isinstance(content.get("system_fingerprint"), str) else None,
    )


def token_ids(value: Any, name: str) -> tuple[int, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(type(token) is int for token in value):
        raise malformed(f"{name} that are no list of whole numbers")
    return tuple(value)


Logprobs = tuple[tuple[int | str, ...] | None, tuple[float, ...] | None, tuple[tuple[float, ...], ...]]


def read_logprobs(dialect: Dialect, value: Any) -> Logprobs:
    """Tokens, the chosen tokens' logprobs, and the largest logprobs by token, of either endpoint's form."""
    if value is None:
        return None, None, ()
    try:
        if dialect.endpoint == "chat":
            content = value["content"]
            if content is None:
                return None, None, ()
            names = [entry["token"] for entry in content]
            numbers = [entry["logprob"] for entry in content]
            alternatives = [[other["logprob"] for other in entry.get("top_logprobs") or ()] for entry in content]
        else:
            names, numbers = value["tokens"], value["token_logprobs"]
            alternatives = [list((entry or {}).values()) for entry in value.get("top_logprobs") or ()]
        if len(names) != len(numbers):
            raise malformed(f"{len(names)} tokens with {len(numbers)} logprobs")
        logprobs = tuple([checked(number, index) for index, number in enumerate(numbers)])
        kept = dialect.top_logprobs or 0
        tops = tuple(
            [
                tuple(sorted([checked(number, index, may_be_infinite=True) for number in entry], reverse=True)[:kept])
                for index, entry in enumerate(alternatives)
            ]
        )
        if tops and len(tops) != len(logprobs):
            raise malformed(f"{len(tops)} lists of alternatives with {len(logprobs)} logprobs")
        return tuple([token_name(name) for name in names]), logprobs, tops
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise malformed(f"logprobs of an unknown form ({type(error).__name__})") from None


def checked(number: Any, index: int, may_be_infinite: bool = False) -> float:
    """A logprob as a double; null is how JSON says NaN."""
    if type(number) is not float:
        if number is not None and type(number) is not int:
            raise malformed(f"the logprob of token {index} is {number!r}")
        number = math.nan if number is None else float(number)
    if number != number or (math.isinf(number) and not may_be_infinite):
        raise RequestFailed("nan", f"the logprob of token {index} is {number}, which no sound computation gives")
    return number


def token_name(name: Any) -> int | str:
    """vLLM writes `token_id:17` for a token whose text it was asked not to give."""
    if not isinstance(name, str):
        raise malformed(f"a token named {name!r}")
    if name.startswith("token_id:") and name[9:].isdecimal() and len(name) < 20:
        return int(name[9:])
    return name
