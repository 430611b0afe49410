"""What a run has seen so far: distinct outputs by prompt, what differs from alone, what was never answered."""

from collections import Counter
from dataclasses import dataclass, field

from .compare import Divergence, digests, first_difference, largest_difference
from .errors import RequestFailed
from .protocol import LEVELS, Answer

KEPT = 100
"""Divergences and failures kept in full; the rest are counted."""


@dataclass
class PromptTally:
    """One prompt: its answer alone, and how often each distinct output came."""

    prompt_id: int
    alone: Answer
    counts: dict[str, Counter[bytes]] = field(default_factory=dict)
    requests: int = 0
    identical: int = 0

    def __post_init__(self) -> None:
        self.own = digests(self.alone)
        self.counts = {level: Counter({digest: 1}) for level, digest in self.own.items()}

    def variants(self, level: str) -> int | None:
        """Distinct outputs, the one alone among them; None where the level is not offered."""
        return len(self.counts[level]) if level in self.counts else None

    @property
    def prompt_tokens(self) -> int | None:
        return self.alone.prompt_tokens or (len(self.alone.prompt_ids) if self.alone.prompt_ids else None)


@dataclass
class Tally:
    """A run's result at one level. Requests are counted from 1, in the order in which they were sent."""

    level: str
    planned: int
    prompts: list[PromptTally] = field(default_factory=list)
    answered: int = 0
    failures: list[tuple[int, RequestFailed]] = field(default_factory=list)
    failed: int = 0
    divergences: list[Divergence] = field(default_factory=list)
    diverged: int = 0
    logprob_differences: list[float] = field(default_factory=list)
    solo_latencies: list[float] = field(default_factory=list)
    loaded_latencies: list[float] = field(default_factory=list)
    solo_seconds: float = 0.0
    loaded_seconds: float = 0.0
    others: int = 0
    """Requests among the copies that are not compared."""
    other_seconds: float = 0.0
    """Seconds of all requests under load that are not compared, added up."""
    background_requests: int = 0
    background_failed: int = 0
    response_ids: set[str] = field(default_factory=set)
    repeated_ids: int = 0
    fingerprints: set[str] = field(default_factory=set)

    def add_alone(self, answer: Answer) -> None:
        """The next prompt's answer alone.

        Raises:
            RequestFailed: it cannot be compared at the run's level.
        """
        self._check(answer)
        self.prompts.append(PromptTally(len(self.prompts), answer))
        self.solo_latencies.append(answer.seconds)

    def add(self, request: int, prompt_id: int, answer: Answer) -> None:
        """An answer under load: counted, compared with its prompt's answer alone, and let go.

        Raises:
            RequestFailed: it cannot be compared, or belongs to another prompt.
        """
        prompt = self.prompts[prompt_id]
        self._check(answer, prompt.alone)
        self.answered += 1
        prompt.requests += 1
        self.loaded_latencies.append(answer.seconds)
        found = digests(answer)
        for level, counter in prompt.counts.items():
            if level in found:
                counter[found[level]] += 1
        difference = largest_difference(prompt.alone, answer)
        if difference is not None:
            self.logprob_differences.append(difference)
        if found[self.level] == prompt.own[self.level]:
            prompt.identical += 1
            return
        self.diverged += 1
        if len(self.divergences) < KEPT:
            parted = first_difference(prompt.alone, answer, self.level, request, prompt_id)
            if parted is not None:
                self.divergences.append(parted)

    def add_other(self, answer: Answer) -> None:
        """An answer to a request among the copies that is not compared."""
        self.others += 1
        self.other_seconds += answer.seconds

    def add_failure(self, request: int, error: RequestFailed) -> None:
        self.failed += 1
        if len(self.failures) < KEPT:
            self.failures.append((request, error))

    def _check(self, answer: Answer, alone: Answer | None = None) -> None:
        if LEVELS.index(answer.level) < LEVELS.index(self.level):
            raise RequestFailed("malformed", f"an answer without {self.level}, which the server gave before")
        if alone is not None and of_another_prompt(answer, alone):
            raise RequestFailed("replaced", "an answer to another prompt than the one that was sent")
        if answer.fingerprint is not None:
            self.fingerprints.add(answer.fingerprint)
        if answer.response_id:
            self.repeated_ids += answer.response_id in self.response_ids
            self.response_ids.add(answer.response_id)

    def variants(self, level: str) -> int | None:
        """The largest number of distinct outputs that any one prompt gave; None where the level is not offered."""
        numbers = [number for prompt in self.prompts if (number := prompt.variants(level)) is not None]
        return max(numbers, default=None)

    @property
    def seen(self) -> int:
        """Requests of the load that were answered or failed."""
        return self.answered + self.others + self.failed

    @property
    def identical(self) -> int:
        return sum(prompt.identical for prompt in self.prompts)

    @property
    def unique_outputs(self) -> int:
        return self.variants(self.level) or 0

    @property
    def compared_tokens(self) -> int:
        """Tokens, or characters where there are no tokens, of the answers alone: nothing compared proves nothing."""
        return sum(len(p.alone.text if p.alone.tokens is None else p.alone.tokens) for p in self.prompts)

    def first(self) -> Divergence | None:
        """The divergence of the earliest request."""
        return min(self.divergences, key=lambda found: found.request, default=None)


def of_another_prompt(answer: Answer, alone: Answer) -> bool:
    """Whether the two are known to be of different prompts; a server may say less of its prompt in a stream."""
    pairs = (answer.prompt_ids, alone.prompt_ids), (answer.prompt_tokens, alone.prompt_tokens)
    return any(None not in pair and pair[0] != pair[1] for pair in pairs)
