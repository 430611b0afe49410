"""Tile shapes of the Triton GEMM: data for speed alone, free to retune, because no entry changes a bit.

A card without a table runs one fixed tile, which fits the shared memory of every card since sm_80.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass

import torch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tile:
    """How one program of the GEMM works.

    Attributes:
        m, n, k: rows and columns of the output tile, and the step along K.
        warps, stages: Triton's ``num_warps`` and ``num_stages``.
        group: row tiles that share columns in L2 before the next columns come.
        swap: compute the tile's transpose, W·xᵀ, so that weights feed the wide side of the tensor core at small M.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    group: int = 8
    swap: bool = False


SAFE = Tile(m=64, n=64, k=32, warps=4, stages=3)
FP32 = Tile(m=64, n=64, k=32, warps=4, stages=2)

# (largest M of the band, tile), in order of M; 16-bit types.
TABLES: dict[tuple[int, int], tuple[tuple[int, Tile], ...]] = {
    (9, 0): (
        (16, Tile(m=16, n=64, k=128, warps=4, stages=5, swap=True)),
        (32, Tile(m=32, n=64, k=128, warps=4, stages=5, swap=True)),
        (64, Tile(m=64, n=64, k=128, warps=4, stages=4, swap=True)),
        (128, Tile(m=128, n=64, k=64, warps=4, stages=4)),
        (256, Tile(m=128, n=128, k=64, warps=8, stages=3)),
        (2**62, Tile(m=128, n=256, k=64, warps=8, stages=3)),
    ),
}


def choose(num_rows: int, dtype: torch.dtype, capability: tuple[int, int]) -> Tile:
    """The tile for M rows of one dtype on a card of that compute capability."""
    if dtype == torch.float32:
        return FP32
    for largest, tile in _table(capability):
        if num_rows <= largest:
            return tile
    return SAFE


@functools.cache
def _table(capability: tuple[int, int]) -> tuple[tuple[int, Tile], ...]:
    table = TABLES.get(capability)
    if table is None:
        logger.info("no tile table for compute capability %d.%d: one fixed tile, correct but slower", *capability)
        return ()
    return table
