"""How likely this load would have caught a server that is not deterministic: an estimate, where there is no control.

The server that is imagined is plain vLLM as it was measured (docs/power.md): in company it computes the first tokens
of an answer as alone; at each token there is a chance, HAZARD, that a rounding falls otherwise. From there on every
logprob is a little other, by a normal distribution with the standard deviation NOISE, and stays so, since what follows
is computed from it. So

- logprobs are seen to differ unless no token of any answer was touched: 1 - (1 - HAZARD) ** tokens;
- a greedy token is seen to differ where it was touched and its lead over the next one was smaller than the noise:
  the chance of that, 0.5 * erfc(lead / (NOISE * sqrt(2))), is what near-ties are for.

Copies of a prompt are met by much the same company and part alike, so a prompt counts once however often it was asked.
Requests that were never in company count for nothing. Both constants are the smallest that were measured, so that real
servers are caught more often than the estimate says.
"""

import math
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from .protocol import Answer, Request
from .tally import Tally

HAZARD = 0.04
"""The chance that a token is the first of an answer whose logprobs are other in company than alone."""
NOISE = 0.01
"""Standard deviation of a touched token's logprob, in nats."""
COMPANY = 2.0
"""Requests in flight, on the average, from which a request is in company."""


@dataclass(frozen=True)
class Power:
    """An estimate and what it was made of.

    Attributes:
        value: the probability; None where nothing can be said.
        level: what is compared.
        tokens: of all prompts' answers alone.
        near_ties: those that NOISE could turn into another token; None without logprobs.
        in_flight: requests that the server had at a time, on the average over the load.
    """

    value: float | None
    level: str
    tokens: int
    near_ties: int | None
    in_flight: float

    def to_json(self) -> dict[str, Any]:
        return {
            "estimate": self.value,
            "tokens": self.tokens,
            "near_ties": self.near_ties,
            "in_flight": self.in_flight,
            "hazard": HAZARD,
            "noise": NOISE,
        }

    def explanation(self) -> list[str]:
        """The reasoning, a sentence a line."""
        found = [
            f"{self.in_flight:.1f} requests were in flight at a time, and the answers alone are {self.tokens} tokens"
        ]
        if self.near_ties is None:
            return [
                *found,
                "The server gives no logprobs, so nearly tied tokens are not known and nothing can be estimated",
            ]
        if self.in_flight < COMPANY:
            return [*found, f"Fewer than {COMPANY:g} at a time are no company that could change an answer"]
        if self.level == "logprobs":
            found.append(f"Plain vLLM's logprobs part from those alone at one token in {1 / HAZARD:.0f}, or sooner")
        else:
            near = f"{self.near_ties} of them lead the next token by less than {2 * NOISE:g}"
            found.append(f"{near}, and plain vLLM moves logprobs by about {NOISE:g}")
        return found


def estimate(tally: Tally, requests: list[Request]) -> Power:
    """The estimate for a run that has ended; `requests` are the prompts' as they were asked alone."""
    answers = [
        (prompt.alone, request) for prompt, request in zip(tally.prompts, requests, strict=False) if prompt.requests
    ]
    tokens = sum(len(answer.tokens or ()) for answer, _ in answers)
    busy = math.fsum(tally.loaded_latencies) + tally.other_seconds
    in_flight = busy / tally.loaded_seconds if tally.loaded_seconds > 0 else 0.0
    if any(answer.logprobs is None for answer, _ in answers) or not answers:
        return Power(None, tally.level, tokens, None, in_flight)
    chances = [changes(answer, request) for answer, request in answers]
    near_ties = sum(lead < 2 * NOISE for answer, _ in answers for lead in leads(answer))
    unseen = [1 - HAZARD] * tokens if tally.level == "logprobs" else [1 - chance for row in chances for chance in row]
    value = 1 - math.prod(unseen) if in_flight >= COMPANY else 0.0
    return Power(value, tally.level, tokens, near_ties, in_flight)


def changes(answer: Answer, request: Request) -> list[float]:
    """By token, the chance that it is another in company, given that the ones before it are the same."""
    touched = accumulate(range(len(answer.logprobs or ())), lambda before, _: before * (1 - HAZARD), initial=1 - HAZARD)
    if request.temperature > 0:
        flips = [drawn_otherwise(logprob) for logprob in answer.logprobs or ()]
    else:
        flips = [0.5 * math.erfc(lead / (NOISE * math.sqrt(2))) for lead in leads(answer)]
    return [(1 - not_yet) * flip for not_yet, flip in zip(touched, flips, strict=False)]


def drawn_otherwise(logprob: float) -> float:
    """With a fixed seed a token changes about as often as its probabilities move: the total variation distance that
    NOISE on each logit makes is at most 0.4 * NOISE, and nothing where one token has all the probability."""
    return 0.4 * NOISE * (1 - math.exp(logprob))


def leads(answer: Answer) -> list[float]:
    """By token, how far the likeliest token's logprob is above the next one's; at least 0.

    Where the server gave no alternative, the next one has at most all the probability that is left.
    """
    found = []
    for index, logprob in enumerate(answer.logprobs or ()):
        top = answer.top_logprobs[index] if answer.top_logprobs else ()
        if len(top) > 1:
            found.append(max(0.0, top[0] - top[1]))
        else:
            rest = -math.expm1(min(0.0, logprob))
            found.append(max(0.0, logprob - math.log(rest)) if rest > 0 else math.inf)
    return found
