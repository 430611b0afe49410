#!/usr/bin/env python3
"""Four ways to ask the server, with httpx: one function each, to run and to copy from.

    python vllm/example_client.py                               all four, in turn
    python vllm/example_client.py stream --prompt "Hello!"      one of them

  simple       one request and its answer
  concurrent   many requests at once, with asyncio
  stream       an answer while it is being written
  determinism  copies of a request among other traffic, compared bit by bit with the same request alone

Needs `pip install httpx`. The key of a server that asks for one is read from VLLM_API_KEY.
Exit status: 0; 1 where answers differ or one came broken; 2 for a setting that cannot work, and for a server that
cannot be reached or refuses; 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

try:
    import httpx
except ImportError:
    print("example_client: httpx is not installed: `pip install httpx` is needed", file=sys.stderr)
    raise SystemExit(2) from None

CHAT = "/v1/chat/completions"
COPIES = 16


def simple(settings: Settings) -> None:
    """One request and its answer."""
    with httpx.Client(**settings.connection()) as client:
        response = client.post(CHAT, json=settings.question())
    text, _ = answer(response)
    print(text)


def concurrent(settings: Settings) -> None:
    """Many requests at once, which the server computes together."""
    prompts = [f"{settings.prompt} (question {number})" for number in range(1, 9)]
    responses = asyncio.run(post_all(settings, [settings.question(prompt) for prompt in prompts]))
    for prompt, response in zip(prompts, responses, strict=True):
        text, _ = answer(response)
        print(f"{prompt} -> {text}")


async def post_all(settings: Settings, questions: list[dict[str, Any]]) -> list[httpx.Response]:
    """The responses to all questions, in their order; all are sent at once, over up to 100 connections."""
    with contextlib.suppress(NotImplementedError):  # on Windows, where asyncio.run does without
        # A Ctrl-C in the microseconds before the loop goes to sleep would wake it with the next answer only.
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, asyncio.current_task().cancel)
    async with httpx.AsyncClient(**settings.connection()) as client:
        return await asyncio.gather(*(client.post(CHAT, json=question) for question in questions))


def stream(settings: Settings) -> None:
    """An answer while it is being written."""
    question = settings.question(stream=True, stream_options={"include_usage": True})
    finish_reason, usage = None, {}
    with httpx.Client(**settings.connection()) as client, client.stream("POST", CHAT, json=question) as response:
        if response.status_code != 200:
            response.read()
            checked(response)
        try:
            for event in events(response.iter_bytes()):
                usage = event.get("usage") or usage
                for choice in event.get("choices", ()):  # the event with the usage has none
                    print(choice["delta"].get("content") or "", end="", flush=True)
                    finish_reason = choice.get("finish_reason") or finish_reason
        finally:
            print()
    print(f"({usage.get('completion_tokens', '?')} tokens, finish_reason {finish_reason})")


def events(chunks: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The events of a stream up to [DONE], without which it is no whole answer.

    Lines are cut as bytes: a chunk may end inside a character, and httpx's iter_lines, like str.splitlines, would cut
    at U+2028 and others that JSON leaves as they are.

    Raises:
        Failure: an error in the stream, or an end before [DONE].
    """
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if not line.startswith(b"data:"):  # an empty line between events, or a comment that keeps the line open
                continue
            data = line.removeprefix(b"data:").strip()
            if data == b"[DONE]":
                return
            event = json.loads(data)
            if (message := error_message(event)) is not None:
                raise Failure(f"an error in the stream, so what came is not the whole answer: {message}", 1)
            yield event
    raise Failure("the stream ended before [DONE], so what came is not the whole answer", 1)


def determinism(settings: Settings) -> None:
    """Copies of a request among other traffic, compared bit by bit with the same request alone.

    A small look; test_determinism.py beside this file is the whole test.
    """
    question = settings.question(logprobs=True)
    text, tokens = alone = answer(asyncio.run(post_all(settings, [question]))[0])
    if not text and not tokens:
        raise Failure("the answer alone is empty, so there is nothing to compare", 1)
    others = [settings.question("word " * 4 * number + settings.prompt) for number in range(COPIES)]
    mixed = [one for pair in zip([question] * COPIES, others, strict=True) for one in pair]
    copies = [answer(response) for response in asyncio.run(post_all(settings, mixed))][::2]
    different = [copy for copy in copies if copy != alone]
    if different:
        pairs = enumerate(zip(tokens, different[0][1], strict=False))
        parted = [f"token {index}: {one} alone, {other} in company" for index, (one, other) in pairs if one != other]
        where = parted[0] if parted else "text"
        raise Failure(f"{len(different)} of {COPIES} copies differ from the answer alone, the first in its {where}", 1)
    what = f"text and {len(tokens)} logprobs" if tokens else "text alone: the server gives no logprobs"
    print(f"{COPIES} of {COPIES} copies are identical to the answer alone, in {what}")


