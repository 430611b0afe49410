"""How far long work is: one line that is written over on a terminal, a plain line now and then in a log."""

from __future__ import annotations

import sys
import time
from typing import TextIO


class Progress:
    """Work of several parts, each told as ``done`` of ``total``.

    Args:
        weights: how much of the whole each part is.
        stream: where to; standard error by default, so that results can be piped.
        every: seconds between two lines in a log.
    """

    def __init__(self, weights: list[float], stream: TextIO | None = None, every: float = 10.0) -> None:
        self.weights = weights
        self.stream = stream or sys.stderr
        self.every = every
        self.start = self.last = time.monotonic()
        self.live = self.stream.isatty()
        self.shown = 0

    def update(self, part: int, name: str, done: float, total: float, share: float | None = None) -> None:
        """Part number ``part`` is at ``done`` of ``total``, ``share`` of its work (their quotient by default)."""
        now = time.monotonic()
        if now - self.last < (0.1 if self.live else self.every):
            return
        self.last = now
        share = done / total if share is None else share
        whole = (sum(self.weights[:part]) + self.weights[part] * share) / (sum(self.weights) or 1)
        elapsed = now - self.start
        left = f", {clock(elapsed / whole - elapsed)} left" if whole > 0.01 else ""
        counted = f"{done:g} of {total:g}"
        self._show(f"[{part + 1}/{len(self.weights)}] {name}: {counted} ({whole:.0%} of all, {clock(elapsed)}{left})")

    def line(self, text: str) -> None:
        """A line that stays."""
        self.clear()
        print(text, file=self.stream, flush=True)

    def clear(self) -> None:
        """Take the passing line away."""
        if self.live and self.shown:
            self.stream.write("\r" + " " * self.shown + "\r")
            self.stream.flush()
            self.shown = 0

    def _show(self, text: str) -> None:
        if not self.live:
            print(text, file=self.stream, flush=True)
            return
        self.stream.write("\r" + text.ljust(self.shown))
        self.stream.flush()
        self.shown = len(text)


def clock(seconds: float) -> str:
    """1:05 for 65 seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
