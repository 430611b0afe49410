"""What the user reads: progress while the run goes on, then the results.

The text down to the line with the check mark has a fixed shape that scripts may rely on; more comes only below it.
"""

import sys
from typing import Any, TextIO

from .client import Counters
from .compare import Divergence
from .power import Power
from .probe import Offer
from .settings import Settings
from .tally import Tally
from .verdict import Verdict

RULE = "─" * 64
GREEN, RED, YELLOW, PLAIN = "\033[32m", "\033[31m", "\033[33m", "\033[0m"


class Screen:
    """Writes to one stream; colours and lines that renew themselves only where it is a terminal."""

    def __init__(self, stream: TextIO, colour: bool = True, quiet: bool = False) -> None:
        self.stream = stream
        self.terminal = stream.isatty()
        self.colour = colour and self.terminal
        self.quiet = quiet
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")

    def line(self, text: str = "") -> None:
        self.stream.write(("\r\033[K" if self.terminal else "") + text + "\n")
        self.stream.flush()

    def unfinished(self, text: str) -> None:
        if self.terminal and not self.quiet:
            self.stream.write("\r\033[K" + text)
            self.stream.flush()

    def painted(self, colour: str, text: str) -> None:
        self.line(f"{colour}{text}{PLAIN}" if self.colour else text)

    # Progress, as the runner knows it

    def alone(self, done: int, total: int) -> None:
        self.unfinished(f"Each prompt alone: {done}/{total}" if done < total else "")

    def begin(self, settings: Settings, endless: bool) -> None:
        if not self.quiet:
            load = f"for {settings.minutes:g} minutes" if endless else f"with {settings.requests} requests"
            self.line(f"Testing determinism {load} ({settings.concurrency} concurrent)")

    def answered(self, batch: int, done: int, size: int, failed: int) -> None:
        if self.quiet:
            return
        text = f"Sending batch {batch} ({size} requests)..."
        if done < size:
            self.unfinished(f"{text} {done}/{size}")
        else:
            self.line(f"{text} ✗ ({failed} not answered)" if failed else f"{text} ✓")


class Silent:
    """Progress that is shown nowhere but, on a terminal, as one line on stderr."""

    def __init__(self, title: str, stream: TextIO | None = None) -> None:
        self.title = title
        self.screen = Screen(stream or sys.stderr)
        self.total = 0
        self.size = 1

    def alone(self, done: int, total: int) -> None:
        self.screen.unfinished(f"{self.title}: each prompt alone, {done}/{total}")

    def begin(self, settings: Settings, endless: bool) -> None:
        self.total = 0 if endless else settings.requests
        self.size = settings.requests if endless else settings.concurrency

    def answered(self, batch: int, done: int, size: int, failed: int) -> None:
        count = (batch - 1) * self.size + done
        of = f"/{self.total}" if self.total else ""
        self.screen.unfinished("" if count == self.total else f"{self.title}: {count}{of}")


def token(value: int | str | None) -> str:
    return "none, the answer has ended" if value is None else str(value) if isinstance(value, int) else repr(value)


def number(value: float | None) -> str:
    return "none" if value is None else repr(value)


def print_difference(screen: Screen, tally: Tally, found: Divergence, words: dict[int, str]) -> None:
    """Where the earliest differing answer leaves its prompt's answer alone."""
    prompt = tally.prompts[found.prompt_id]
    length = "" if prompt.prompt_tokens is None else f", {prompt.prompt_tokens} tokens"
    screen.line()
    screen.line(f"First difference: request {found.request} (prompt {found.prompt_id + 1}{length})")
    if found.token_index is None:
        screen.line(f"  in the {found.what}, after {found.character} equal characters")
        return

    def name(value: int | str | None) -> str:
        text = words.get(value) if isinstance(value, int) else None
        return token(value) if text is None else f"{value} ({text!r})"

    screen.line(f"  token index:  {found.token_index}, in the {of_what(found)}")
    screen.line(f"  alone:        token {name(found.token_a)}, logprob {number(found.logprob_a)}")
    screen.line(f"  under load:   token {name(found.token_b)}, logprob {number(found.logprob_b)}")
    if found.difference is not None:
        ulps = "" if found.ulps is None else f", {found.ulps} float32 ulps"
        screen.line(f"  difference:   {found.difference:.3g}{ulps}")


def of_what(found: Divergence) -> str:
    return "logprob of an alternative token" if found.what == "alternatives" else found.what


