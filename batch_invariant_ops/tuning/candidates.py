"""Which tiles are worth measuring for one GEMM on one card: those that fit it, the most promising first."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from batch_invariant_ops.ops import matmul, specialised
from batch_invariant_ops.tiles import (
    ACCUMULATORS,
    COPYING,
    FLATTENED,
    LINE,
    PLAIN,
    SPECIALISED,
    STAYING,
    WGMMA_ROWS,
    Tile,
)

LIMIT = 40
ALIKE, TWINS = 6, 2
"""Candidates of one size and order, and those of them that differ in stages alone: the guess tells such apart badly."""
ALIKE_PLAIN, ALIKE_COPYING = 2, 3
"""Instead, of one size, order and form, where there are several forms."""
FEW_ROWS, COPYING_FEW = 64, 10
"""With fewer rows the weights are waited for, however they come: then so many of all candidates copy."""
SPECIALISED_ROWS, SPECIALISED_WAVES, SPECIALISED_FEW = 512, 2, 20
"""With more rows a specialised tile has something to gain in few waves alone; and so many are tried."""
FIRST, FIRST_MANY = 12, 4
"""Others that come before them; fewer with more than SPECIALISED_ROWS, where they are the fastest of all."""
SPECIALISED_THIN = tuple(size for size in range(8, 257, 8) if size.bit_count() <= 2)
SPECIALISED_LARGE, SPECIALISED_ACCUMULATORS = 64, 192
"""With a thin side from there on, a warp has 32 rows instead of 16, and so many sums in each thread at most."""
IN_FLIGHT = 8
"""Groups of a block's wgmmas that are not waited for."""
SPECIALISED_BYTES_PER_CLOCK, CHAINED, FEEDING = 70, 24, 16
"""Of a warp that only copies; clocks from one step of a sum to the next, and those to read wgmma's 64 rows for one."""
GROUPS = (4, 16)
REGROUPED = 6
REGISTERS = 65536
BYTES_PER_CLOCK = 40
LATENCY = 900
"""Clocks until a read from DRAM is there."""
PROGRAM_START = 1500
NEXT_TILE = {STAYING: 1200, FLATTENED: 600}
"""Clocks between the steps of a staying program's tiles."""
STEP = 40
"""Clocks that a step costs beside its work: barriers, addresses."""
ISSUED = 128
"""Bytes that one warp asks for a clock."""
TENSOR_CORES = {9: 4096, 10: 8192}
"""fp16 operations a clock and multiprocessor by compute capability, for tiles that feed its widest instruction."""
OLDER_TENSOR_CORES = 2048


@dataclass(frozen=True)
class Card:
    """What the search needs to know of a GPU, and what a table names beside the tiles.

    Attributes:
        gpu: its name.
        capability: (major, minor).
        multiprocessors: their number.
        shared_memory: bytes that one program may use.
        driver, torch, triton, cublas: versions.
        kernel: a digest of our kernel's source.
    """

    gpu: str
    capability: tuple[int, int]
    multiprocessors: int
    shared_memory: int
    driver: str | None = None
    torch: str | None = None
    triton: str | None = None
    cublas: str | None = None
    kernel: str | None = None