EXAMPLES = {example.__name__: example for example in (simple, concurrent, stream, determinism)}


class Failure(Exception):
    """Ends the program: Failure(the one line that the user reads, the exit status)."""


@dataclass(frozen=True)
class Settings:
    """Which server, and what to ask it."""

    url: str
    api_key: str
    model: str
    prompt: str
    max_tokens: int

    def connection(self) -> dict[str, Any]:
        """What httpx.Client and httpx.AsyncClient are made with."""
        return {
            "base_url": self.url.rstrip("/").removesuffix("/v1"),
            "headers": {"authorization": f"Bearer {self.api_key}"} if self.api_key else {},
            "timeout": httpx.Timeout(600, connect=10),
            # a proxy cannot reach a server on this machine
            "trust_env": httpx.URL(self.url).host not in ("127.0.0.1", "localhost", "::1"),
        }

    def question(self, prompt: str | None = None, **more: Any) -> dict[str, Any]:
        """The JSON to post. Temperature 0 takes the likeliest token each time, so that there is one answer."""
        messages = [{"role": "user", "content": prompt or self.prompt}]
        return {"model": self.model, "messages": messages, "max_tokens": self.max_tokens, "temperature": 0} | more


def answer(response: httpx.Response) -> tuple[str, list[tuple[str, float]]]:
    """An answer's text, and each token with its logprob where those were asked for."""
    choice = checked(response)["choices"][0]
    tokens = (choice.get("logprobs") or {}).get("content") or ()
    return choice["message"]["content"] or "", [(token["token"], float(token["logprob"])) for token in tokens]


def checked(response: httpx.Response) -> dict[str, Any]:
    """The JSON object in a whole response; an HTTP error is a Failure in the server's own words."""
    status = response.status_code
    if status == 200:
        return response.json()
    if status == 401:
        raise Failure("the server asks for its key (HTTP 401): set VLLM_API_KEY to it", 2)
    try:
        message = error_message(response.json())
    except ValueError:
        message = None
    raise Failure(f"HTTP {status}: {message or response.reason_phrase}", 1 if status >= 500 else 2)


def error_message(content: dict[str, Any]) -> str | None:
    """The server's own words in an error object; None where it is no error."""
    error = content.get("error", content.get("detail"))
    message = error.get("message", error) if isinstance(error, dict) else error
    return None if message is None else " ".join(str(message).split())


def only_model(settings: Settings) -> str:
    with httpx.Client(**settings.connection()) as client:
        names = [model["id"] for model in checked(client.get("/v1/models"))["data"]]
    if len(names) != 1:
        raise Failure(f"--model is needed: the server has {', '.join(names) or 'none'}", 2)
    return names[0]


def read_settings(argv: list[str] | None) -> tuple[list[str], Settings]:
    """The examples to run, and what to ask whom; a setting that cannot work ends the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"example_client: {message} (--help lists the settings)\n")
    url = f"http://127.0.0.1:{os.environ.get('VLLM_PORT') or 8000}"
    parser.add_argument("example", nargs="?", choices=EXAMPLES, help="(default: all)")
    parser.add_argument("--url", default=url, help="(default: http://127.0.0.1 at VLLM_PORT, or at 8000)")
    parser.add_argument("--model", default="", help="(default: the only one that the server has)")
    parser.add_argument("--prompt", default="Tell me about the sea.", help="(default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=32, metavar="N", help="of an answer (default: 32)")
    found = vars(parser.parse_args(argv))
    key, example = os.environ.get("VLLM_API_KEY") or "", found.pop("example")
    if not (key.isascii() and key.isprintable()):
        parser.error("VLLM_API_KEY is not valid: printable ASCII characters are needed")
    if any("\ud800" <= character <= "\udfff" for character in found["prompt"]):
        parser.error(f"--prompt={found['prompt']!r} is not valid: UTF-8 is needed")
    return [example] if example else list(EXAMPLES), Settings(**found, api_key=key)


def main(argv: list[str] | None = None) -> int:
    sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    names, settings = read_settings(argv)
    try:
        settings = replace(settings, model=settings.model or only_model(settings))
        for name in names:
            if len(names) > 1:
                print(f"--- {name}: {EXAMPLES[name].__doc__.splitlines()[0]}")
            EXAMPLES[name](settings)
        return 0
    except Failure as failure:
        message, status = failure.args
    except (httpx.InvalidURL, httpx.UnsupportedProtocol):
        message, status = f"--url={settings.url!r} (VLLM_PORT) is not valid: http://127.0.0.1:8000 would be", 2
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        message, status = f"nothing answers at {settings.url} ({error})", 2
    except httpx.HTTPError as error:
        message, status = f"the answer from {settings.url} broke off ({str(error) or type(error).__name__})", 1
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        message, status = f"the server's answer is not of OpenAI's form ({type(error).__name__}: {error})", 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        message, status = "interrupted", 130
    except BrokenPipeError:  # whoever read the output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    print(f"example_client: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
