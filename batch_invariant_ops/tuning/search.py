"""The fastest of many tiles in little time: all are timed once, the better ones more often, the best in turns."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from batch_invariant_ops.tiles import Tile

Measure = Callable[[Tile, int], float]
"""(tile, rounds) → median microseconds of one GEMM over that many rounds; raises :class:`Unfit`, :class:`OtherBits`."""

RUNGS = ((None, 1, 1), (12, 3, 1), (4, 3, 3))
"""(tiles that are left, rounds each time, times): turns at last, so that a card that grows warm is fair to all."""


class Unfit(Exception):
    """A tile that cannot be used on this card: it does not compile, does not launch, or never ends."""


class OtherBits(Exception):
    """A tile whose result is not the fixed tile's: it broke the contract that no tile changes a bit."""


class NothingRan(Exception):
    """Not one tile could be measured."""


@dataclass(frozen=True, order=True)
class Point:
    """One GEMM, x [m, k] · w [n, k]ᵀ."""

    n: int
    k: int
    m: int

    def __str__(self) -> str:
        return f"N={self.n} K={self.k} M={self.m}"


@dataclass(frozen=True)
class Found:
    """What was measured at one point.

    Attributes:
        best: the fastest tile.
        times: microseconds of every tile that ran.
        skipped: how many did not.
        seconds: that the search took.
        over_vendor: the best tile's time over that of the vendor's GEMM; None where that one gave other bits.
        vendor_rank: the place in the vendor's order of the kernel that this was.
    """

    best: Tile
    times: dict[Tile, float]
    skipped: int = 0
    seconds: float = 0.0
    over_vendor: float | None = None
    vendor_rank: int = 0


def search(
    tiles: Sequence[Tile],
    measure: Measure,
    least: int = 1,
    until: float = float("inf"),
    clock: Callable[[], float] = time.monotonic,
    told: Callable[[int, int], None] = lambda done, total: None,
) -> Found:
    """The fastest of ``tiles``, the first ``least`` of which are measured even when ``clock()`` is past ``until``.

    Raises:
        NothingRan: all of them are unfit.
        OtherBits: from ``measure``; one such tile ends the search.
    """
    start = clock()
    alive = list(dict.fromkeys(tiles))
    total = sum(min(len(alive), keep or len(alive)) * passes for keep, _, passes in RUNGS)
    done = skipped = 0
    times: dict[Tile, float] = {}
    for keep, rounds, passes in RUNGS:
        alive = alive[:keep]
        samples: dict[Tile, list[float]] = defaultdict(list)
        for _ in range(passes):
            for number, tile in enumerate(tuple(alive)):
                if keep is None and number >= least and clock() > until:
                    break
                try:
                    samples[tile].append(measure(tile, rounds))
                except Unfit:
                    skipped += 1
                    alive.remove(tile)
                    times.pop(tile, None)
                done += 1
                told(done, total)
        alive = [tile for tile in alive if samples[tile]]
        times |= {tile: statistics.median(samples[tile]) for tile in alive}
        alive.sort(key=lambda tile: times[tile])
    if not alive:
        raise NothingRan(f"none of {skipped} tiles could be measured")
    return Found(alive[0], times, skipped, clock() - start)
