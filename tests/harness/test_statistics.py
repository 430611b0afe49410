"""A server that differs once in N is caught as often as theory says: 1 - (1 - 1/N)^n of n answers."""

import asyncio
import math

import pytest
from determinism.client import Server
from determinism.errors import EXIT_FAIL
from determinism.probe import probe
from determinism.runner import run
from determinism.session import judge
from determinism.settings import Settings, Target
from determinism.tally import Tally
from determinism.workload import Workload

FIRST_COPY = 2


class Nowhere:
    """Progress that nobody looks at."""

    def alone(self, done: int, total: int) -> None: ...

    def begin(self, requests: int, concurrency: int) -> None: ...

    def answered(self, batch: int, done: int, size: int, failed: int) -> None: ...


async def runs(server, count: int, requests: int, concurrency: int) -> list[Tally]:
    """That many whole runs one after the other, each with a server that counts its requests anew."""
    found = []
    target = Target(server.url)
    settings = Settings(target, requests, concurrency, max_tokens=4, prompts=("one two",), background=0)
    async with Server(target) as ours:
        offer = await probe(ours.lane(), settings)
        for _ in range(count):
            server.requests = FIRST_COPY - 1
            tally = Tally("logprobs", requests)
            await run(ours, offer, Workload(settings, offer), tally, Nowhere())
            found.append(tally)
    return found


def probability(successes: int, trials: int, p: float) -> float:
    """Two-sided tail of the binomial distribution: how surprising that many successes, or more surprising ones, are."""
    point = math.exp(log_binomial(successes, trials, p))
    return sum(q for k in range(trials + 1) if (q := math.exp(log_binomial(k, trials, p))) <= point * (1 + 1e-9))


def log_binomial(k: int, n: int, p: float) -> float:
    if p in (0.0, 1.0):
        return 0.0 if k == n * p else -math.inf
    choose = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return choose + k * math.log(p) + (n - k) * math.log(1 - p)


@pytest.mark.parametrize("fault", ["logprob", "token"])
@pytest.mark.parametrize(("one_in", "requests"), [(20, 20), (100, 20)])
def test_a_rare_fault_is_caught_as_often_as_theory_says(serve, fault, one_in, requests):
    trials = 150
    server = serve(rates={fault: 1 / one_in}, faults_from=FIRST_COPY, seed=one_in)
    tallies = asyncio.run(runs(server, trials, requests, 5))
    caught = sum(judge(tally).exit_code == EXIT_FAIL for tally in tallies)
    expected = 1 - (1 - 1 / one_in) ** requests
    assert probability(caught, trials, expected) > 1e-4
    assert sum(tally.diverged for tally in tallies) == server.faults_given, "each that was given was seen, and no other"


def test_the_bound_would_notice_a_harness_that_misses_every_third(serve):
    """The twin: the statistics above can fail."""
    expected = 1 - (1 - 1 / 20) ** 20
    assert probability(round(150 * expected * 2 / 3), 150, expected) < 1e-4


def test_a_server_without_a_fault_is_never_caught(serve):
    tallies = asyncio.run(runs(serve(), 150, 20, 5))
    assert {tally.diverged for tally in tallies} == {0}
    assert {tally.identical for tally in tallies} == {20}
