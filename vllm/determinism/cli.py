"""The command line: from arguments to settings to one run, its output and its exit status."""

import argparse
import importlib.util
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn
from urllib.parse import urlsplit

from . import modes, records_cli
from .errors import EXIT_READER_GONE, UsageError
from .files import check_writable
from .output import Screen
from .protocol import LEVELS
from .session import Outputs, execute
from .settings import Settings, Target

DESCRIPTION = """\
Is this server deterministic under load?

Each of several prompts is sent alone to the otherwise idle server. Then many copies of them are sent at once, with
other traffic beside, and every answer is compared with the one that its prompt got alone: text, token ids and the bits
of the logprobs, as far as the server gives them. Works with any OpenAI-compatible server.
"""

EPILOG = """\
examples:
  python vllm/test_determinism.py
  python vllm/test_determinism.py --requests 400 --concurrency 128
  python vllm/test_determinism.py --prompt "What is the capital of France?" --prompt "Write a haiku."
  python vllm/test_determinism.py --url http://gpu:8000 --control-url http://gpu:8001 --json result.json
  python vllm/test_determinism.py --mode all --restart-command "docker restart vllm" --minutes 10 --report report.html
  VLLM_API_KEY=... python vllm/test_determinism.py --url https://example.com --model my-model --junit result.xml

exit status:
  0  every answer is identical, and the control, where there is one, was caught
  1  answers differ, or a request got no sound answer
  2  a setting that cannot work, or a server that cannot be reached or refuses the requests
  3  inconclusive: nothing differs, and it could not be shown that a difference would have been seen
  130  interrupted; partial results are printed
"""

MODES_TEXT = "\n".join(
    [
        *(
            f"{name:<9}{mode.summary}{f' (needs {mode.needs})' if mode.needs else ''}"
            for name, mode in modes.MODES.items()
        ),
        f"{modes.ALL:<9}Each of them in turn that has what it needs",
    ]
)


class Parser(argparse.ArgumentParser):
    """Bad usage is one line and exit status 2."""

    def error(self, message: str) -> NoReturn:
        print(f"test_determinism: {message} (--help lists the settings)", file=sys.stderr)
        raise SystemExit(2)


def whole(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text[:12]) <= 10_000_000 or len(text) > 8:
        raise argparse.ArgumentTypeError(f"{text!r} is not valid: a whole number from 1 to 10000000 is needed")
    return int(text)


def whole_or_zero(text: str) -> int:
    return 0 if text == "0" else whole(text)


