"""A tile table of what was measured: for each shape, which tile up to which number of rows, and where it won."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from batch_invariant_ops.tiles import NO_LIMIT, SAFE, Bands, Ranges, Ranks, Table, Tile
from batch_invariant_ops.tuning.candidates import Card
from batch_invariant_ops.tuning.search import Found, Point

NEAR = 1.02
"""A neighbour's tile no slower than this is kept: each further tile is one more kernel that a server compiles."""

WORTH = 0.98
"""Of the vendor's time, from which on ours is worth it: a table serves all cards of its name, and no two are alike."""

Costs = dict[Tile, float]


def table(found: Mapping[Point, Found], card: Card) -> Table:
    """The table of all points; rows between two measured M run the larger one's tile, those beyond the last its.

    Raises:
        ValueError: there is no point.
    """
    by_shape: dict[tuple[int, int], dict[int, Costs]] = {}
    wins: dict[tuple[int, int], dict[int, bool]] = {}
    kernels: dict[tuple[int, int], dict[int, int]] = {}
    for point, what in sorted(found.items(), key=lambda item: item[0]):
        costs = {tile: time / what.times[what.best] for tile, time in what.times.items()}
        by_shape.setdefault((point.n, point.k), {})[point.m] = costs
        won = what.over_vendor is not None and what.over_vendor <= WORTH
        wins.setdefault((point.n, point.k), {})[point.m] = won
        kernels.setdefault((point.n, point.k), {})[point.m] = what.vendor_rank
    if not by_shape:
        raise ValueError("nothing was measured")
    shapes = {shape: bands(costs) for shape, costs in by_shape.items()}
    faster = {shape: ranges(won) for shape, won in wins.items()}
    fastest: dict[tuple[int, int], Ranks] = {shape: (*by_rows.items(),) for shape, by_rows in kernels.items()}
    return Table(card.capability, card.gpu, ((NO_LIMIT, SAFE),), shapes, faster, card.cublas, fastest)


def ranges(won: Mapping[int, bool]) -> Ranges:
    """(first M, last M) of what was won; rows between two measured M count as the larger one, those beyond as the last.

    >>> ranges({1: True, 2: True, 4: False, 8: True})
    ((1, 2), (5, 4611686018427387904))
    """
    found: list[tuple[int, int]] = []
    before = 0
    for m in sorted(won):
        if won[m]:
            found.append((found.pop()[0] if found and found[-1][1] == before else before + 1, m))
        before = m
    if found and found[-1][1] == before:
        found.append((found.pop()[0], NO_LIMIT))
    return tuple(found)


def bands(costs: Mapping[int, Costs]) -> Bands:
    """(largest M, tile), neighbours with one tile merged, from each measured M's costs, which are 1 for its best."""
    found: list[tuple[int, Tile]] = []
    for m in sorted(costs):
        here = costs[m]
        tile = min(here, key=lambda tile: (here[tile], repr(tile)))
        if found and here.get(found[-1][1], math.inf) <= NEAR * here[tile]:
            tile = found.pop()[1]
        found.append((m, tile))
    return (*found[:-1], (NO_LIMIT, found[-1][1]))


def over_fixed(found: Iterable[Found]) -> float | None:
    """The geometric mean of the chosen tiles' times over the fixed tile's; None where that one never ran."""
    ratios = [what.times[what.best] / what.times[SAFE] for what in found if SAFE in what.times]
    return math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else None
