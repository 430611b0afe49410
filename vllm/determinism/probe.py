"""What a server offers: its model, its context, and the strictest level that answers can be compared at."""

from dataclasses import dataclass
from typing import Any

from .client import Lane
from .errors import LevelNotOffered, Refused, RequestFailed, Unreachable, UsageError
from .protocol import LEVELS, PATHS, Answer, Dialect, Request
from .settings import Settings

ALTERNATIVES = 5
PROBE_PROMPT = "The river was quiet in the morning, and the first boats"
PROBE_WORDS = 11


@dataclass(frozen=True)
class Offer:
    """A server's answer to the probe.

    context: the model's context in tokens, where the server says it. tokens_per_word: of ordinary English prompts.
    """

    model: str
    dialect: Dialect
    levels: tuple[str, ...]
    token_ids: bool
    context: int | None
    tokens_per_word: float
    version: str | None
    fingerprint: str | None

    @property
    def strictest(self) -> str:
        return self.levels[-1]

    def limits(self) -> str | None:
        """What the levels offered leave unseen, in a sentence; None where nothing is."""
        if self.strictest == "text":
            return "the server gives neither tokens nor logprobs: differences that the text hides are not seen"
        if self.strictest == "tokens":
            return "the server gives no logprobs: differences too small to change a token are not seen"
        if not self.token_ids:
            return "the server gives no token ids: tokens are told apart by their text"
        return None


async def probe(lane: Lane, settings: Settings, prefer: str | None = None) -> Offer:
    """Ask one short question in falling richness until the server takes it. `prefer` is the model to take, where the
    server has it, of several that it has.

    Raises:
        Refused: a wrong key, a model that is not served, or no form of request that the server takes.
        Unreachable: nothing answers.
        UsageError: several models are served, and none was named.
    """
    cards = await models(lane)
    names = [card["id"] for card in cards]
    if prefer is None or (names and prefer not in names and len(names) == 1):
        prefer = settings.model if prefer is None else None
    model, context = choose_model(cards, prefer)
    dialect, answer = await first_taken(lane, model, settings.endpoint)
    offered = LEVELS[: LEVELS.index(answer.level) + 1]
    prompt_tokens = answer.prompt_tokens or (len(answer.prompt_ids) if answer.prompt_ids else None)
    return Offer(
        model=model,
        dialect=dialect,
        levels=offered,
        token_ids=bool(answer.tokens) and all(isinstance(token, int) for token in answer.tokens or ()),
        context=context,
        tokens_per_word=max(0.5, prompt_tokens / PROBE_WORDS) if prompt_tokens else 1.5,
        version=await version(lane),
        fingerprint=answer.fingerprint,
    )


async def models(lane: Lane) -> list[dict[str, Any]]:
    """The served models' cards; none where the server has no such list."""
    try:
        content = await lane.get("/v1/models")
    except RequestFailed as error:
        if error.status in (404, 405, 501):
            return []
        raise Refused(f"{lane.server.target.url} gives no list of models: {error}") from None
    cards = content.get("data")
    if not isinstance(cards, list):
        return []
    return [card for card in cards if isinstance(card, dict) and isinstance(card.get("id"), str)]


def choose_model(cards: list[dict[str, Any]], wanted: str | None) -> tuple[str, int | None]:
    """The model to ask, and its context in tokens where the server says it."""
    names = [card["id"] for card in cards]
    if wanted is None:
        if not names:
            raise UsageError("--model", "", "the server lists no model, so one must be named")
        if len(names) > 1:
            raise UsageError("--model", "", f"the server has several, so one must be named: {', '.join(names)}")
        wanted = names[0]
    elif names and wanted not in names:
        raise UsageError("--model", wanted, f"the server has {', '.join(names)}")
    context = next((card.get("max_model_len") for card in cards if card["id"] == wanted), None)
    return wanted, context if type(context) is int and context > 0 else None


def forms(endpoint: str) -> list[Dialect]:
    """Every way to ask, the richest first: vLLM's own fields, then plain ones, then no logprobs."""
    richness = [
        (ALTERNATIVES, True),
        (1, True),
        (0, True),
        (None, True),
        (ALTERNATIVES, False),
        (1, False),
        (None, False),
    ]
    endpoints = list(PATHS) if endpoint == "auto" else [endpoint]
    return [Dialect(name, count, own) for name in endpoints for count, own in richness]


async def first_taken(lane: Lane, model: str, endpoint: str) -> tuple[Dialect, Answer]:
    """The richest form of request that the server takes, and its answer."""
    first_failure: RequestFailed | None = None
    missing: set[str] = set()
    for dialect in forms(endpoint):
        if dialect.endpoint in missing:
            continue
        try:
            return dialect, await lane.ask(dialect, model, Request(PROBE_PROMPT, max_tokens=4))
        except RequestFailed as error:
            first_failure = first_failure or error
            if error.status in (404, 405, 501):
                missing.add(dialect.endpoint)
            elif error.kind in ("dropped", "timeout", "busy", "nan"):
                break
    raise Refused(f"{lane.server.target.url} takes no form of completion request: {first_failure}")


async def stream_level(lane: Lane, offer: Offer, level: str, wanted: str | None) -> str:
    """The level that streamed answers can be compared at, no stricter than `level`.

    Raises:
        LevelNotOffered: the server streams no answer that can be compared, or less than the level that was asked for.
    """
    try:
        answer = await lane.ask(offer.dialect, offer.model, Request(PROBE_PROMPT, max_tokens=4, stream=True))
    except RequestFailed as error:
        raise LevelNotOffered(f"the server gives no stream that can be compared: {error}") from None
    offered = min(level, answer.level, key=LEVELS.index)
    if wanted is not None and offered != wanted:
        raise LevelNotOffered(f"--level={wanted!r} cannot be compared: the server's streams have {offered} alone")
    return offered


async def version(lane: Lane) -> str | None:
    """The release that a vLLM server names at /version."""
    try:
        found = (await lane.get("/version")).get("version")
    except (RequestFailed, Unreachable, Refused):
        return None
    return found if isinstance(found, str) else None


def compared_level(offer: Offer, wanted: str | None) -> str:
    """The level to compare at: the strictest offered, or the one that was asked for.

    Raises:
        LevelNotOffered: the server does not offer the one that was asked for; a weaker one is never taken silently.
    """
    if wanted is None:
        return offer.strictest
    if wanted not in offer.levels:
        raise LevelNotOffered(
            f"--level={wanted!r} cannot be compared: the server offers {', '.join(offer.levels)}"
            f" ({offer.limits()}); take one of them, or a server that gives more"
        )
    return wanted
