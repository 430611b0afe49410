"""The GPU as the search sees it: tiles are made ready, and measured; what hangs or crashes is unfit, nothing more."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import astuple
from typing import Any

from batch_invariant_ops.ops import cublaslt
from batch_invariant_ops.tiles import SAFE, Tile
from batch_invariant_ops.tuning.candidates import Card
from batch_invariant_ops.tuning.child import Child, Gone
from batch_invariant_ops.tuning.pool import Pool
from batch_invariant_ops.tuning.search import OtherBits, Point, Unfit

MODULE = "batch_invariant_ops.tuning.measuring"
START_SECONDS = 180.0
TIME_SECONDS = 20.0
TURNS = ROUNDS = 3
FINALISTS = 3
BETTER = 0.98
"""Of the time of the vendor's own choice, from which on another of its kernels is taken."""
RESTARTS = 8


class Broken(Exception):
    """The GPU cannot be measured on: its process does not start, or no longer stays."""


class OutOfMemory(Exception):
    """A shape's operands do not fit into the card's memory."""


class Bench:
    """A card, the process that measures on it, and those that compile for it.

    Args:
        dtype: of the operands, as torch names it.
        start: makes the process that measures.
        seconds: that one measurement may take.

    Attributes:
        card: what it is.
        avoid: told of tiles that hung or crashed.

    Raises:
        Broken: see there.
    """

    def __init__(
        self, dtype: str, start: Callable[[], Child] = lambda: Child(MODULE), seconds: float = TIME_SECONDS
    ) -> None:
        self.dtype, self.seconds = dtype, seconds
        self.avoid: Callable[[Tile, str], None] = lambda tile, why: None
        self.unfit: dict[Tile, str] = {}
        self._start = start
        self._child: Child | None = None
        self._pool: Pool | None = None
        self._largest: Point | None = None
        self._point: Point | None = None
        self._restarts = 0
        facts = self._ask("card")
        self.card = Card(**facts | {"capability": tuple(facts["capability"])})

    def foresee(self, point: Point, tiles: Sequence[Tile]) -> None:
        """Tiles that will be asked for at a point, to be compiled when nothing else is."""
        self._compilers().submit(point, tiles)

    def shape(self, largest: Point) -> None:
        """Make the operands of one shape, for up to as many rows.

        Raises:
            Broken, OutOfMemory: see there.
        """
        self._largest, self._point = largest, None
        self._make()

    def point(self, point: Point, tiles: Sequence[Tile], seconds: float) -> tuple[list[Tile], int]:
        """Go to a point of the shape, and wait for its tiles, the first of which is waited for longer.

        Returns:
            The tiles that are there within ``seconds``, in their order, and the number of those that do not compile.
        """
        fit = [tile for tile in tiles if tile not in self.unfit]
        there, errors = self._compilers().ready(point, fit, seconds) if fit else ([], {})
        self._point = point
        self._ask("point", m=point.m)
        return there, len(errors) + len(tiles) - len(fit)

    def measure(self, tile: Tile, rounds: int) -> float:
        """Median microseconds of one call, over as many rounds.

        Raises:
            Unfit: the tile does not run here.
            OtherBits: it gives other bits than the fixed tile.
            Broken: the process that measures does not come back.
        """
        if tile in self.unfit:
            raise Unfit(self.unfit[tile])
        self._go_back()
        try:
            said = self._ask("time", self.seconds, tile=astuple(tile), rounds=rounds)
        except Broken as error:
            said = {"crash": str(error)}
        if "other" in said:
            raise OtherBits(f"{tile} at {self._point}: {said['other']} elements differ from those of {SAFE}")
        if "crash" in said:
            self.unfit[tile] = said["crash"]
            self.avoid(tile, said["crash"])
            self._restart(said["crash"])
            raise Unfit(said["crash"])
        if "unfit" in said:
            raise Unfit(said["unfit"])
        return said["us"]

    def over_vendor(self, tile: Tile) -> tuple[float, int] | None:
        """A tile's time over the vendor's, in turns, and the place of the vendor's fastest kernel in its own order.

        None where the vendor gives other bits here.

        Raises:
            Unfit, OtherBits, Broken: see :meth:`measure`.
        """
        first: dict[int, float] = {}
        for rank in range(cublaslt.KERNELS):
            said = self._vendor(rank)
            if "us" in said:
                first[rank] = said["us"]
            elif "other" not in said:
                break
        finalists = {*sorted(first, key=first.__getitem__)[:FINALISTS], *({0} & first.keys())}
        ours: list[float] = []
        theirs: dict[int, list[float]] = {rank: [] for rank in finalists}
        for _ in range(TURNS):
            ours.append(self.measure(tile, ROUNDS))
            for rank in finalists:
                if "us" in (said := self._vendor(rank)):
                    theirs[rank].append(said["us"])
        times = {rank: statistics.median(us) for rank, us in theirs.items() if us}
        if not times:
            return None
        rank = min(times, key=times.__getitem__)
        if times[rank] > BETTER * times.get(0, math.inf):
            rank = 0
        return statistics.median(ours) / times[rank], rank

    def _vendor(self, rank: int) -> dict[str, Any]:
        self._go_back()
        said = self._ask("time", self.seconds, tile=rank, rounds=ROUNDS)
        if "crash" in said:
            self._restart(said["crash"])
        return said

    def close(self) -> None:
        """End all processes."""
        if self._pool is not None:
            self._pool.close()
        if self._child is not None:
            self._child.kill()

    def _compilers(self) -> Pool:
        if self._pool is None:
            self._pool = Pool(self.card, self.dtype)
        return self._pool

    def _go_back(self) -> None:
        """Have a process that measures, at the point: one that was ended had been there."""
        if self._child is None:
            self._make()
            self._ask("point", m=self._point.m if self._point else 1)

    def _make(self) -> None:
        if (to := self._largest) is not None and self._ask("shape", n=to.n, k=to.k, m=to.m, dtype=self.dtype):
            raise OutOfMemory(f"N={to.n} K={to.k}: too little memory for M = {to.m}")

    def _restart(self, why: str) -> None:
        if self._child is not None:
            self._child.kill()
        self._child = None
        self._restarts += 1
        if self._restarts > RESTARTS:
            raise Broken(f"the process that measures ended {self._restarts} times, at last: {why}")

    def _ask(self, do: str, limit: float = START_SECONDS, **question: Any) -> dict[str, Any]:
        if self._child is None:
            self._child = self._start()
        try:
            return self._child.ask(limit, do=do, **question)
        except Gone as error:
            self._child = None
            raise Broken(f"the process that measures: {error}") from None
