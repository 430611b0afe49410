"""What is asked: prompts of many lengths, copies of them in a shuffled order, and other traffic beside."""

import itertools
import random
import secrets
from collections.abc import Iterator
from dataclasses import dataclass

from .errors import UsageError
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
    """One request of the load: a copy of the prompt with that index, or a request among them that is not compared."""

    prompt_id: int | None
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
    """The requests of one run. The same settings, offer and seed give the same requests in the same order.

    A mode is a subclass: it changes which prompts there are, how they are asked, and what is sent among them.
    """

    count = GENERATED_PROMPTS
    """Prompts that are generated where the user gives none."""
    endless = False

    def __init__(self, settings: Settings, offer: Offer) -> None:
        """
        Raises:
            UsageError: `settings.only` names no prompt.
        """
        self.settings = settings
        self.offer = offer
        self.seed = settings.seed
        self._salt = secrets.token_hex(8)  # a run with the same seed must not find this one's prompts in the cache
        self.prompts = list(settings.prompts or self.generated())[: settings.requests]
        if settings.only is not None:
            if settings.only > len(self.prompts):
                raise UsageError("--only", settings.only, f"there are {len(self.prompts)} prompts in this mode")
            self.prompts = [self.prompts[settings.only - 1]]

    @property
    def longest_words(self) -> int:
        """The longest generated prompt. Half of the context is left, since words are not tokens."""
        context, answer = self.offer.context, self.settings.max_tokens
        tokens = LONGEST_UNKNOWN if context is None else min(LONGEST_TOKENS, (context - answer) // 2)
        return max(1, int(tokens / self.offer.tokens_per_word))

    def lengths(self) -> list[int]:
        """Words of each generated prompt, spread evenly on a log scale."""
        longest = self.longest_words
        shortest = min(longest, max(1, int(SHORTEST_TOKENS / self.offer.tokens_per_word)))
        steps = [index / max(1, self.count - 1) for index in range(self.count)]
        return [round(shortest * (longest / shortest) ** step) for step in steps]

    def generated(self) -> list[str]:
        generator = random.Random(f"prompts {self.seed}")
        return [text(generator, words) for words in self.lengths()]

    def request(self, prompt_id: int, salt: str) -> Request:
        return Request(self.prompts[prompt_id], self.settings.max_tokens, cache_salt=f"{self._salt} {salt}")

    def alone(self, prompt_id: int) -> Request:
        """The request that the server gets alone."""
        return self.request(prompt_id, f"alone {prompt_id}")

    def copy(self, prompt_id: int, salt: str) -> Request:
        """The same request as it comes under load."""
        return self.request(prompt_id, salt)

    def order(self, generator: random.Random) -> Iterator[int | None]:
        """Which prompt each request of the load copies; None for one that is not compared."""
        while True:
            order = [index % len(self.prompts) for index in range(self.settings.requests)]
            generator.shuffle(order)
            yield from order

    def salt(self, index: int, prompt_id: int, generator: random.Random) -> str:
        """What keeps the copy's prompt from being found in the server's cache.

        Half of the copies have one of their own, so that their prompts are computed anew, in company; the rest may find
        their prefix there, as repeated requests do in practice.
        """
        return f"copy {index}" if generator.random() < 0.5 else f"alone {prompt_id}"

    def shots(self) -> Iterator[Shot]:
        """The load: as many requests as the settings say, in a shuffled order; without end where the mode has none."""
        generator = random.Random(f"order {self.seed}")
        fillers = self.background(-1)
        order = self.order(generator)
        for index, prompt_id in enumerate(order if self.endless else itertools.islice(order, self.settings.requests)):
            if prompt_id is None:
                yield Shot(None, next(fillers))
            else:
                yield Shot(prompt_id, self.copy(prompt_id, self.salt(index, prompt_id, generator)))

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
