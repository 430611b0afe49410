"""Which server answers: what it says that its bits depend on, and whether it is one server all along."""

from dataclasses import dataclass, field
from typing import Any

import httpx

from .client import Lane
from .errors import Refused, RequestFailed, RunFailed, Unreachable
from .probe import Offer
from .protocol import Answer

ENDPOINT = "/batch_invariant/fingerprint"
HEADER = "x-batch-invariant-fingerprint"
Change = tuple[str, Any, Any]
"""A field, its value before, its value now; None where it is missing."""


@dataclass(frozen=True)
class Identity:
    """fingerprint: a digest, None where the server gives none. fields: what it is made of; empty where unknown."""

    fingerprint: str | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    vllm: str | None = None

    @property
    def promises(self) -> bool:
        """Whether the server says that its answers do not depend on what else it serves."""
        return (self.fingerprint or "").startswith("bi-")

    @property
    def says_plain(self) -> bool:
        return (self.fingerprint or "").startswith("plain-")


async def identify(lane: Lane, offer: Offer) -> Identity:
    """What the server says of itself: at this kit's endpoint, or else in `system_fingerprint`."""
    try:
        content = await lane.get(ENDPOINT)
    except (RequestFailed, Refused, Unreachable):
        content = {}
    digest, fields = content.get("fingerprint"), content.get("fields")
    if not isinstance(digest, str) or not isinstance(fields, dict):
        return Identity(offer.fingerprint, {}, offer.version)
    known = {str(name): value for name, value in fields.items() if isinstance(value, str | int | bool | None)}
    return Identity(digest, known, offer.version)


class Watch:
    """Sees to it that all answers come from one server, as far as the answers tell."""

    def __init__(self) -> None:
        self.seen: set[tuple[str | None, str | None]] = set()
        self._header: dict[int, str | None] = {}

    def over(self, lane: Lane) -> Lane:
        """The lane, whose responses' headers are looked at from now on."""

        async def look(response: httpx.Response) -> None:
            self._header[id(lane)] = response.headers.get(HEADER)

        lane.http.event_hooks = {"response": [look]}
        return lane

    def check(self, lane: Lane, answer: Answer) -> None:
        """Take note of who gave this answer.

        Raises:
            RunFailed: another server than the one that gave those before it.
        """
        self.seen.add((self._header.get(id(lane)), answer.fingerprint))
        if len(self.seen) > 1:
            names = sorted({str(body or header) for header, body in self.seen})
            raise RunFailed(
                f"the answers bear {len(self.seen)} fingerprints ({', '.join(names)}): the server was changed in"
                " between, or more than one answers at this address"
            )


def changes(before: Identity, now: Identity) -> list[Change]:
    """What differs, by name; the digest alone where not both tell what it is made of."""
    names = sorted({*before.fields, *now.fields}) if before.fields and now.fields else []
    found = [(name, before.fields.get(name), now.fields.get(name)) for name in names]
    found = [change for change in found if change[1] != change[2]]
    if not found and before.fingerprint != now.fingerprint:
        found.append(("fingerprint", before.fingerprint, now.fingerprint))
    if before.vllm != now.vllm and "vllm" not in names:
        found.append(("vllm", before.vllm, now.vllm))
    return found
