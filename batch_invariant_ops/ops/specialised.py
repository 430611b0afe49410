"""The GEMM's warp-specialised form for sm_90: one warp copies operands, the others do nothing but multiply.

With few rows and few columns, each of the K/16 steps of a sum waits for the one before, and that chain is what takes
the time. Two things make it short. wgmma's step is shorter than mma.sync's, but it computes 64 rows: so a narrow tile
copies no more than it needs, and lets wgmma read on into whatever lies behind it, for sums that nobody stores. And a
copying warp with mbarriers of its own keeps so much in flight that the steps never wait for memory at a block's end.

Tensors have powers of two as sizes. So that a tile can be as long as M is, or as wide as makes a tile for each
multiprocessor, its thin side may be two of them, each with sums of its own: 192 rows are 128 and 64, 80 columns 64 and
16. A narrow tile's wide side may be two as well, copied to where wgmma reads them as one: 40 rows are 32 and 8.

A large tile of rows of c is laid out in the memory of its operands at last, and the copy engine writes it. Out of
wgmma's registers four threads write 16 bytes of a row at a time, which for K = 896 took an H200 nearly as long as all
else.

K ascends in one accumulator, in steps of 16, as in every other form: the bits are the same. Written in Gluon, Triton's
lower language, of which releases differ; where it does not serve, the copying form runs. The scheme is that of
CUTLASS's warp-specialised kernels (github.com/NVIDIA/cutlass, ``sm90_mma_tma_gmma_ss_warpspecialized.hpp``).
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from batch_invariant_ops.ops import dependent
from batch_invariant_ops.ops.rows import row_step
from batch_invariant_ops.tiles import LINE, Tile

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as Descriptor
except ImportError:  # no Triton, or one without Gluon for this card
    gluon = None

logger = logging.getLogger(__name__)
COPYING_REGISTERS = 40
LAID_OUT = 64 * 64
"""Elements of a tile from which on it is written by the copy engine; smaller ones were not tried enough."""
narrow = False
"""Whether wgmma may be fed rows beyond a tile's own: from Triton 3.8 on, a view may not reach beyond its memory."""
_failed = False

