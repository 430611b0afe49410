"""C = A·B + bias with bits that depend on no other row: the Triton GEMM that the numerics contract is written for.

Each element is one fp32 sum with k ascending, never split; the bias joins in fp32; one rounding to the output type.
Tiles are free to choose (:mod:`batch_invariant_ops.tiles`). On a CPU the vendor's GEMM runs on one constant number of
rows at a time, so that it has no M to choose a kernel by, and one at which a row's place was seen not to matter.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from batch_invariant_ops import tiles
from batch_invariant_ops.ops import vendor_gemm
from batch_invariant_ops.proof import probe, same_bits
from batch_invariant_ops.tiles import Tile

try:
    import triton
    import triton.language as tl
except ImportError:  # the CPU form needs no Triton
    triton = None

SUPPORTED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SUMS_A_PLACE = 4096
"""Sums that are compared for each place of a row, before the vendor may run many rows at a time on a CPU."""
CPU_ROWS = (16, 8, 4, 2)

if triton is not None:
    # the number of rows is nothing to compile for: a server meets all of them. Strides between entries are: a pointer
    # of unknown alignment is read two bytes at a time, and such reads are not pipelined
    @triton.jit(do_not_specialize=["M"])
    def _matmul_kernel(
        a_ptr, b_ptr, bias_ptr, c_ptr,
        M, N, K,
        stride_az, stride_am, stride_ak,
        stride_bz, stride_bk, stride_bn,
        stride_cz, stride_cm, stride_cn,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
        EVEN_K: tl.constexpr, SWAP: tl.constexpr, HAS_BIAS: tl.constexpr, WIDE: tl.constexpr,
    ):  # fmt: skip
        """c[m, n] = round(bias[n] + sum over k ascending of a[m, k]·b[k, n]), one tile of one batch entry a program."""
        tile = tl.program_id(0)
        tiles_m = tl.cdiv(M, BLOCK_M)
        tiles_n = tl.cdiv(N, BLOCK_N)
        in_group = GROUP_M * tiles_n
        first_m = (tile // in_group) * GROUP_M
        group_m = min(tiles_m - first_m, GROUP_M)
        tile_m = first_m + (tile % in_group) % group_m
        tile_n = (tile % in_group) // group_m

        rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        ks = tl.arange(0, BLOCK_K)
        entry = tl.program_id(1)
        if WIDE:
            rows = rows.to(tl.int64)
            columns = columns.to(tl.int64)
            ks = ks.to(tl.int64)
            entry = entry.to(tl.int64)
        # rows and columns beyond the edge compute a copy of row and column 0, which is never stored
        safe_rows = tl.where(rows < M, rows, 0)
        safe_columns = tl.where(columns < N, columns, 0)
        a_ptr += entry * stride_az
        b_ptr += entry * stride_bz
        c_ptr += entry * stride_cz

        if SWAP:
            a_at = a_ptr + ks[:, None] * stride_ak + safe_rows[None, :] * stride_am
            b_at = b_ptr + safe_columns[:, None] * stride_bn + ks[None, :] * stride_bk
            sums = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        else:
            a_at = a_ptr + safe_rows[:, None] * stride_am + ks[None, :] * stride_ak
            b_at = b_ptr + ks[:, None] * stride_bk + safe_columns[None, :] * stride_bn
            sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)

        # never 0, else there is a way around the loop, for which ptxas has each wgmma wait for the one before
        for k in range(0, tl.maximum(tl.cdiv(K, BLOCK_K), 1)):
            if EVEN_K:
                a = tl.load(a_at)
                b = tl.load(b_at)
            else:
                inside = ks < K - k * BLOCK_K
                if SWAP:
                    a = tl.load(a_at, mask=inside[:, None], other=0.0)
                    b = tl.load(b_at, mask=inside[None, :], other=0.0)
                else:
                    a = tl.load(a_at, mask=inside[None, :], other=0.0)
                    b = tl.load(b_at, mask=inside[:, None], other=0.0)
            if SWAP:
                sums = tl.dot(b, a, sums, input_precision="ieee")
            else:
                sums = tl.dot(a, b, sums, input_precision="ieee")
            a_at += BLOCK_K * stride_ak
            b_at += BLOCK_K * stride_bk

        if SWAP:
            if HAS_BIAS:
                bias = tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)
                sums += bias[:, None]
            c_at = c_ptr + columns[:, None] * stride_cn + rows[None, :] * stride_cm
            tl.store(c_at, sums.to(c_ptr.dtype.element_ty), mask=(columns < N)[:, None] & (rows < M)[None, :])
        else:
            if HAS_BIAS:
                bias = tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)
                sums += bias[None, :]
            c_at = c_ptr + rows[:, None] * stride_cm + columns[None, :] * stride_cn
            tl.store(c_at, sums.to(c_ptr.dtype.element_ty), mask=(rows < M)[:, None] & (columns < N)[None, :])


def gemm(
    a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None, *, tile: Tile | None = None
) -> torch.Tensor:
    """a [M, K] · b [K, N] + bias [N] → [M, N], all of one type of fp32, bf16 and fp16, any strides.

    Raises:
        ValueError: shapes, types or devices that do not go together.
    """
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0]:
        raise ValueError(f"Incompatible dimensions: a is {list(a.shape)}, b is {list(b.shape)}")
    if bias is not None and list(bias.shape) != [b.shape[1]]:
        raise ValueError(f"Incompatible dimensions: bias is {list(bias.shape)}, N is {b.shape[1]}")
    return _run(a[None], b[None], bias, tile)[0]


def bmm(a: torch.Tensor, b: torch.Tensor, *, tile: Tile | None = None) -> torch.Tensor:
    """a [Z, M, K] · b [Z, K, N] → [Z, M, N]: the same sums as :func:`gemm`, entry by entry.

    Raises:
        ValueError: shapes, types or devices that do not go together.
    """
    if a.dim() != 3 or b.dim() != 3 or a.shape[0] != b.shape[0] or a.shape[2] != b.shape[1]:
        raise ValueError(f"Incompatible dimensions: a is {list(a.shape)}, b is {list(b.shape)}")
    return _run(a, b, None, tile)


def matmul_persistent(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """:func:`gemm` under the name and with the arguments that Thinking Machines' package gives it.

    Raises:
        AssertionError: shapes or types that do not go together, as there.
    """
    assert a.shape[1] == b.shape[0], "Incompatible dimensions"
    assert a.dtype == b.dtype, "Incompatible dtypes"
    assert bias is None or bias.dim() == 1, "the bias must be one-dimensional"
    return gemm(a, b, bias)


def _run(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, tile: Tile | None) -> torch.Tensor:
    for what, tensor in (("b", b), ("bias", bias)):
        if tensor is not None and (tensor.dtype, tensor.device) != (a.dtype, a.device):
            raise ValueError(
                f"a is {a.dtype} on {a.device}, {what} is {tensor.dtype} on {tensor.device}: they must be alike"
            )
    if a.dtype not in SUPPORTED_DTYPES:
        raise ValueError(f"{a.dtype} is not supported: one of {', '.join(map(str, SUPPORTED_DTYPES))} is needed")
    entries, num_rows, depth = a.shape
    num_columns = b.shape[2]
    if min(entries, num_rows, num_columns, depth) == 0:
        c = a.new_zeros(entries, num_rows, num_columns)
        return c if bias is None else c + bias
    if a.device.type == "cpu" and not _interpreted():
        return _on_cpu(a, b, bias)
    if triton is None:
        raise RuntimeError(f"a GEMM on {a.device} needs Triton, which is not installed: `pip install triton`")
    return _launch(a, b, bias, tile or tiles.choose(num_rows, num_columns, depth, a.dtype, *_card(a.device)))


def warm_up(a: torch.Tensor, b: torch.Tensor, *, tile: Tile) -> Any:
    """Compile the kernel that :func:`gemm` would run, without running it; the operands may be on torch's meta device.

    Returns:
        Triton's compiled kernel.
    """
    grid, operands, options = _call(a[None], b[None], None, a.new_empty(1, a.shape[0], b.shape[1]), tile)
    return _matmul_kernel.warmup(*operands, grid=grid, **options)


def _launch(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, tile: Tile) -> torch.Tensor:
    c = a.new_empty(a.shape[0], a.shape[1], b.shape[2])
    grid, operands, options = _call(a, b, None if bias is None else bias.contiguous(), c, tile)
    with torch.cuda.device(a.device) if a.is_cuda else _nothing():
        _matmul_kernel[grid](*operands, **options)
    return c


def _call(
    a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, c: torch.Tensor, tile: Tile
) -> tuple[tuple[int, int], tuple[Any, ...], dict[str, Any]]:
    """The kernel's grid, arguments and options for a [Z, M, K], b [Z, K, N] and c [Z, M, N]."""
    entries, num_rows, depth = a.shape
    num_columns = b.shape[2]
    extents = (t.numel() if t.is_contiguous() else _extent(t) for t in (a, b, c))
    # one entry's stride would be M*K, by which Triton would compile anew for some numbers of rows
    strides = [t.stride() if entries > 1 else (0, *t.stride()[1:]) for t in (a, b, c)]
    grid = (triton.cdiv(num_rows, tile.m) * triton.cdiv(num_columns, tile.n), entries)
    operands = (a, b, bias, c, num_rows, num_columns, depth, *strides[0], *strides[1], *strides[2])
    return grid, operands, {
        "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "GROUP_M": tile.group,
        "EVEN_K": depth % tile.k == 0, "SWAP": tile.swap, "HAS_BIAS": bias is not None, "WIDE": max(extents) >= 2**31,
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip


def _extent(tensor: torch.Tensor) -> int:
    """Elements between a tensor's first and last, plus one: what an offset into it must be able to hold."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


class _nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *exception: object) -> None: ...


def _interpreted() -> bool:
    return triton is not None and triton.knobs.runtime.interpret


@functools.cache
def _card(device: torch.device) -> tuple[str, tuple[int, int]]:
    """A GPU's name and compute capability."""
    if device.type != "cuda":
        return "", (0, 0)
    return torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)