def candidates(m: int, n: int, k: int, card: Card, limit: int = LIMIT) -> list[Tile]:
    """Tiles for x [m, k] · w [n, k]ᵀ of 16-bit operands, by a rough guess of their time; at most ``limit``, and a few
    of the best once more with other groups where there are columns of tiles to group."""
    guessed = sorted((guess(tile, m, n, k, card), repr(tile), tile) for tile in _fitting(m, n, k, card))
    few, copies = m < FEW_ROWS, any(tile.form != PLAIN for _, _, tile in guessed)
    alike = {True: ALIKE_PLAIN if copies and not few else ALIKE, False: ALIKE_COPYING}
    chosen: list[Tile] = []
    seen: Counter[tuple[Any, ...]] = Counter()
    for _, _, tile in guessed:
        plain = tile.form == PLAIN
        size = (tile.m, tile.n, tile.swap, tile.form)
        twins = (*size, tile.k, tile.warps)
        enough = few and not plain and seen[(plain,)] >= COPYING_FEW
        if len(chosen) < limit and seen[size] < alike[plain] and seen[twins] < TWINS and not enough:
            seen.update((size, twins, (plain,)))
            chosen.append(tile)
    several = [tile for tile in chosen if m >= 4 * tile.m]
    regrouped = [replace(tile, group=group) for tile in several[:REGROUPED] for group in GROUPS]
    special: list[Tile] = []
    for tile in sorted(_specialised(m, n, k, card), key=lambda tile: (guess(tile, m, n, k, card), repr(tile))):
        size = (tile.m, tile.n, tile.swap, tile.form)
        if len(special) < SPECIALISED_FEW and seen[size] < TWINS:
            seen[size] += 1
            special.append(tile)
    first = FIRST_MANY if m > SPECIALISED_ROWS else FIRST
    return chosen[:first] + special + chosen[first:] + regrouped


