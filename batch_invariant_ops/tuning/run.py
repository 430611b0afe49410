"""One run of ``tune``: every point that no journal holds, each in its share of the time, and the table of all."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from batch_invariant_ops import tiles
from batch_invariant_ops.ops import dependent
from batch_invariant_ops.tiles import SAFE, SPECIALISED, Table, Tile
from batch_invariant_ops.tuning import bands
from batch_invariant_ops.tuning.bench import Bench, OutOfMemory
from batch_invariant_ops.tuning.candidates import Card, candidates
from batch_invariant_ops.tuning.journal import Journal
from batch_invariant_ops.tuning.search import Found, NothingRan, Point, search

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024, 2048, 4096, 8192)
LARGEST_OUTPUT = 2**30
WINNERS = 3
"""Tiles that are handed on from the number of rows before."""
LAUNCHED = 4
"""Tiles that are tried launched the other way, too: by that they gain, or lose, by as much as they differ."""
FIRST_RUNG = 0.7
"""Of a point's time, for the first measurement of its tiles."""


def sizes(n: int, largest: int, asked: Iterable[int] = SIZES) -> list[int]:
    """The numbers of rows that are measured for a shape, none so large that its result is out of all proportion."""
    return [m for m in asked if m == 1 or (m <= largest and m * n <= LARGEST_OUTPUT)]