def seed(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = -1
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not valid: a whole number from 0 to 2**63 - 1 is needed")
    return value


def real(text: str, is_valid: Callable[[float], bool], valid: str) -> float:
    """A number that is as it should be; `valid` says how that is."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not is_valid(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not valid: a number {valid} is needed")
    return value


def minutes(text: str) -> float:
    return real(text, lambda value: 0 < value <= 100_000, "of minutes above 0")


def probability(text: str) -> float:
    return real(text, lambda value: 0 <= value < 1, "from 0 to below 1")


def duration(text: str) -> float:
    return real(text, lambda value: 0 < value <= 1_000_000, "of seconds above 0")


def base_url(text: str) -> str:
    """A server's address; the /v1 that many clients want is taken off."""
    url = text.strip().rstrip("/").removesuffix("/v1").rstrip("/")
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        valid = valid and not parts.query and not parts.fragment and " " not in url and url.isprintable()
    except ValueError:
        valid = False
    if not valid:
        raise argparse.ArgumentTypeError(f"{text!r} is not valid: an address like http://127.0.0.1:8000 is needed")
    return url


def parser() -> Parser:
    found = Parser(
        prog="test_determinism.py",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    server = found.add_argument_group("the server")
    server.add_argument("--url", type=base_url, help="its address (default: http://127.0.0.1 at VLLM_PORT, or at 8000)")
    server.add_argument("--model", help="the model to ask (default: the only one that the server has)")
    server.add_argument(
        "--api-key",
        help="its key (default: the environment's VLLM_API_KEY, which is the better place: other users of this machine"
        " can read a command line)",
    )
    server.add_argument("--endpoint", choices=("auto", "completions", "chat"), default="auto", help="(default: auto)")
    server.add_argument("--timeout", type=duration, default=600.0, metavar="S", help="for one request (default: 600)")
    server.add_argument(
        "--retries",
        type=whole_or_zero,
        default=6,
        metavar="N",
        help="of a dropped connection or busy server (default: 6)",
    )
    load = found.add_argument_group("the load")
    load.add_argument("--requests", type=whole, default=100, metavar="N", help="copies to send (default: 100)")
    load.add_argument("--concurrency", type=whole, default=10, metavar="C", help="copies in flight (default: 10)")
    load.add_argument(
        "--background",
        type=whole_or_zero,
        metavar="B",
        help="streams of other traffic beside (default: a quarter of the concurrency, at least 1; 0 for none)",
    )
    load.add_argument(
        "--prompt", action="append", metavar="TEXT", help="may be given several times (default: generated)"
    )
    load.add_argument(
        "--prompt-file", metavar="FILE", help='a prompt a line, or .jsonl with a string or {"prompt": "..."} a line'
    )
    load.add_argument("--max-tokens", type=whole, default=64, metavar="N", help="of each answer (default: 64)")
    load.add_argument(
        "--only",
        type=whole,
        metavar="P",
        help="ask the P-th of the prompts alone, as the line that repeats a part does",
    )
    load.add_argument("--seed", type=seed, default=0, help="of prompts, order and other traffic (default: 0)")
    mode = found.add_argument_group("modes", MODES_TEXT)
    mode.add_argument("--mode", choices=(*modes.MODES, modes.ALL), default="mixed", help="(default: mixed)")
    mode.add_argument("--restart-command", metavar="CMD", help="restarts the server; run by the shell in mode restart")
    mode.add_argument("--minutes", type=minutes, metavar="M", help="how long mode soak goes on")
    judging = found.add_argument_group("the judgement")
    judging.add_argument(
        "--level", choices=LEVELS, help="what to compare (default: the strictest that the server offers)"
    )
    judging.add_argument(
        "--control-url",
        type=base_url,
        metavar="URL",
        help="a plain server of the same model: it gets the same load and must be caught, or a pass is inconclusive",
    )
    judging.add_argument(
        "--min-power",
        type=probability,
        default=0.9,
        metavar="P",
        help="without a control, a pass is inconclusive where the load would have caught a plain server with a smaller"
        " probability than this, by estimate (default: 0.9; 0 for none)",
    )
    records_cli.add_arguments(found)
    output = found.add_argument_group("output")
    output.add_argument(
        "--json", metavar="FILE", help="write everything as JSON (- for stdout; the text is on stderr then)"
    )
    output.add_argument("--junit", metavar="FILE", help="write JUnit XML for a CI")
    output.add_argument(
        "--report", metavar="FILE", help="write a page with pictures (HTML; needs `pip install matplotlib jinja2`)"
    )
    output.add_argument("--quiet", action="store_true", help="print the verdict alone")
    output.add_argument("--no-color", action="store_true", help="no colours on a terminal, as with NO_COLOR")
    return found


def read_prompts(arguments: argparse.Namespace) -> tuple[str, ...]:
    """The user's own prompts, in order; none where they are to be generated.

    Raises:
        UsageError: the file cannot be read, holds none, or holds something else.
    """
    prompts = list(arguments.prompt or ())
    path = arguments.prompt_file
    if path is not None:
        try:
            lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise UsageError("--prompt-file", path, f"{reason}; a text file with a prompt a line is needed") from None
        as_json = path.endswith(".jsonl")
        found = [json_prompt(path, n, line) if as_json else line for n, line in enumerate(lines, 1) if line.strip()]
        if not found:
            raise UsageError("--prompt-file", path, "it holds no prompt; one a line is needed")
        prompts += found
    for prompt in prompts:
        if not prompt.strip():
            raise UsageError("--prompt", prompt, "a text that is not empty is needed")
    different = tuple(dict.fromkeys(prompts))
    if len(different) > arguments.requests:
        raise UsageError("--requests", arguments.requests, f"one for each of the {len(different)} prompts is needed")
    return different


def json_prompt(path: str, number: int, line: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    prompt = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(prompt, str):
        raise UsageError("--prompt-file", path, f'line {number} is neither a JSON string nor {{"prompt": "..."}}')
    return prompt


def default_url(environment: dict[str, str]) -> str:
    port = environment.get("VLLM_PORT", "").strip() or "8000"
    if not port.isdecimal() or not 1 <= int(port[:9]) <= 65535:
        raise UsageError("VLLM_PORT", port, "a port number from 1 to 65535 is needed")
    return f"http://127.0.0.1:{int(port)}"


def settings(arguments: argparse.Namespace, environment: dict[str, str]) -> Settings:
    """Checked settings from arguments and environment.

    Raises:
        UsageError: the first of them that cannot work.
    """
    key = arguments.api_key if arguments.api_key is not None else environment.get("VLLM_API_KEY")
    if key and not (key.isascii() and key.isprintable()):
        raise UsageError("--api-key", "...", "printable ASCII characters are needed")
    for name, path in (("--json", arguments.json), ("--junit", arguments.junit), ("--report", arguments.report)):
        check_writable(name, path)
    if arguments.json == "-" == arguments.junit:
        raise UsageError("--junit", "-", "stdout is taken by --json; a file is needed")
    if arguments.report is not None:
        check_report(arguments.report)

    def target(url: str) -> Target:
        return Target(url, key or None, arguments.timeout, arguments.retries)

    found = Settings(
        target=target(arguments.url or default_url(environment)),
        requests=arguments.requests,
        concurrency=arguments.concurrency,
        max_tokens=arguments.max_tokens,
        seed=arguments.seed,
        model=arguments.model,
        level=arguments.level,
        endpoint=arguments.endpoint,
        prompts=read_prompts(arguments),
        background=arguments.background,
        control=target(arguments.control_url) if arguments.control_url else None,
        mode=arguments.mode,
        only=arguments.only,
        minutes=arguments.minutes,
        restart_command=arguments.restart_command,
        least_power=arguments.min_power,
    )
    modes.chosen(found)
    return found


def check_report(path: str) -> None:
    """Refuse a report that could not be written after a long run.

    Raises:
        UsageError: it is no file, or what draws it is not installed.
    """
    if path == "-":
        raise UsageError("--report", path, "a file is needed")
    missing = [name for name in ("matplotlib", "jinja2") if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError("--report", path, f"`pip install {' '.join(missing)}` is needed for it")


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    arguments = parser().parse_args(argv)
    try:
        records_cli.prepare(arguments, parser().parse_args([]))
        found = settings(arguments, dict(os.environ))
    except UsageError as error:
        print(f"test_determinism: {error}", file=sys.stderr)
        return error.exit_code
    colour = not arguments.no_color and not os.environ.get("NO_COLOR")
    screen = Screen(sys.stderr if arguments.json == "-" else sys.stdout, colour, arguments.quiet)
    try:
        if records_cli.concerns(arguments):
            return records_cli.execute(arguments, found, screen)
        command = tuple(sys.argv[1:] if argv is None else argv)
        return execute(found, Outputs(screen, arguments.json, arguments.junit, arguments.report, command))
    except BrokenPipeError:  # `| head -1`: nobody reads any more, and the interpreter must not try again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), screen.stream.fileno())
        return EXIT_READER_GONE