def _on_cpu(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    entries, num_rows, depth = a.shape
    step = _cpu_rows(depth, b.shape[2], a.dtype, bias is not None, b.stride()[1:])
    padded = torch.nn.functional.pad(a, (0, 0, 0, -num_rows % step))
    c = a.new_empty(entries, padded.shape[1], b.shape[2])
    for entry in range(entries):
        for start in range(0, padded.shape[1], step):
            # a copy of its own gives every part the same alignment
            part = padded[entry, start : start + step].clone(memory_format=torch.contiguous_format)
            c[entry, start : start + step] = vendor_gemm.call(part, b[entry], bias)
    return c[:, :num_rows]


def _same_in_each_place(row: torch.Tensor, step: int, b: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether the vendor gives a row [K] the same bits in each place of a batch of `step`."""
    y = vendor_gemm.call(row.expand(step, -1).contiguous(), b, bias)
    return bool(same_bits(y, y[:1].expand(step, -1).contiguous()))


@functools.cache
def _cpu_rows(depth: int, num_columns: int, dtype: torch.dtype, has_bias: bool, strides: tuple[int, ...]) -> int:
    """The most rows at a time at which the vendor's bits do not depend on a row's place; one row has but one place."""
    # Few columns show few sums, of which most round alike in any order: then more rows are looked at.
    count = max(2, -(-SUMS_A_PLACE // num_columns))
    rows, w, bias = probe(count, num_columns, depth, dtype, torch.device("cpu"), has_bias)
    b = w.t() if strides[0] == 1 and strides[1] >= depth else w.t().contiguous()
    for step in CPU_ROWS:
        if all(_same_in_each_place(row, step, b, bias) for row in rows):
            return step
    return 1