class Run:
    """All points of some shapes on one card.

    Args:
        bench: the card.
        journal: what was measured before, and where new points go.
        shapes: (N, K) of each.
        largest: M up to which is measured.
        seconds: that it may take, about: with less time fewer tiles are tried, but each point is measured.
        kept: a table whose tiles are the only ones that are tried, to see what of it and of the vendor's is faster;
            that takes so little that it is asked for the steps of prompts, too.

    Attributes:
        points: all that were asked for.
        missing: those that the journal does not hold.
    """

    def __init__(
        self, bench: Bench, journal: Journal, shapes: Sequence[tuple[int, int]], largest: int, seconds: float,
        clock: Callable[[], float] = time.monotonic, kept: Table | None = None,
    ) -> None:  # fmt: skip
        self.kept = kept
        self.bench, self.journal, self.largest, self.seconds, self.clock = bench, journal, largest, seconds, clock
        self.points = [Point(n, k, m) for n, k in dict.fromkeys(shapes) for m in self._sizes(n)]
        self.missing = [point for point in self.points if point not in journal.found]
        bench.unfit |= journal.unfit
        bench.avoid = journal.avoid

    def go(self, told: Callable[[int, Point, int, int], None], said: Callable[[str], None]) -> None:
        """Measure what is missing.

        Args:
            told: called with a missing point's number, the point, and how many of how many measurements are done.
            said: called with a line about each shape.

        Raises:
            OtherBits, Broken, NothingRan: see there. What was measured before is kept.
        """
        deadline = self.clock() + self.seconds
        new = [(point, self._new(point)) for point in self.missing]
        if self._launches:
            new += [(point, [_twin(tile) for tile in asked if tile.form == SPECIALISED]) for point, asked in new]
        for point, asked in new:
            self.bench.foresee(point, asked)
        number = 0
        for shape, group in itertools.groupby(self.missing, key=lambda point: (point.n, point.k)):
            begun, points = self.clock(), list(group)
            fit = self._fitting(points, said)
            for point in fit:
                self._measure(point, deadline, number, told)
                number += 1
            number += len(points) - len(fit)
            ratio = bands.over_fixed([self.journal.found[point] for point in fit])
            much = "" if ratio is None else f", {ratio:.2f} of the fixed tile's time"
            if fit:
                said(f"N={shape[0]} K={shape[1]}: {len(fit)} values of M{much} ({self.clock() - begun:.0f} s)")

    def table(self) -> Table:
        """Of the shapes that were asked for, and of those that the journal holds besides, if it holds all their M.

        Raises:
            NothingRan: no point was measured.
        """
        found = {point: what for point, what in self.journal.found.items() if self._whole(point.n, point.k)}
        if not found:
            raise NothingRan("not one point was measured")
        return bands.table(found, self.bench.card)

    def _whole(self, n: int, k: int) -> bool:
        asked = any((point.n, point.k) == (n, k) for point in self.points)
        return asked or all(Point(n, k, m) in self.journal.found for m in self._sizes(n))

    def _sizes(self, n: int) -> list[int]:
        return sizes(n, self.largest, SIZES if self.kept is None else sorted({*SIZES, *tiles.STEPS}))

    def _fitting(self, points: list[Point], said: Callable[[str], None]) -> list[Point]:
        """The points, ascending by M, up to the largest M for which there is memory."""
        while points:
            try:
                self.bench.shape(points[-1])
                break
            except OutOfMemory as error:
                said(f"{error}, which is left out")
                points = points[:-1]
        return points

    def _measure(
        self, point: Point, deadline: float, number: int, told: Callable[[int, Point, int, int], None]
    ) -> None:
        rest = sum(map(weight, self.missing[number:]))
        left = max(0.0, deadline - self.clock())
        share = left * weight(point) / rest
        first = list(dict.fromkeys(self._known(point)))
        tried = list(dict.fromkeys([*first, *self._new(point)]))
        told(number, point, 0, len(tried))
        # what is compiled for one point serves many, so the first may wait for more than its share
        there, failed = self.bench.point(point, tried, max(share, left / 4))
        share = max(0.0, deadline - self.clock()) * weight(point) / rest
        found = search(
            there, self.bench.measure,
            least=sum(tile in first for tile in there), until=self.clock() + FIRST_RUNG * share, clock=self.clock,
            told=lambda done, total: told(number, point, done, total),
        )  # fmt: skip
        if self._launches and self.clock() < deadline:
            found, unready = self._other_launch(point, found, share / 4)
            failed += unready
        ratio, rank = self.bench.over_vendor(found.best) or (None, 0)
        over_vendor = ratio and round(ratio, 3)
        skipped = found.skipped + failed
        self.journal.add(point, replace(found, skipped=skipped, over_vendor=over_vendor, vendor_rank=rank))

    def _other_launch(self, point: Point, found: Found, seconds: float) -> tuple[Found, int]:
        """The fastest tiles once more, launched either way; what was found then, and how many did not compile."""
        order = sorted(found.times, key=found.times.__getitem__)
        fastest = [tile for place, tile in enumerate(order) if _twin(tile) not in order[:place]][:LAUNCHED]
        twins = [_twin(tile) for tile in fastest]
        there, failed = self.bench.point(point, twins, seconds)
        if not there:
            return found, failed
        again = search([*fastest, *there], self.bench.measure, least=len(fastest) + len(there))
        skipped, took = found.skipped + again.skipped, found.seconds + again.seconds
        return replace(again, times=found.times | again.times, skipped=skipped, seconds=took), failed

    @property
    def _launches(self) -> bool:
        """Whether kernels can be launched in two ways here."""
        return self.bench.card.capability >= dependent.CAPABILITY

    def _known(self, point: Point) -> Iterator[Tile]:
        """The fixed tile and the winners nearby: those of fewer rows, of other shapes, and of the shipped tables.

        Of a table that is kept, its own tile alone.
        """
        if self.kept is not None:
            yield self.kept.tile(point.m, point.n, point.k)
            return
        yield SAFE
        found = self.journal.found
        before = [m for n, k, m in ((p.n, p.k, p.m) for p in found) if (n, k) == (point.n, point.k) and m < point.m]
        if before:
            times = found[Point(point.n, point.k, max(before))].times
            yield from sorted(times, key=lambda tile: times[tile])[:WINNERS]
        for other, what in found.items():
            if other.m == point.m:
                yield what.best
        yield from _shipped(self.bench.card, point)

    def _new(self, point: Point) -> list[Tile]:
        if self.kept is not None:
            return [*self._known(point)]
        return [SAFE, *candidates(point.m, point.n, point.k, self.bench.card)]


def _twin(tile: Tile) -> Tile:
    """The same, launched the other way."""
    return replace(tile, follows=not tile.follows)


def weight(point: Point) -> float:
    """What a point costs, in about the time that is lost on each: its own grows with the work."""
    return 1 + point.m * point.n * point.k / 1.5e12


def _shipped(card: Card, point: Point) -> Iterator[Tile]:
    """What would run if nothing were measured here, and what would run on other cards of its kind."""
    for path in tiles.shipped_for(card.gpu, card.capability):
        if path.is_file():
            yield tiles.read(path).tile(point.m, point.n, point.k)


def measurements(found: dict[Point, Found]) -> list[dict[str, float | int | None]]:
    """For people to read: microseconds of the chosen tile and of the fixed one at each point."""
    return [
        {"n": point.n, "k": point.k, "m": point.m, "us": round(what.times[what.best], 2),
         "fixed_us": round(what.times[SAFE], 2) if SAFE in what.times else None,
         "over_vendor": what.over_vendor, "vendor": what.vendor_rank}
        for point, what in sorted(found.items(), key=lambda item: item[0])
    ]  # fmt: skip
