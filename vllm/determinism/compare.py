"""Are two answers equal, at which level, and where do they part first?"""

import hashlib
import struct
from array import array
from dataclasses import asdict, dataclass
from typing import Any

from .protocol import LEVELS, Answer


def digests(answer: Answer) -> dict[str, bytes]:
    """One digest a level that the answer offers; a stricter level's digest holds all that the ones before it hold.

    Logprobs enter as the bits of their doubles: -0.0 and 0.0 are two values here.
    """
    state = hashlib.blake2b(digest_size=16)
    state.update(f"{answer.finish_reason}\0{answer.text}".encode("utf-8", "surrogatepass"))
    found = {"text": state.digest()}
    if answer.tokens is not None:
        state.update(repr(answer.tokens).encode("utf-8", "surrogatepass"))
        found["tokens"] = state.digest()
        if answer.logprobs is not None:
            state.update(array("d", answer.logprobs).tobytes())
            for values in answer.top_logprobs:
                state.update(b"\0" + array("d", values).tobytes())
            found["logprobs"] = state.digest()
    return found


@dataclass(frozen=True)
class Divergence:
    """Where an answer leaves its prompt's answer alone. `a` is alone, `b` is under load.

    A token is an id, or its text where the server gives no ids; None past an answer's end. `token_index` is None where
    only the text can be compared, and `character` then counts the characters that are equal.
    """

    request: int
    prompt_id: int
    token_index: int | None
    token_a: int | str | None
    token_b: int | str | None
    logprob_a: float | None
    logprob_b: float | None
    difference: float | None
    ulps: int | None
    what: str
    character: int | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def single_bits(value: float) -> int | None:
    """The place of a float32 among all float32 values; None for a number that float32 does not hold."""
    try:
        packed = struct.pack("<f", value)
    except OverflowError:
        return None
    if struct.unpack("<f", packed)[0] != value:
        return None
    bits: int = struct.unpack("<i", packed)[0]
    return bits if bits >= 0 else -(bits & 0x7FFFFFFF)


def ulps(a: float, b: float) -> int | None:
    """How many float32 values lie between two float32 values; None unless both are float32 values."""
    place_a, place_b = single_bits(a), single_bits(b)
    return None if place_a is None or place_b is None else abs(place_a - place_b)


def common(a: Any, b: Any) -> int:
    """How many leading items two sequences share."""
    for index, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return index
    return min(len(a), len(b))


def item(sequence: tuple | None, index: int) -> Any:
    return sequence[index] if sequence is not None and index < len(sequence) else None


def bits(values: tuple[float, ...] | None) -> bytes:
    return array("d", values or ()).tobytes()


def first_difference(alone: Answer, loaded: Answer, level: str, request: int, prompt_id: int) -> Divergence | None:
    """The first place where two answers to one prompt part, looked for at `level`; None where they are equal there."""
    if digests(alone).get(level) == digests(loaded).get(level):
        return None
    index, what = None, "text"
    depth = LEVELS.index(level)
    if depth >= LEVELS.index("logprobs") and alone.logprobs is not None and loaded.logprobs is not None:
        index, what = first_logprob(alone, loaded)
    if depth >= LEVELS.index("tokens") and alone.tokens is not None and loaded.tokens is not None:
        shared = common(alone.tokens, loaded.tokens)
        if shared < max(len(alone.tokens), len(loaded.tokens)) and (index is None or shared <= index):
            index, what = shared, "token"
    if index is None:
        character = common(alone.text, loaded.text)
        what = "text" if character < max(len(alone.text), len(loaded.text)) else "finish reason"
        nothing = (None,) * 7
        return Divergence(request, prompt_id, *nothing, what=what, character=character)
    a, b = item(alone.logprobs, index), item(loaded.logprobs, index)
    if what == "alternatives":
        a, b = different(item(alone.top_logprobs, index) or (), item(loaded.top_logprobs, index) or ())
    return Divergence(
        request=request,
        prompt_id=prompt_id,
        token_index=index,
        token_a=item(alone.tokens, index),
        token_b=item(loaded.tokens, index),
        logprob_a=a,
        logprob_b=b,
        difference=None if a is None or b is None else abs(a - b),
        ulps=None if a is None or b is None else ulps(a, b),
        what=what,
    )


def different(a: tuple[float, ...], b: tuple[float, ...]) -> tuple[float | None, float | None]:
    index = common(a, b)
    return item(a, index), item(b, index)


def first_logprob(alone: Answer, loaded: Answer) -> tuple[int | None, str]:
    """The first token whose logprob, or one of whose alternatives' logprobs, has other bits."""
    a, b = alone.logprobs or (), loaded.logprobs or ()
    for index in range(min(len(a), len(b))):
        if bits(a[index : index + 1]) != bits(b[index : index + 1]):
            return index, "logprob"
        if bits(item(alone.top_logprobs, index)) != bits(item(loaded.top_logprobs, index)):
            return index, "alternatives"
    return None, "text"


def largest_difference(alone: Answer, loaded: Answer) -> float | None:
    """The largest |difference| of logprobs up to where the tokens part; None without logprobs.

    Where they part the contexts are still equal, so the alternatives' logprobs there still count.
    """
    if alone.logprobs is None or loaded.logprobs is None or alone.tokens is None or loaded.tokens is None:
        return None
    shared = common(alone.tokens, loaded.tokens)
    largest = max(
        (abs(a - b) for a, b in zip(alone.logprobs[:shared], loaded.logprobs[:shared], strict=False)), default=0.0
    )
    for a, b in zip(alone.top_logprobs[: shared + 1], loaded.top_logprobs[: shared + 1], strict=False):
        largest = max([largest, *(abs(x - y) for x, y in zip(a, b, strict=False) if x != y)])
    return largest
