#!/usr/bin/env python3
"""Measure how far a trainer's logprobs are from the sampler's, find out which operations make it so, bring it to zero.

Policy-gradient methods weigh a sample by exp(Δ), Δ = the trainer's logprob of a token - the sampler's. With equal
weights, exp(Δ) should be 1. This makes the small random Llama, starts the real vLLM server on the CPU, plain and then
batch-invariant, and samples answers over HTTP. A forward pass of transformers then computes the logprobs of the same
token ids: as shipped, under our mode, and with further operations in the form that the server has them.

  .venv/bin/python examples/rl_logprobs.py                                     two minutes on two cores
  .venv/bin/python examples/rl_logprobs.py --answers 32 --max-tokens 128 --json differences.json

The first table has the size of Δ, in nats, for both servers and three trainers. The second is of the batch-invariant
server: its operations put into the server's form one after another, and for each, what comes back where it alone has
not that form.

Exit status: 0 where the batch-invariant server and the last trainer agree to the last bit, 1 where they do not, 2 for a
setting that cannot work and for a server that did not start or answer, 130 after Ctrl-C.
"""

import argparse
import asyncio
import functools
import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "vllm"), str(ROOT)]

from demo import CPU, FOLDER, OURS, PLAIN, START_SECONDS, make_model, say, scale, server_env  # noqa: E402
from local_server import Failure, Programs, free_port, run_command, wait_until_ready  # noqa: E402

PROMPTS = (
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Count from one to twenty, and say which of the numbers are prime: ",
    "A",
)
SHIPPED, MODE, SERVED = "as shipped", "our mode", "our mode, operations as served"


@dataclass(frozen=True)
class Sample:
    """One answer of the sampler: token ids, and each answer token's logprob in nats."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True)
class Difference:
    """Δ over all tokens.

    Attributes:
        tokens: how many were compared.
        differing: how many have another Δ than exactly 0.
        largest, mean: of |Δ|, in nats.
        ratio_error: mean of |exp(Δ) - 1|.
    """

    tokens: int
    differing: int
    largest: float
    mean: float
    ratio_error: float

    def cells(self) -> tuple[str, str, str, str]:
        equal = f"{self.tokens - self.differing} of {self.tokens}"
        return f"{self.largest:.2g}", f"{self.mean:.2g}", equal, f"{self.ratio_error:.2g}"


def compare(sampler: Sequence[float], trainer: Sequence[float]) -> Difference:
    """Δ = trainer - sampler, token by token; both in nats.

    Raises:
        ValueError: nothing to compare, not the same tokens, or a logprob that is no finite number.
    """
    if len(sampler) != len(trainer) or not sampler:
        raise ValueError(f"{len(sampler)} logprobs of the sampler, {len(trainer)} of the trainer")
    deltas = [ours - theirs for theirs, ours in zip(sampler, trainer, strict=True)]
    if not all(map(math.isfinite, deltas)):
        raise ValueError("a logprob is no finite number")
    count = len(deltas)
    return Difference(
        tokens=count,
        differing=count - deltas.count(0.0),
        largest=max(map(abs, deltas)),
        mean=math.fsum(map(abs, deltas)) / count,
        ratio_error=math.fsum(abs(math.expm1(delta)) for delta in deltas) / count,
    )


@dataclass(frozen=True)
class Differences:
    """Both tables: by server and trainer; by operation, with all forms up to its own, and with all but its own."""

    pairs: Mapping[str, Mapping[str, Difference]]
    steps: Mapping[str, Difference]
    without: Mapping[str, Difference]


def sample(model: Path, settings: argparse.Namespace) -> dict[str, list[Sample]]:
    """The answers of the plain and of the batch-invariant server, one started after the other."""
    found = {}
    for name, mode in ((PLAIN, "0"), (OURS, "1")):
        with Programs() as programs:
            port = free_port()
            command = [sys.executable, str(ROOT / "vllm" / "serve.py")]
            log = FOLDER / f"rl-{name.replace(' ', '-')}.log"
            server = programs.start(name, command, server_env(port, str(model), mode, CPU.settings), log)
            wait_until_ready({server: port}, START_SECONDS, say)
            found[name] = asyncio.run(ask(f"http://127.0.0.1:{port}", settings))
    return found


async def ask(url: str, settings: argparse.Namespace) -> list[Sample]:
    """The server's answers: every second one is asked for alone, then the others at once.

    Raises:
        Failure: an answer did not come, or lacks its token ids or logprobs.
    """
    from determinism.client import Server
    from determinism.errors import HarnessError, RequestFailed
    from determinism.protocol import Dialect, Request
    from determinism.settings import Target

    dialect = Dialect("completions", top_logprobs=0, vllm_fields=True)
    requests = [
        Request(PROMPTS[number % len(PROMPTS)], settings.max_tokens, settings.temperature, settings.seed + number)
        for number in range(settings.answers)
    ]
    try:
        async with Server(Target(url)) as server:
            lane = server.lane()
            answers = [await lane.ask(dialect, "demo", request) for request in requests[::2]]
            answers += await asyncio.gather(*(server.lane().ask(dialect, "demo", one) for one in requests[1::2]))
    except (HarnessError, RequestFailed) as error:
        raise Failure(f"{url}: {error}") from None
    if not all(answer.prompt_ids and answer.tokens and answer.logprobs for answer in answers):
        raise Failure(f"{url}: an answer lacks its token ids or logprobs")
    return [Sample(answer.prompt_ids, tuple(map(int, answer.tokens)), answer.logprobs) for answer in answers]


def measure(folder: Path, samples: Mapping[str, Sequence[Sample]]) -> Differences:
    logging.getLogger("vllm").setLevel(logging.ERROR)
    import llama_as_served

    model = llama_as_served.load(folder)
    names = tuple(llama_as_served.FORMS)

    @functools.cache
    def difference(server: str, forms: tuple[str, ...]) -> Difference:
        answers = [(one.prompt, one.tokens) for one in samples[server]]
        sampler = [logprob for one in samples[server] for logprob in one.logprobs]
        return compare(sampler, llama_as_served.logprobs(model, answers, forms))

    trainers = {SHIPPED: (), MODE: (llama_as_served.PRODUCTS,), SERVED: names}
    return Differences(
        pairs={server: {name: difference(server, forms) for name, forms in trainers.items()} for server in samples},
        steps={name: difference(OURS, names[: number + 1]) for number, name in enumerate(names)},
        without={name: difference(OURS, tuple(other for other in names if other != name)) for name in names},
    )


def print_table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A Markdown table."""
    widths = [max(map(len, column)) for column in zip(heading, *rows, strict=True)]
    say("")
    for row in (heading, ["-" * width for width in widths], *rows):
        say("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")


