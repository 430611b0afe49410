"""What ``tune`` has measured so far, a line each, so that a run that was stopped or killed goes on.

JSON Lines: first what the measurements hold for, then points and tiles that must not be tried again. A line that was
cut off is dropped. One process at a time holds the file.
"""

from __future__ import annotations

import fcntl
import json
import logging
from collections.abc import Mapping
from dataclasses import astuple
from pathlib import Path
from typing import Any

from batch_invariant_ops.tiles import Tile
from batch_invariant_ops.tuning.search import Found, Point

logger = logging.getLogger(__name__)
FORMAT = 4


class Unusable(Exception):
    """The journal is another process's, or holds another card's or version's measurements."""


class Journal:
    """The journal in a file, which is made where there is none.

    Args:
        path: the file.
        facts: what its measurements hold for: the card, versions, type.
        fresh: forget what is in it.

    Attributes:
        found: what was measured, by point.
        unfit: tiles that hung or crashed, and why.

    Raises:
        Unusable: see there.
        OSError: the file or its folder cannot be made or written.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any], fresh: bool = False) -> None:
        self.path = path
        self.found: dict[Point, Found] = {}
        self.unfit: dict[Tile, str] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a+b")  # noqa: SIM115 - held, with its lock, until close
        try:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Unusable(f"{path} is in use by another tune") from None
            if fresh:
                self._file.truncate(0)
            self._read({"format": FORMAT} | json.loads(json.dumps(facts)))
        except BaseException:
            self._file.close()
            raise

    def _read(self, facts: dict[str, Any]) -> None:
        self._file.seek(0)
        content = self._file.read()
        whole, _, rest = content.rpartition(b"\n")
        if rest:
            logger.warning("%s: its last line is cut off, and is dropped", self.path)
            self._file.truncate(len(content) - len(rest))
        lines = whole.split(b"\n") if whole else []
        if not lines:
            self._append(facts)
            return
        self._check(lines[0], facts)
        for number, line in enumerate(lines[1:], 2):
            try:
                self._take(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError):
                logger.warning("%s: its line %d cannot be read, and is dropped", self.path, number)

    def _check(self, line: bytes, facts: dict[str, Any]) -> None:
        try:
            before = json.loads(line)
            different = [f"{name} {before.get(name)!r}, not {now!r}" for name, now in facts.items()
                         if before.get(name) != now]  # fmt: skip
        except (ValueError, AttributeError):
            different = ["a first line that cannot be read"]
        if different:
            raise Unusable(f"{self.path} was measured with {', '.join(different)}; --fresh forgets it")

    def _take(self, entry: dict[str, Any]) -> None:
        if "unfit" in entry:
            self.unfit[Tile(*entry["unfit"])] = str(entry["why"])
            return
        times = {Tile(*tile): float(time) for tile, time in entry["times"]}
        best = Tile(*entry["best"])
        if best not in times or not all(0 < time < float("inf") for time in times.values()):
            raise ValueError
        point = Point(**{name: int(entry[name]) for name in ("n", "k", "m")})
        over = entry["over_vendor"]
        if over is not None and not 0 < over < float("inf"):
            raise ValueError
        rank = entry["vendor_rank"]
        if type(rank) is not int or rank < 0:
            raise ValueError
        self.found[point] = Found(best, times, int(entry["skipped"]), float(entry["seconds"]), over, rank)

    def add(self, point: Point, found: Found) -> None:
        """Keep a finished point."""
        self.found[point] = found
        times = [[astuple(tile), round(time, 3)] for tile, time in found.times.items()]
        about = {
            "skipped": found.skipped, "seconds": round(found.seconds, 3), "over_vendor": found.over_vendor,
            "vendor_rank": found.vendor_rank,
        }  # fmt: skip
        self._append({"n": point.n, "k": point.k, "m": point.m, "best": astuple(found.best), **about, "times": times})

    def avoid(self, tile: Tile, why: str) -> None:
        """Keep that a tile hung or crashed, so that no later run waits for it."""
        self.unfit[tile] = why
        self._append({"unfit": astuple(tile), "why": why})

    def _append(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(entry).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Let another process have the file."""
        self._file.close()
