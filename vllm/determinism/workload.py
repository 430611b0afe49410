"""What is asked: prompts of many lengths, copies of them in a shuffled order, and other traffic beside."""

import random
import secrets
from collections.abc import Iterator
from dataclasses import dataclass

from .probe import Offer
from .protocol import Request
from .settings import Settings

VOCABULARY = (
    "time river light old city made small answer paper green question found winter road music seven stone learned "
    "garden number science window early doctor table forest north story market idea horse often machine water letter "
    "between color summer history village engine bread ocean simple mountain school glass travel morning silver theory "
    "and the of to in that with from because while under before after almost never always each another which whose "
    "built wrote carried opened measured changed kept followed counted turned began reached explained crossed asked"
)
WORDS = VOCABULARY.split()
GENERATED_PROMPTS = 8
SHORTEST_TOKENS, LONGEST_TOKENS = 6, 640
LONGEST_UNKNOWN = 320


@dataclass(frozen=True)
class Shot:
    """One request of the load: a copy of the prompt with that index."""

    prompt_id: int
    request: Request


def text(generator: random.Random, words: int) -> str:
    """Sentences of random words: their continuations are open, so that near-ties between tokens are frequent."""
    sentences: list[str] = []
    while words > 0:
        length = min(words, generator.randint(5, 14))
        sentences.append(" ".join(generator.choices(WORDS, k=length)).capitalize())
        words -= length
    return ". ".join(sentences)


class Workload:
    """The requests of one run. The same settings, offer and seed give the same requests in the same order."""

    def __init__(self, settings: Settings, offer: Offer) -> None:
        self.settings = settings
        self.offer = offer
        self.seed = settings.seed
        self._salt = secrets.token_hex(8)  # a run with the same seed must not find this one's prompts in the cache
        self.prompts = list(settings.prompts or self.generated())[: settings.requests]

    @property
    def longest_words(self) -> int:
        """The longest generated prompt. Half of the context is left, since words are not tokens."""
        context, answer = self.offer.context, self.settings.max_tokens
        tokens = LONGEST_UNKNOWN if context is None else min(LONGEST_TOKENS, (context - answer) // 2)
        return max(1, int(tokens / self.offer.tokens_per_word))

    def generated(self) -> list[str]:
        """Prompts whose lengths are spread evenly on a log scale."""
        generator = random.Random(f"prompts {self.seed}")
        longest = self.longest_words
        shortest = min(longest, max(1, int(SHORTEST_TOKENS / self.offer.tokens_per_word)))
        steps = [index / (GENERATED_PROMPTS - 1) for index in range(GENERATED_PROMPTS)]
        return [text(generator, round(shortest * (longest / shortest) ** step)) for step in steps]

    def alone(self, prompt_id: int) -> Request:
        """The request that the server gets alone."""
        return Request(self.prompts[prompt_id], self.settings.max_tokens, cache_salt=f"{self._salt} alone {prompt_id}")

    def shots(self) -> Iterator[Shot]:
        """The copies under load, in a shuffled order.

        Half of them have a salt of their own, so that their prompts are computed anew, in company; the rest may find
        their prefix in the server's cache, as repeated requests do in practice.
        """
        generator = random.Random(f"order {self.seed}")
        total = self.settings.requests
        order = [index % len(self.prompts) for index in range(total)]
        generator.shuffle(order)
        for index, prompt_id in enumerate(order):
            own = f"copy {index}" if generator.random() < 0.5 else f"alone {prompt_id}"
            request = Request(self.prompts[prompt_id], self.settings.max_tokens, cache_salt=f"{self._salt} {own}")
            yield Shot(prompt_id, request)

    def background(self, stream: int) -> Iterator[Request]:
        """Endless other traffic: random prompts, lengths and temperatures."""
        generator = random.Random(f"background {self.seed} {stream}")
        while True:
            words = round(self.longest_words ** generator.random())
            yield Request(
                text(generator, max(1, words)),
                max_tokens=generator.randint(1, max(1, self.settings.max_tokens)),
                temperature=generator.choice((0.0, 0.7, 1.0)),
            )
