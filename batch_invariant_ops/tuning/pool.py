"""Compiles many tiles at a time, in processes of which each may be killed when it takes too long."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Sequence
from dataclasses import astuple

from batch_invariant_ops.ops import matmul
from batch_invariant_ops.tiles import LINE, PLAIN, SPECIALISED, Tile
from batch_invariant_ops.tuning.candidates import Card
from batch_invariant_ops.tuning.child import Child, Gone
from batch_invariant_ops.tuning.search import Point

SECONDS = 60.0
MOST_WORKERS = 32
MODULE = "batch_invariant_ops.tuning.compiling"

Kernel = tuple[Tile, bool, bool, bool, bool]


class Pool:
    """Compilers for one card and type.

    Args:
        card: what they compile for.
        dtype: of the operands, as torch names it.
        workers: how many; by default one core is left to the process that measures.
        seconds: that one tile may take.
        module: what a worker runs.
    """

    def __init__(
        self, card: Card, dtype: str, workers: int | None = None, seconds: float = SECONDS, module: str = MODULE
    ) -> None:
        self.card, self.dtype, self.seconds, self.module = card, dtype, seconds, module
        self._waiting: dict[Kernel, Point] = {}
        self._begun: set[Kernel] = set()
        self._errors: dict[Kernel, str | None] = {}
        self._children: set[Child] = set()
        self._changed = threading.Condition()
        self._closed = False
        for _ in range(workers or max(1, min(MOST_WORKERS, len(os.sched_getaffinity(0)) - 1))):
            threading.Thread(target=self._work, daemon=True).start()

    def submit(self, point: Point, tiles: Iterable[Tile], urgent: bool = False) -> None:
        """Have tiles compiled, in this order, after all that was asked for before; before it where it is urgent."""
        with self._changed:
            new = {kernel: point for tile in tiles if (kernel := _kernel(point, tile)) not in self._begun}
            rest = {kernel: its for kernel, its in self._waiting.items() if kernel not in new}
            self._waiting = new | rest if urgent else self._waiting | {k: new[k] for k in new if k not in self._waiting}
            self._changed.notify_all()

    def ready(self, point: Point, tiles: Sequence[Tile], seconds: float) -> tuple[list[Tile], dict[Tile, str]]:
        """Those of ``tiles`` that are compiled within ``seconds``, and those that cannot be, with the reason.

        The first is waited for as long as it takes.
        """
        self.submit(point, tiles, urgent=True)
        kernels = {tile: _kernel(point, tile) for tile in tiles}
        with self._changed:
            self._changed.wait_for(lambda: kernels[tiles[0]] in self._errors or self._closed, 2 * self.seconds)
            self._changed.wait_for(lambda: self._errors.keys() >= {*kernels.values()} or self._closed, seconds)
            done = {tile: self._errors[kernel] for tile, kernel in kernels.items() if kernel in self._errors}
        return [tile for tile in done if done[tile] is None], {tile: error for tile, error in done.items() if error}

    def close(self) -> None:
        """End all workers."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            children = [*self._children]
        for child in children:
            child.stop()

    def _work(self) -> None:
        child = None
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    break
                kernel, point = next(iter(self._waiting.items()))
                del self._waiting[kernel]
                self._begun.add(kernel)
                if child is None:
                    child = Child(self.module)
                    self._children.add(child)
            error = self._compile(child, kernel[0], point)
            with self._changed:
                self._errors[kernel] = error
                if child.ended:
                    self._children.discard(child)
                    child = None
                self._changed.notify_all()
        if child is not None:
            child.kill()

    def _compile(self, child: Child, tile: Tile, point: Point) -> str | None:
        """What went wrong, or None."""
        question = {"m": point.m, "n": point.n, "k": point.k, "dtype": self.dtype, "tile": astuple(tile)}
        try:
            return child.ask(self.seconds, capability=self.card.capability, **question).get("error")
        except Gone as error:
            return f"its compiler: {error}"


def _kernel(point: Point, tile: Tile) -> Kernel:
    """What Triton compiles anew for: points that agree in it share a kernel."""
    if tile.form != PLAIN and matmul.copies(point.n, point.k):
        return tile, True, True, tile.form != SPECIALISED or point.k % LINE == 0, False
    return tile, point.n % 16 == 0, point.k % 16 == 0, point.k % tile.k == 0, point.n * point.k >= 2**31
