"""The modes: what else, besides a load of many lengths, has been seen to change a server's answers."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from .errors import UsageError
from .probe import Offer
from .protocol import Request
from .settings import Settings
from .workload import Workload, text

NEEDLE_IN = 8
"""One request of so many is a needle."""
PREFIX_TOKENS = 2048
TEMPERATURE = 0.8


class Same(Workload):
    """One prompt, many copies."""

    count = 1

    def lengths(self) -> list[int]:
        return [max(1, round(self.longest_words**0.6))]


class Mixed(Workload):
    """Prompts of many lengths, with other traffic beside."""


class Needle(Same):
    """One known request, hidden at random places among random others, which are not compared."""

    def __init__(self, settings: Settings, offer: Offer) -> None:
        super().__init__(settings, offer)
        least = NEEDLE_IN * len(self.prompts)
        if settings.requests < least:
            raise UsageError(
                "--requests", settings.requests, f"--mode needle needs {least}, one of {NEEDLE_IN} a needle"
            )

    def order(self, generator: random.Random) -> Iterator[int | None]:
        hidden = 0
        while True:
            places: list[int | None] = [None] * NEEDLE_IN
            places[generator.randrange(NEEDLE_IN)] = hidden % len(self.prompts)
            hidden += 1
            yield from places


class Prefix(Workload):
    """Prompts that share beginnings of growing length, so that a prefix cache and chunks of a prompt come into play.

    Alone each prompt is computed whole; under load most find a beginning that another left in the server's cache.
    """

    @property
    def longest_words(self) -> int:
        context, answer = self.offer.context, self.settings.max_tokens
        if context is None:
            return super().longest_words
        return max(1, int(min(PREFIX_TOKENS, (context - answer) // 2) / self.offer.tokens_per_word))

    def generated(self) -> list[str]:
        generator = random.Random(f"prompts {self.seed}")
        whole = text(generator, self.longest_words).split()
        ends = [text(generator, 4) for _ in self.lengths()]
        return [" ".join([*whole[:words], end]) for words, end in zip(self.lengths(), ends, strict=True)]

    def salt(self, index: int, prompt_id: int, generator: random.Random) -> str:
        return f"copy {index}" if generator.random() < 0.25 else "shared"


class Stream(Workload):
    """Streamed answers against whole ones."""

    def copy(self, prompt_id: int, salt: str) -> Request:
        return replace(self.request(prompt_id, salt), stream=True)


class Seeded(Workload):
    """Drawn at a temperature, with a seed of each prompt's own."""

    def request(self, prompt_id: int, salt: str) -> Request:
        own = random.Random(f"seed {self.seed} {prompt_id}").randrange(2**31)
        return replace(super().request(prompt_id, salt), temperature=TEMPERATURE, seed=own)


class Restart(Workload):
    """Half of the load before a restart of the server, half of it after."""


class Soak(Workload):
    """Many prompts, for as long as --minutes says."""

    count = 32
    endless = True


@dataclass(frozen=True)
class Mode:
    """kind: its requests. needs: the option without which it cannot run."""

    kind: type[Workload]
    needs: str | None = None

    @property
    def summary(self) -> str:
        return (self.kind.__doc__ or "").split(".")[0]


MODES = {
    "same": Mode(Same),
    "mixed": Mode(Mixed),
    "needle": Mode(Needle),
    "prefix": Mode(Prefix),
    "stream": Mode(Stream),
    "seeded": Mode(Seeded),
    "restart": Mode(Restart, "--restart-command"),
    "soak": Mode(Soak, "--minutes"),
}
ALL = "all"


def chosen(settings: Settings) -> list[str]:
    """The modes to run, in turn: one, or for `all` each that has what it needs.

    Raises:
        UsageError: one lacks what it needs, or an option is given that none of them takes.
    """
    given = {"--restart-command": settings.restart_command, "--minutes": settings.minutes}
    if settings.mode == ALL:
        return [name for name, mode in MODES.items() if mode.needs is None or given[mode.needs] is not None]
    needs = MODES[settings.mode].needs
    if needs is not None and given[needs] is None:
        raise UsageError("--mode", settings.mode, f"it needs {needs}")
    for option, value in given.items():
        if value is not None and option != needs:
            raise UsageError(option, value, f"--mode {settings.mode} does not take it")
    return [settings.mode]


def workload(name: str, settings: Settings, offer: Offer) -> Workload:
    return MODES[name].kind(settings, offer)