KERNELS: tuple[Any, ...] = ()
if gluon is not None:
    narrow = hasattr(gl.shared_memory_descriptor, "_reinterpret")
    # their names changed between 3.6 and 3.9
    _barrier = getattr(gl, "thread_barrier", None) or gl.barrier
    _load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
    _write = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
    _view = getattr(gl.shared_memory_descriptor, "_reinterpret", None) or gl.shared_memory_descriptor.reinterpret

    @gluon.jit
    def _copy(
        wide_of, rest_of, thin_of, more_of, wide, thin, more, full, empty, wide_at, thin_at, steps,
        WIDE: gl.constexpr, REST: gl.constexpr, THIN: gl.constexpr, MORE: gl.constexpr, LINES: gl.constexpr,
        STAGES: gl.constexpr,
    ):  # fmt: skip
        """The copying warp: block after block of both operands, each into the slot that was emptied first."""
        slot = 0
        phase = 1  # a barrier's phase before its first one counts as over: at first every slot is empty
        for step in range(steps):
            mbarrier.wait(empty.index(slot), phase)
            bar = full.index(slot)
            mbarrier.expect(bar, LINES * 128 * (WIDE + THIN + MORE))
            if REST:
                ELEMENT: gl.constexpr = wide.dtype
                for line in gl.static_range(LINES):
                    at = (slot * LINES + line) * (WIDE // 8)
                    part = _view(wide.index(at), ELEMENT, [1, WIDE - REST, 64], wide_of.layout)
                    rest = _view(wide.index(at + (WIDE - REST) // 8), ELEMENT, [1, REST, 64], rest_of.layout)
                    _load(wide_of, [step * LINES + line, wide_at, 0], bar, part)
                    _load(rest_of, [step * LINES + line, wide_at + WIDE - REST, 0], bar, rest)
            else:
                _load(wide_of, [step * LINES, wide_at, 0], bar, wide.index(slot))
            _load(thin_of, [step * LINES, thin_at, 0], bar, thin.index(slot))
            if MORE:
                _load(more_of, [step * LINES, thin_at + THIN, 0], bar, more.index(slot))
            slot += 1
            if slot == STAGES:
                slot = 0
                phase ^= 1

    @gluon.jit
    def _store(
        sums, bias_ptr, c_ptr, wide_at, thin_at, M, N,
        WIDE: gl.constexpr, FED: gl.constexpr, THIN: gl.constexpr, SWAP: gl.constexpr, HAS_BIAS: gl.constexpr,
        SUMS: gl.constexpr,
    ):  # fmt: skip
        """What of the sums [FED, THIN] is the tile's, with the bias, rounded."""
        i = gl.arange(0, FED, gl.SliceLayout(1, SUMS))
        j = gl.arange(0, THIN, gl.SliceLayout(0, SUMS))
        if SWAP:
            columns = wide_at + i
            rows = thin_at + j
            if HAS_BIAS:
                sums += gl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(gl.float32)[:, None]
            at = c_ptr + columns[:, None] + rows.to(gl.int64)[None, :] * N
            inside = ((i < WIDE) & (columns < N))[:, None] & (rows < M)[None, :]
        else:
            columns = thin_at + j
            rows = wide_at + i
            if HAS_BIAS:
                sums += gl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(gl.float32)[None, :]
            at = c_ptr + columns[None, :] + rows.to(gl.int64)[:, None] * N
            inside = ((i < WIDE) & (rows < M))[:, None] & (columns < N)[None, :]
        gl.store(at, sums.to(c_ptr.dtype.element_ty), mask=inside)

    @gluon.jit
    def _lay_out(
        sums, bias_ptr, out, thin_at, N, THIN: gl.constexpr, HAS_BIAS: gl.constexpr, SUMS: gl.constexpr
    ):  # fmt: skip
        """The sums [WIDE, THIN], with the bias, rounded, in shared memory."""
        if HAS_BIAS:
            columns = thin_at + gl.arange(0, THIN, gl.SliceLayout(0, SUMS))
            sums += gl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(gl.float32)[None, :]
        out.store(sums.to(out.dtype))

    @gluon.jit
    def _multiply(
        wide, thin, more, full, empty, bias_ptr, c_ptr, c_of, more_c_of, wide_at, thin_at, steps, M, N,
        WIDE: gl.constexpr, REST: gl.constexpr, FED: gl.constexpr, THIN: gl.constexpr, MORE: gl.constexpr,
        LINES: gl.constexpr, STAGES: gl.constexpr,
        SWAP: gl.constexpr, HAS_BIAS: gl.constexpr, LAID: gl.constexpr, LAYOUT: gl.constexpr, WARPS: gl.constexpr,
    ):  # fmt: skip
        """The multiplying warps: a block's steps are all in flight before those of the block before are waited for."""
        SUMS: gl.constexpr = gl.NVMMADistributedLayout(
            version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, THIN, 16]
        )
        ELEMENT: gl.constexpr = c_ptr.dtype.element_ty
        sums = gl.zeros((FED, THIN), gl.float32, SUMS)
        if MORE:
            MORE_SUMS: gl.constexpr = gl.NVMMADistributedLayout(
                version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, MORE, 16]
            )
            more_sums = gl.zeros((FED, MORE), gl.float32, MORE_SUMS)
        slot = 0
        phase = 0
        before = 0
        for step in range(steps):
            mbarrier.wait(full.index(slot), phase)
            if not REST:
                wides = _view(wide.index(slot), ELEMENT, [LINES, WIDE, 64], LAYOUT)
            thins = _view(thin.index(slot), ELEMENT, [LINES, THIN, 64], LAYOUT)
            if MORE:
                mores = _view(more.index(slot), ELEMENT, [LINES, MORE, 64], LAYOUT)
            for line in gl.static_range(LINES):
                if REST:
                    a = wide.index((slot * LINES + line) * (WIDE // 8))
                else:
                    a = wides.index(line)
                if FED != WIDE:
                    a = _view(a, ELEMENT, [FED, 64], LAYOUT)
                sums = warpgroup_mma(a, thins.index(line).permute((1, 0)), sums, is_async=True)
                if MORE:
                    more_sums = warpgroup_mma(a, mores.index(line).permute((1, 0)), more_sums, is_async=True)
            if MORE:
                sums, more_sums = warpgroup_mma_wait(2 * LINES, deps=[sums, more_sums])
            else:
                sums = warpgroup_mma_wait(LINES, deps=[sums])
            mbarrier.arrive(empty.index(before), count=1, pred=step > 0)
            before = slot
            slot += 1
            if slot == STAGES:
                slot = 0
                phase ^= 1
        if MORE:
            sums, more_sums = warpgroup_mma_wait(0, deps=[sums, more_sums])
        else:
            sums = warpgroup_mma_wait(0, deps=[sums])
        if LAID:
            _barrier()  # until then another warp may read operands
            out = _view(wide, ELEMENT, [WIDE, THIN], c_of.layout)
            _lay_out(sums, bias_ptr, out, thin_at, N, THIN, HAS_BIAS, SUMS)
            if MORE:
                more_out = _view(more, ELEMENT, [WIDE, MORE], more_c_of.layout)
                _lay_out(more_sums, bias_ptr, more_out, thin_at + THIN, N, MORE, HAS_BIAS, MORE_SUMS)
            fence_async_shared()
            _barrier()
            _write(c_of, [wide_at, thin_at], out)
            if MORE:
                _write(more_c_of, [wide_at, thin_at + THIN], more_out)
            tma.store_wait(0)
        else:
            if MORE:
                _store(
                    more_sums, bias_ptr, c_ptr, wide_at, thin_at + THIN, M, N,
                    WIDE, FED, MORE, SWAP, HAS_BIAS, MORE_SUMS,
                )  # fmt: skip
            _store(sums, bias_ptr, c_ptr, wide_at, thin_at, M, N, WIDE, FED, THIN, SWAP, HAS_BIAS, SUMS)

    @gluon.jit(do_not_specialize=["M", "N", "steps", "wide_tiles"])
    def _specialised_kernel(
        wide_of, rest_of, thin_of, more_of, bias_ptr, c_ptr, c_of, more_c_of, M, N, steps, wide_tiles,
        WIDE: gl.constexpr, REST: gl.constexpr, FED: gl.constexpr, THIN: gl.constexpr, MORE: gl.constexpr,
        LINES: gl.constexpr, STAGES: gl.constexpr,
        BEHIND: gl.constexpr, SWAP: gl.constexpr, HAS_BIAS: gl.constexpr, LAID: gl.constexpr,
        COPYING_WARP: gl.constexpr, FOLLOWS: gl.constexpr, num_warps: gl.constexpr,
    ):  # fmt: skip
        """c [M, N] = round(bias[n] + sum over k ascending of a[m, k]·w[n, k]); of the operands, one is wide_of.

        A tile has WIDE of its rows, of which wgmma is fed FED, and THIN + MORE of the other's. MORE, and the last REST
        of WIDE, come by descriptions of their own, and where the tile is LAID out MORE go by one; a block along K has
        LINES times 64. All operands are described as [K / 64, rows, 64], so that one copy brings a block with its
        lines apart, as wgmma wants to have them; where WIDE is two parts, one copy brings a part of a line, to a
        multiple of the 8 rows after which shared memory's pattern repeats. BEHIND slots are for what is read behind
        the last one.
        """
        LAYOUT: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
        ELEMENT: gl.constexpr = c_ptr.dtype.element_ty
        wide_at = (gl.program_id(0) % wide_tiles) * WIDE
        thin_at = (gl.program_id(0) // wide_tiles) * (THIN + MORE)
        if REST:
            wide = gl.allocate_shared_memory(ELEMENT, [(STAGES + BEHIND) * LINES * WIDE // 8, 8, 64], LAYOUT)
        else:
            wide = gl.allocate_shared_memory(ELEMENT, [STAGES + BEHIND, LINES, WIDE, 64], wide_of.layout)
        thin = gl.allocate_shared_memory(ELEMENT, [STAGES, LINES, THIN, 64], thin_of.layout)
        if MORE:
            more = gl.allocate_shared_memory(ELEMENT, [STAGES, LINES, MORE, 64], more_of.layout)
        else:
            more = thin
        full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        for slot in gl.static_range(STAGES):
            mbarrier.init(full.index(slot), count=1)
            mbarrier.init(empty.index(slot), count=1)
        fence_async_shared()
        _barrier()
        if FOLLOWS:
            dependent.follow()
        gl.warp_specialize(
            [
                (
                    _multiply,
                    (wide, thin, more, full, empty, bias_ptr, c_ptr, c_of, more_c_of, wide_at, thin_at, steps, M, N,
                     WIDE, REST, FED, THIN, MORE, LINES, STAGES, SWAP, HAS_BIAS, LAID, LAYOUT, num_warps),
                ),
                (_copy, (wide_of, rest_of, thin_of, more_of, wide, thin, more, full, empty, wide_at, thin_at, steps,
                         WIDE, REST, THIN, MORE, LINES, STAGES)),
            ],
            [1],
            [COPYING_WARP],
        )  # fmt: skip

    KERNELS = (_copy, _store, _lay_out, _multiply, _specialised_kernel)


def serves(tile: Tile, depth: int, capability: tuple[int, int]) -> bool:
    """Whether the tile runs for operands that the copy engine can read, of that K, on a card of that capability."""
    fits = depth % LINE == 0 and (narrow or tile.fed == tile.wide)
    return fits and gluon is not None and not _failed and capability[0] == 9


def call(
    x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, c: torch.Tensor, tile: Tile
) -> tuple[Any, tuple[int, int], tuple[Any, ...], dict[str, Any]]:
    """The kernel, its grid, its arguments and its options for c [M, N] = x [M, K] · w [N, K]ᵀ + bias [N]."""
    wide, thin = (w, x) if tile.swap else (x, w)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)
    larger, smaller = (*tile.thin_parts, 0)[:2]
    rest = (*tile.wide_parts, 0)[1]
    lines = tile.k // LINE

    def described(t: torch.Tensor, block: list[int]) -> Any:
        return Descriptor(t, [t.shape[1] // LINE, t.shape[0], LINE], [LINE, row_step(t), 1], block, layout)

    wide_of = [described(wide, [1 if rest else lines, part, LINE]) for part in tile.wide_parts]
    thin_of = [described(thin, [lines, part, LINE]) for part in tile.thin_parts]
    wide_tiles = -(-wide.shape[0] // tile.wide)
    programs = wide_tiles * -(-thin.shape[0] // tile.thin)
    c_of = []
    if laid := _is_laid_out(tile):
        kind = gl.bfloat16 if c.dtype == torch.bfloat16 else gl.float16
        blocks = [[tile.wide, part] for part in tile.thin_parts]
        c_of = [
            Descriptor(c, [*c.shape], [row_step(c), 1], block, gl.NVMMASharedLayout.get_default_for(block, kind))
            for block in blocks
        ]
    numbers = (*c.shape, -(-x.shape[1] // tile.k), wide_tiles)
    operands = (*_two(wide_of), *_two(thin_of), bias, c, *_two(c_of), *numbers)
    return _specialised_kernel, (programs, 1), operands, {
        "WIDE": tile.wide, "REST": rest, "FED": tile.fed, "THIN": larger, "MORE": smaller, "LINES": lines,
        "STAGES": tile.stages, "BEHIND": tile.behind, "SWAP": tile.swap, "HAS_BIAS": bias is not None,
        "LAID": laid, "COPYING_WARP": COPYING_REGISTERS, "num_warps": tile.warps,
    }  # fmt: skip


def _two(described: list[Any]) -> tuple[Any, ...]:
    """As the kernel takes them: nothing for a part that there is not, which costs a launch nothing."""
    return (*described, None, None)[:2]


def _is_laid_out(tile: Tile) -> bool:
    """Whether the copy engine writes the tile: a large one of rows of c that has room for it among its operands."""
    room = tile.stages * tile.k
    fits = tile.thin <= room and (len(tile.thin_parts) == 1 or tile.wide <= room)
    return not tile.swap and tile.wide == tile.fed and tile.m * tile.n >= LAID_OUT and fits


def give_up(error: Exception) -> None:
    """Run the other forms from now on, with a line that says why: Gluon is not the same in every release of Triton."""
    global _failed
    if not _failed:
        logger.warning(
            "the warp-specialised GEMM does not run with this Triton (%s: %s): another form runs, as right but slower",
            type(error).__name__, (str(error).strip().splitlines() or [""])[0][:200],
        )  # fmt: skip
    _failed = True