def print_results(screen: Screen, tally: Tally, verdict: Verdict, words: dict[int, str], repeat: str) -> None:
    """The part of the fixed shape, and where the first answer parts; `repeat` is the command that asks that again."""
    if screen.quiet:
        print_verdict(screen, verdict)
        return
    screen.line(RULE)
    screen.line()
    screen.line("Results:")
    partial = f" of {tally.planned} (partial)" if verdict.partial else ""
    screen.line(f"  Total requests: {tally.seen}{partial}")
    screen.line(f"  Unique outputs: {tally.unique_outputs}")
    screen.line()
    print_verdict(screen, verdict)
    if (first := tally.first()) is not None:
        print_difference(screen, tally, first, words)
        screen.line(f"  to repeat it: {repeat}")


def print_verdict(screen: Screen, verdict: Verdict) -> None:
    if verdict.kind == "pass":
        screen.painted(GREEN, "✓ SUCCESS: All outputs are identical (deterministic)!")
    elif verdict.kind == "fail":
        screen.painted(RED, f"✗ FAILURE: {verdict.reason}")
    else:
        screen.painted(YELLOW, f"? INCONCLUSIVE: {verdict.reason}")


def seconds(values: list[float]) -> str:
    if not values:
        return "none"
    ordered = sorted(values)
    return f"median {ordered[len(ordered) // 2]:.2f} s, longest {ordered[-1]:.2f} s"


def print_details(screen: Screen, tally: Tally, offer: Offer, counters: Counters) -> None:
    """Everything else that the run saw, below the results."""

    def row(name: str, value: object) -> None:
        screen.line(f"  {name + ':':<22}{value}")

    def count(level: str) -> str:
        found = tally.variants(level)
        return "not offered" if found is None else str(found)

    screen.line()
    screen.line("Details:")
    row("Model", offer.model + (f", vLLM {offer.version}" if offer.version else ""))
    row("Compared", f"{tally.level} (the server offers {', '.join(offer.levels)})")
    if (limits := offer.limits()) is not None:
        row("Limits", limits)
    lengths = [prompt.prompt_tokens for prompt in tally.prompts if prompt.prompt_tokens is not None]
    spread = f", {min(lengths)} to {max(lengths)} tokens long" if lengths else ""
    row("Prompts", f"{len(tally.prompts)}{spread}; unique outputs are those of the prompt that has most")
    for level in ("text", "tokens", "logprobs"):
        row(f"{level.removesuffix('s').capitalize()} variants", count(level))
    row("Identical to solo", f"{tally.identical} of {tally.answered}")
    if tally.others:
        row("Among others", f"{tally.others} requests that are not compared")
    if tally.logprob_differences:
        row("Largest difference", f"{max(tally.logprob_differences):.3g} between logprobs under load and alone")
    busy = f"{counters.retried_busy} answers to come back later"
    row("Retried", f"{counters.retried_connections} dropped connections, {busy}")
    row("Other traffic", f"{tally.background_requests} requests beside, {tally.background_failed} failed")
    row("Alone", f"{tally.solo_seconds:.1f} s; {seconds(tally.solo_latencies)}")
    row("Under load", f"{tally.loaded_seconds:.1f} s; {seconds(tally.loaded_latencies)}")


def print_control(screen: Screen, control: dict[str, Any]) -> None:
    """What the control showed."""
    caught = "caught" if control["verdict"] == "fail" else "NOT caught"
    same = f"{control['identical_to_solo']} of {control['answered']} answers identical to solo"
    screen.line()
    screen.line(f"Control at {control['url']}: {caught} ({same}): {control['reason']}")
    variants = f"{control['token_variants']} token variants, {control['logprob_variants']} logprob variants"
    screen.line(f"  {variants}, {control['loaded_seconds']:.1f} s under load")


def print_power(screen: Screen, power: Power) -> None:
    """What a load without a control is worth, by estimate."""
    screen.line()
    screen.line("Control: none; --control-url takes a plain server of the same model.")
    value = "unknown" if power.value is None else "over 0.999" if power.value > 0.999 else f"{power.value:.3f}"
    screen.line(f"Power: {value}, the estimated probability that this load would have caught plain vLLM")
    for line in power.explanation():
        screen.line(f"  {line}.")


def print_summary(screen: Screen, rows: list[tuple[str, Verdict, Tally]], verdict: Verdict) -> None:
    """The modes side by side, and what they say together."""
    if not screen.quiet:
        screen.line()
        screen.line(RULE)
        screen.line()
        screen.line(f"{'Mode':<10}{'Verdict':<14}{'Identical to solo':<20}Variants")
        for name, found, tally in rows:
            same = f"{tally.identical} of {tally.answered}"
            screen.line(f"{name:<10}{found.kind.upper():<14}{same:<20}{tally.unique_outputs}")
        screen.line()
    print_verdict(screen, verdict)