def _specialised(m: int, n: int, k: int, card: Card) -> list[Tile]:
    """Every specialised tile of a coarse grid that keeps enough blocks in flight."""
    if card.capability[0] != 9 or not matmul.copies(n, k) or k % LINE:
        return []
    rows = max(8, 1 << (m - 1).bit_length())
    enough = next((thin for thin in SPECIALISED_THIN if thin >= m), SPECIALISED_THIN[-1])
    found = []
    for wide, thin, depth, swap in itertools.product(
        (16, 24, 32, 40, 48, 64, 128, 256), SPECIALISED_THIN, (64, 128, 256, 512), (False, True)
    ):
        large = thin >= SPECIALISED_LARGE and not swap
        warps = max(4, wide // (32 if large else 16))
        if wide * thin > SPECIALISED_ACCUMULATORS * 32 * warps or (wide > 128 and not large):
            continue
        if swap and m > SPECIALISED_ROWS:  # the copy engine does not write these
            continue
        height, width = (thin, wide) if swap else (wide, thin)
        if depth > k or height > (enough if swap else max(rows, 16)) or (rows <= 64 and height < rows // 2):
            continue
        programs = -(-m // height) * -(-n // width)
        if m > SPECIALISED_ROWS and programs > SPECIALISED_WAVES * card.multiprocessors:
            continue
        bare = Tile(height, width, depth, warps, 2, swap=swap, form=SPECIALISED)
        if len(bare.thin_parts) * depth // LINE > IN_FLIGHT or not specialised.serves(bare, k, card.capability):
            continue
        for share in (1, 2) if programs > card.multiprocessors else (1,):
            room = card.shared_memory // share - bare.shared_memory()
            stages = min(32, -(-k // depth), 2 + room // _slot(bare))
            if stages > 2:
                found.append(replace(bare, stages=stages))
    return found


def _slot(tile: Tile) -> int:
    return replace(tile, stages=3).shared_memory() - replace(tile, stages=2).shared_memory()


def _fitting(m: int, n: int, k: int, card: Card) -> list[Tile]:
    """Every tile of a coarse grid whose operands fit into shared memory and whose sums fit into registers."""
    rows = max(16, min(256, 1 << (m - 1).bit_length()))
    heights = [height for height in (16, 32, 64, 128, 256) if min(64, rows // 2) <= height <= rows]
    found = []
    for height, width, depth in itertools.product(heights, (16, 32, 64, 128, 256), (32, 64, 128, 256)):
        if (
            (width > 16 and width >= 2 * n)
            or (depth > 64 and depth >= 2 * k)
            or (depth == 32 and height * width < 128**2)
        ):
            continue
        for warps, swap in itertools.product((1, 2, 4, 8), (False, True)):
            sums = height * width // (32 * warps)
            if not 8 <= sums <= ACCUMULATORS or (swap and height >= 128):
                continue
            steps = max(2, -(-k // depth))
            for form in _forms(height, width, warps, swap, m, n, k, card):
                found += _staged(Tile(height, width, depth, warps, 1, swap=swap, form=form), steps, card)
    return found


def _forms(height: int, width: int, warps: int, swap: bool, m: int, n: int, k: int, card: Card) -> list[str]:
    """Those worth a try: by the copy engine what then feeds the widest instruction, and stays where there is more."""
    wide = width if swap else height
    if card.capability < (9, 0) or not matmul.copies(n, k) or wide < 64 or warps % 4:
        return [PLAIN]
    if m < FEW_ROWS or -(-m // height) * -(-n // width) <= card.multiprocessors:
        return [PLAIN, COPYING]
    return [PLAIN, COPYING, STAYING, FLATTENED]


def _staged(bare: Tile, steps: int, card: Card) -> list[Tile]:
    """A tile of one stage with the numbers of stages that are worth a try."""
    stage = (bare.m + bare.n) * bare.k * 2 + (bare.form != PLAIN) * 8
    rest = bare.shared_memory() - stage if bare.stays else 0
    deepest = min(8, (card.shared_memory - rest) // stage, steps)
    halves = (card.shared_memory // 2 - rest) // stage
    stages = {deepest, min(deepest, 5), min(deepest, 4), min(deepest, 3), min(deepest, halves)}
    return [replace(bare, stages=number) for number in sorted(stages) if number >= 2]


def guess(tile: Tile, m: int, n: int, k: int, card: Card) -> float:
    """Clocks that a GEMM may take: waves of programs, each as slow as its arithmetic, its reads or their latency.

    Good enough to say which few dozen of hundreds to measure, never to choose among those.
    """
    programs = tile.programs(m, n)
    if tile.form == SPECIALISED:
        share = card.shared_memory // tile.shared_memory()
        resident = max(1, min(share, -(-programs // card.multiprocessors)))
        reads = resident * (tile.m + tile.n) * tile.k * 2 / SPECIALISED_BYTES_PER_CLOCK
        arithmetic = resident * 2 * tile.fed * tile.thin * tile.k / TENSOR_CORES[9]
        fed = resident * tile.k / 16 * tile.fed / WGMMA_ROWS * (len(tile.thin_parts) * FEEDING + tile.thin / 4)
        step = max(reads, arithmetic, fed, tile.k / 16 * CHAINED) + STEP + LATENCY / tile.stages / 4
        waves = -(-programs // (card.multiprocessors * resident))
        return waves * (PROGRAM_START + -(-k // tile.k) * step)
    shared = card.shared_memory // tile.shared_memory()
    registers = REGISTERS // (32 * tile.warps * min(255, tile.m * tile.n // (32 * tile.warps) + 56))
    resident = max(1, min(shared, registers, 48 // tile.warps))
    resident = min(resident, -(-programs // card.multiprocessors))
    waves = -(-programs // (card.multiprocessors * resident))
    fed = tile.wide >= WGMMA_ROWS and tile.warps % 4 == 0
    rate = TENSOR_CORES.get(card.capability[0], OLDER_TENSOR_CORES) if fed else OLDER_TENSOR_CORES
    arithmetic = resident * 2 * tile.m * tile.n * tile.k / rate
    reads = resident * (tile.m + tile.n) * tile.k * 2 / BYTES_PER_CLOCK
    wait = LATENCY / (tile.stages - 1)
    issued = resident * (tile.m + tile.n) * tile.k * 2 / (ISSUED * min(4, tile.warps))
    issue = STEP + (issued if tile.form == PLAIN else 0.0)
    step = max(arithmetic, reads, wait) + issue + wait / 20
    steps = waves * -(-k // tile.k) * step
    if tile.form in NEXT_TILE:
        return PROGRAM_START + (waves - 1) * NEXT_TILE[tile.form] + steps
    return waves * PROGRAM_START + steps
