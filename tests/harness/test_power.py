"""The estimate is what its model of a server says, and a pass that it does not bear is none."""

import json
import math
import random
from dataclasses import replace

import pytest
from determinism.power import COMPANY, HAZARD, NOISE, changes, estimate, leads
from determinism.protocol import Answer, Request
from determinism.tally import Tally
from fake_server import single
from harness_kit import SHORT

GREEDY, DRAWN = Request("a", 8), Request("a", 8, temperature=0.8, seed=1)


def answer(*steps: tuple[float, ...]) -> Answer:
    """An answer of one token a step, from the largest logprobs of each."""
    tokens, logprobs = tuple(range(len(steps))), tuple(step[0] for step in steps)
    return Answer("a" * len(steps), "length", tokens, logprobs, steps)


def tally(level: str, answers: list[Answer], in_flight: float = 10.0) -> Tally:
    found = Tally(level, len(answers))
    for index, one in enumerate(answers):
        one.seconds = 1.0
        found.add_alone(one)
        found.add(index + 1, index, one)
    found.loaded_seconds = len(answers) / in_flight
    return found


def value(level: str, answers: list[Answer], in_flight: float = 10.0, request: Request = GREEDY) -> float | None:
    return estimate(tally(level, answers, in_flight), [request] * len(answers)).value


CLEAR, TIED = (-0.001, -7.0), (-0.7, -0.7)


def test_logprobs_are_seen_to_differ_unless_no_token_was_touched():
    assert value("logprobs", [answer(*[CLEAR] * 20)]) == pytest.approx(1 - (1 - HAZARD) ** 20)
    assert value("logprobs", [answer(*[CLEAR] * 20)] * 3) == pytest.approx(1 - (1 - HAZARD) ** 60)


def test_tokens_are_seen_to_differ_by_their_near_ties_alone():
    assert value("tokens", [answer(*[CLEAR] * 64)]) < 1e-9
    tied = value("tokens", [answer(*[CLEAR] * 50, TIED)])
    assert tied == pytest.approx((1 - (1 - HAZARD) ** 51) / 2)
    assert value("tokens", [answer(*[CLEAR] * 50, TIED, TIED)]) > tied
    found = estimate(tally("tokens", [answer(CLEAR, TIED)]), [GREEDY])
    assert found.near_ties == 1


def test_copies_of_a_prompt_count_once():
    one = tally("logprobs", [answer(*[CLEAR] * 5)])
    for number in range(2, 50):
        one.add(number, 0, answer(*[CLEAR] * 5))
    assert estimate(one, [GREEDY]).value == pytest.approx(1 - (1 - HAZARD) ** 5)


def test_requests_that_were_alone_are_worth_nothing():
    assert value("logprobs", [answer(*[CLEAR] * 200)], COMPANY - 0.1) == 0
    assert value("logprobs", [answer(*[CLEAR] * 200)], COMPANY + 0.1) > 0.99


def test_without_logprobs_nothing_is_known():
    bare = replace(answer(CLEAR), logprobs=None, top_logprobs=())
    assert value("tokens", [bare]) is None
    assert value("logprobs", []) is None


def test_a_lead_is_bounded_where_no_alternative_was_given():
    assert leads(answer((math.log(0.9),))) == [pytest.approx(math.log(9))]
    assert leads(answer((0.0,))) == [math.inf]
    assert leads(answer((math.log(0.3),))) == [0.0]
    assert leads(answer((-1.0, -0.5))) == [0.0]


def test_with_a_seed_certain_tokens_do_not_change():
    assert value("tokens", [answer((0.0, -50.0))], request=DRAWN) == 0
    assert 0 < value("tokens", [answer((-0.7, -0.7))], request=DRAWN) < HAZARD * NOISE


def simulated(steps: list[tuple[float, float]], level: str, trials: int) -> float:
    """The share of runs of a simulated server that are caught: touched from a random token on, then noise at each."""
    generator = random.Random(level)
    caught = 0
    for _ in range(trials):
        touched = False
        for first, second in steps:
            touched = touched or generator.random() < HAZARD
            if touched and (level == "logprobs" or first + generator.gauss(0, NOISE) < second):
                caught += 1
                break
    return caught / trials


@pytest.mark.parametrize(("level", "least_lead"), [("logprobs", 0.0), ("tokens", 2 * NOISE)])
def test_a_server_that_is_as_the_model_says_is_caught_as_often(level, least_lead):
    """Tokens are taken to change independently, which holds while each of them seldom does."""
    generator = random.Random(0)
    steps = [(-0.7, -0.7 - least_lead - NOISE * generator.random()) for _ in range(24)]
    trials = 20_000
    expected = value(level, [answer(*steps)])
    assert 0.02 < expected < 0.9
    assert abs(simulated(steps, level, trials) - expected) < 4 * math.sqrt(expected * (1 - expected) / trials) + 0.01


def test_the_model_can_tell_chances_by_token():
    chances = changes(answer(TIED, TIED, CLEAR), GREEDY)
    assert chances[:2] == [pytest.approx(HAZARD / 2), pytest.approx((1 - (1 - HAZARD) ** 2) / 2)]
    assert chances[2] < 1e-12


class TestVerdict:
    def found(self, harness, server, tmp_path, *options: str):
        path = tmp_path / "result.json"
        done = harness(server, *SHORT, *options, "--json", str(path))
        return done, json.loads(path.read_text())

    def test_a_load_too_small_is_inconclusive_and_says_what_it_is_worth(self, serve, harness, tmp_path):
        done, content = self.found(harness, serve(), tmp_path, "--max-tokens", "1")
        assert (done.returncode, content["verdict"]) == (3, "inconclusive")
        assert "✓" not in done.stdout.split("Results:")[1]
        assert content["power"]["estimate"] == pytest.approx(1 - (1 - HAZARD) ** 8)
        assert f"Power: {content['power']['estimate']:.3f}, the estimated probability" in done.stdout
        assert "with a probability of 0.28 only" in done.stdout

    def test_the_threshold_can_be_set_and_left_out(self, serve, harness, tmp_path):
        for least, status in (("0.2", 0), ("0.5", 3), ("0", 0)):
            done, _ = self.found(harness, serve(), tmp_path, "--max-tokens", "1", "--min-power", least)
            assert done.returncode == status

    def test_one_at_a_time_is_no_load(self, serve, harness, tmp_path):
        done, content = self.found(harness, serve(), tmp_path, "--concurrency", "1", "--background", "0")
        assert (done.returncode, content["power"]["estimate"]) == (3, 0.0)
        assert "no company that could change an answer" in done.stdout

    def test_a_control_that_was_caught_needs_no_estimate(self, serve, harness, tmp_path):
        control = serve(rates={"token": 0.5}, faults_from=25)
        done, content = self.found(harness, serve(), tmp_path, "--max-tokens", "1", "--control-url", control.url)
        assert (done.returncode, content["power"]) == (0, None)

    def test_a_failure_stays_one(self, serve, harness, tmp_path):
        server = serve(rates={"token": 0.5}, faults_from=25)
        assert self.found(harness, server, tmp_path, "--max-tokens", "1")[0].returncode == 1

    def test_a_lead_that_the_server_gives_is_used(self):
        assert leads(answer((single(-0.5), single(-0.75)))) == [pytest.approx(0.25)]