def tell(found: Differences, forms: Mapping[str, tuple[str, str]]) -> int:
    """Print both tables and the result; the exit status."""
    print_table(
        ("sampler", "trainer", "largest Δ", "mean Δ", "equal", "mean error of exp(Δ)"),
        [(server, name, *one.cells()) for server, row in found.pairs.items() for name, one in row.items()],
    )
    print_table(
        ("operation", "without", "as the server has it", "mean Δ from here on", "equal", "with all but it", "equal"),
        [
            (name, *forms[name], *found.steps[name].cells()[1:3], *found.without[name].cells()[1:3])
            for name in found.steps
        ],
    )
    left = found.pairs[OURS][SERVED]
    if left.differing == 0:
        say(f"\nZERO: all {left.tokens} logprobs of the {OURS} server and of the trainer are equal to the last bit")
        return 0
    say(f"\nLEFT: {left.differing} of {left.tokens} logprobs differ, by up to {left.largest:.2g}")
    return 1


class Parser(argparse.ArgumentParser):
    """Bad usage is one line and exit status 2."""

    def error(self, message: str) -> NoReturn:
        print(f"rl_logprobs: {message} (--help lists the settings)", file=sys.stderr)
        raise SystemExit(2)


def read_settings() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=16, help="answers of each server; default: %(default)s")
    parser.add_argument("--max-tokens", type=int, default=64, help="of each answer; default: %(default)s")
    parser.add_argument("--temperature", type=float, default=1.0, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the first answer; default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE, too")
    settings = parser.parse_args()
    for name, least, most in (("answers", 1, 256), ("max_tokens", 1, 1024), ("temperature", 0, 2), ("seed", 0, 10**9)):
        if not least <= (value := getattr(settings, name)) <= most:
            parser.error(f"--{name.replace('_', '-')}={value} is not valid: {least} to {most} is needed")
    # Told before the minutes that the measurement takes, not after them.
    if (file := settings.json) and (file.is_dir() or not os.access(file.absolute().parent, os.W_OK)):
        parser.error(f"--json={file} is not valid: a file in a folder that can be written to is needed")
    return settings


def run(settings: argparse.Namespace) -> int:
    if scale() is not CPU:
        raise Failure("vLLM's CPU build is needed, whose operations these forms are: `make install` installs it")
    FOLDER.mkdir(exist_ok=True)
    model = make_model(CPU.preset)
    samples = sample(model, settings)
    say("Computing the same tokens' logprobs with transformers")
    found = measure(model, samples)
    from llama_as_served import FORMS

    status = tell(found, FORMS)
    if settings.json:
        settings.json.write_text(json.dumps(asdict(found), indent=1) + "\n", encoding="utf-8")
    return status


def main() -> int:
    settings = read_settings()
    return run_command("rl_logprobs", lambda: run(settings), (Failure, OSError, subprocess.CalledProcessError))


if __name__ == "__main__":
    raise SystemExit(main())
