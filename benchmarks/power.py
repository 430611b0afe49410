#!/usr/bin/env python3
"""How often a plain server is really caught, against how often the harness estimates that it is.

Against one server that is not deterministic, many small runs of the harness: each with prompts of its own, and with
another number of prompts, tokens and requests in flight. Each gives an estimate (determinism/power.py) and says whether
answers differed, in logprobs and in tokens.

    python3 benchmarks/power.py --url http://127.0.0.1:8000 --out benchmarks/results/power-cpu.csv

Runs are sorted by their estimate. An estimate that is right on the average has the same mean in a group of runs as the
share of them that was caught; one that is too small promises less than it gives.
"""

import argparse
import asyncio
import itertools
import random
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "vllm"))

from determinism.client import Server  # noqa: E402
from determinism.output import Silent  # noqa: E402
from determinism.power import estimate  # noqa: E402
from determinism.probe import Offer, probe  # noqa: E402
from determinism.runner import Progress, run  # noqa: E402
from determinism.settings import Settings, Target  # noqa: E402
from determinism.tally import Tally  # noqa: E402
from determinism.workload import Workload, text  # noqa: E402
from rounds import kept  # noqa: E402

PROMPTS, TOKENS, CONCURRENCY = (1, 2, 4, 8), (1, 2, 4, 8, 16, 32, 64), (4, 16)
COPIES = 4
"""Requests for each prompt."""
BOUNDS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 1.0)


def measure(url: str, seconds: float) -> Iterator[dict]:
    """A row a run and level, for about so long."""
    end = time.monotonic() + seconds
    target = Target(url)
    grid = itertools.cycle(itertools.product(PROMPTS, TOKENS, CONCURRENCY))
    for seed, (prompts, tokens, concurrency) in enumerate(grid):
        if (left := end - time.monotonic()) < 0:
            return
        settings = Settings(target, prompts * COPIES, concurrency, max_tokens=tokens, seed=seed, background=2)
        yield from asyncio.run(measure_once(settings, prompts, Silent(f"{seed} runs, {left:.0f} s left")))


async def measure_once(settings: Settings, prompts: int, progress: Progress) -> list[dict]:
    """A row a level of one run with so many prompts."""
    async with Server(settings.target) as server:
        offer = await probe(server.lane(), settings)
        workload = Workload(replace(settings, prompts=own_prompts(settings, offer, prompts)), offer)
        tally = Tally("logprobs", settings.requests)
        await run(server, offer, workload, tally, progress)
    alone = [workload.alone(number) for number in range(prompts)]
    rows = []
    for level in ("logprobs", "tokens"):
        tally.level = level
        found = estimate(tally, alone)
        rows.append(
            {"prompts": prompts, "tokens": settings.max_tokens, "concurrency": settings.concurrency,
             "seed": settings.seed, "level": level, "in_flight": round(found.in_flight, 2),
             "near_ties": found.near_ties, "estimate": found.value, "caught": int((tally.variants(level) or 1) > 1)}
        )  # fmt: skip
    return rows


def own_prompts(settings: Settings, offer: Offer, count: int) -> tuple[str, ...]:
    """So many prompts of the lengths that a run has, whichever they are."""
    generator = random.Random(f"power {settings.seed}")
    lengths = Workload(settings, offer).lengths()
    return tuple(text(generator, generator.choice(lengths)) for _ in range(count))


def summary(rows: list[dict]) -> Iterable[tuple[str, str, int, float, float]]:
    """(level, range of estimates, runs, mean estimate, share that was caught)."""
    for level in ("logprobs", "tokens"):
        of_level = [row for row in rows if row["level"] == level]
        for low, high in itertools.pairwise(BOUNDS):
            group = [row for row in of_level if low <= float(row["estimate"]) < high or high == float(row["estimate"])]
            if group:
                mean = statistics.fmean(float(row["estimate"]) for row in group)
                caught = statistics.fmean(int(row["caught"]) for row in group)
                yield level, f"{low:g} - {high:g}", len(group), mean, caught


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of a plain server (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=300.0, help="about how long (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/power.csv", help="the CSV to write")
    arguments = parser.parse_args()
    rows = list(kept(measure(arguments.url, arguments.seconds), arguments.out))
    print("\n| level | estimate | runs | mean estimate | caught |\n| --- | --- | --- | --- | --- |")
    for level, group, count, mean, caught in summary(rows):
        print(f"| {level} | {group} | {count} | {mean:.2f} | {caught:.2f} |")


if __name__ == "__main__":
    main()
