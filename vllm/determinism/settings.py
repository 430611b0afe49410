"""The settings of a run, checked."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Target:
    """A server: its address without a path below the API's, and how patient to be with it.

    timeout_s: for one request, from its first byte to its last. retries: for each request, over dropped connections and
    answers that say to come back later; the first waits backoff_s, each further one twice as long.
    """

    url: str
    api_key: str | None = field(default=None, repr=False)
    timeout_s: float = 600.0
    retries: int = 6
    backoff_s: float = 0.1
    longest_wait_s: float = 60.0


@dataclass(frozen=True)
class Settings:
    """What the user asks for; None leaves a choice to the server or to the harness."""

    target: Target
    requests: int = 100
    concurrency: int = 10
    max_tokens: int = 64
    seed: int = 0
    model: str | None = None
    level: str | None = None
    endpoint: str = "auto"
    prompts: tuple[str, ...] = ()
    background: int | None = None
    """Streams of other traffic beside the measured requests."""
    control: Target | None = None
    mode: str = "mixed"
    only: int | None = None
    """The one prompt to ask, counted from 1."""
    minutes: float | None = None
    """How long the mode soak goes on."""
    restart_command: str | None = None
    """What restarts the server, for the mode restart."""
    least_power: float = 0.9
    """A pass without a control stands from this estimate on; see power.py."""

    @property
    def background_streams(self) -> int:
        return max(1, self.concurrency // 4) if self.background is None else self.background
