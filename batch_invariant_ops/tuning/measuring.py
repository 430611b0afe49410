"""The process that has the GPU: compares a tile's bits with the fixed tile's, and times it.

    {"do": "card"}                                                → facts of :class:`.candidates.Card`
    {"do": "shape", "n": ..., "k": ..., "m": the largest, "dtype": ...} → {} or {"memory": true}
    {"do": "point", "m": ...}                                     → {}
    {"do": "time", "tile": [...], "rounds": ...} → {"us": ...}, {"other": elements that differ}, {"unfit": "why"}
                                                   or {"crash": "why"}, after which the process ends

With a number in a tile's place, it is the vendor's kernel of that place in its own order.

A round is a few calls one after the other, timed by CUDA events. They walk through copies of the weights that together
exceed the L2 cache, as a model's layers do, and wait in the queue until all are there, so that the host's time is not
measured.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from batch_invariant_ops import certificates, vendor
from batch_invariant_ops.ops import matmul, vendor_gemm
from batch_invariant_ops.proof import probe, same_bits
from batch_invariant_ops.tiles import SAFE, Tile
from batch_invariant_ops.tuning.candidates import Card
from batch_invariant_ops.tuning.child import serve

MOST_COPIES = 64
MOST_CALLS = 16
ROUND = 400.0
"""Microseconds that a round's calls take together, where one does not take longer."""
SLEEP, MOST_SLEEP = 2**20, 2**26
"""Clocks that the GPU waits for the host to fill its queue: about 0.6 and 40 ms."""
WARMING = 0.02
LEAST_SHARED_MEMORY = 99 * 1024


class Gpu:
    """The first visible GPU, with the operands of one shape."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", 0)
        self.sleep = SLEEP
        self.turn = 0
        self.checked: dict[Tile | int, int] = {}
        self.weights: list[torch.Tensor] = []
        self.largest = self.reference = self.x = torch.empty(0)

    def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        do = question.pop("do")
        made: dict[str, Callable[..., dict[str, Any]]]
        made = {"card": self.card, "shape": self.shape, "point": self.point, "time": self.time}
        return made[do](**question)

    def card(self) -> dict[str, Any]:
        properties = torch.cuda.get_device_properties(self.device)
        known = certificates.machine(self.device)
        source = "".join(inspect.getsource(getattr(kernel, "fn", kernel)) for kernel in matmul.KERNELS)
        return asdict(
            Card(
                gpu=properties.name,
                capability=(properties.major, properties.minor),
                multiprocessors=properties.multi_processor_count,
                shared_memory=getattr(properties, "shared_memory_per_block_optin", LEAST_SHARED_MEMORY),
                driver=known["driver"],
                torch=known["torch"],
                triton=known["triton"],
                cublas=known["cublas"],
                kernel=hashlib.sha256(source.encode()).hexdigest()[:16],
            )
        )

    def shape(self, n: int, k: int, m: int, dtype: str) -> dict[str, Any]:
        """Make operands for up to m rows, and the fixed tile's result, which all others' are compared with."""
        self.weights.clear()
        self.largest = self.reference = self.x = torch.empty(0)
        torch.cuda.empty_cache()
        try:
            self.largest, w, _ = probe(m, n, k, getattr(torch, dtype), self.device)
            self.reference = matmul.gemm(self.largest, w.t(), tile=SAFE)
            # the results of two calls, and a comparison's, must find room beside the copies
            room = torch.cuda.mem_get_info(self.device)[0] - 3 * self.reference.nbytes
            if room < 0:
                raise torch.OutOfMemoryError
            l2 = torch.cuda.get_device_properties(self.device).L2_cache_size
            copies = min(MOST_COPIES, max(2, math.ceil(3 * l2 / w.nbytes)), 1 + room // (2 * w.nbytes))
            self.weights = [w, *(w.clone() for _ in range(copies - 1))]
            torch.cuda.synchronize()
        except torch.OutOfMemoryError:
            return {"memory": True}
        return {}

    def point(self, m: int) -> dict[str, Any]:
        """Take the first m rows, and have the card at its working clock."""
        self.x = self.largest[:m]
        self.checked.clear()
        until = time.monotonic() + WARMING
        while time.monotonic() < until:
            self.call(SAFE)
            torch.cuda.synchronize()
        return {}

    def time(self, tile: list[Any] | int, rounds: int) -> dict[str, Any]:
        """Compare one tile's bits, when it is new here, and time it; or the vendor's."""
        chosen = tile if isinstance(tile, int) else Tile(*tile)
        try:
            if chosen not in self.checked:
                y = self.call(chosen)
                expected = self.reference[: len(y)]
                if not bool(same_bits(y, expected)):
                    return {"other": int((y.view(torch.int16) != expected.view(torch.int16)).sum())}
                del y
                self.checked[chosen] = max(1, min(MOST_CALLS, math.ceil(ROUND / self.round(chosen, 1))))
            return {"us": statistics.median(self.round(chosen, self.checked[chosen]) for _ in range(rounds))}
        except Exception as error:  # whatever Triton, the driver or torch may raise for a tile that does not fit
            why = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
        try:
            torch.cuda.synchronize()
        except Exception:  # the context is lost, and with it this process
            return {"crash": why}
        torch.cuda.empty_cache()
        return {"unfit": why}

    def round(self, tile: Tile | int, calls: int) -> float:
        """Microseconds a call."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        while True:
            torch.cuda.synchronize()
            torch.cuda._sleep(self.sleep)
            start.record()
            for _ in range(calls):
                self.call(tile)
            hidden = not start.query()
            end.record()
            end.synchronize()
            if hidden or self.sleep >= MOST_SLEEP:
                return max(start.elapsed_time(end) * 1e3 / calls, 1e-3)
            self.sleep *= 2

    def call(self, tile: Tile | int) -> torch.Tensor:
        self.turn += 1
        w = self.weights[self.turn % len(self.weights)]
        if isinstance(tile, int):
            return vendor_gemm.call(self.x, w.t(), None, tile)
        return matmul.gemm(self.x, w.t(), tile=tile)


def main() -> None:
    vendor.prepare()
    gpu = Gpu()

    def answer(question: dict[str, Any]) -> dict[str, Any]:
        with torch.no_grad():
            return gpu.answer(question)

    serve(answer)


if __name__ == "__main__":
    main()
