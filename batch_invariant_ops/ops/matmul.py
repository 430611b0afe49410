"""C = A·B + bias with bits that depend on no other row: the Triton GEMM that the numerics contract is written for.

Each element is one fp32 sum with k ascending, never split; the bias joins in fp32; one rounding to the output type.
Tiles are free to choose (:mod:`batch_invariant_ops.tiles`), and with them the kernel's form: operands come through
pointers, which serve any strides, or by the copy engine that cards have since sm_90. On a CPU the vendor's GEMM runs on
one constant number of rows at a time, so that it has no M to choose a kernel by, and one at which a row's place was
seen not to matter.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any

import torch

from batch_invariant_ops import reduction, tiles
from batch_invariant_ops.ops import dependent, specialised, vendor_gemm
from batch_invariant_ops.ops.launching import Launcher, seen
from batch_invariant_ops.ops.rows import on_device_of, row_step
from batch_invariant_ops.proof import probe, same_bits
from batch_invariant_ops.tiles import PLAIN, SPECIALISED, Tile, card

try:
    import triton
    import triton.language as tl
except ImportError:  # the CPU form needs no Triton
    triton = None
try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # nor does the form with pointers need an up-to-date one
    TensorDescriptor = None

SUPPORTED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SUMS_A_PLACE = 4096
"""Sums that are compared for each place of a row, before the vendor may run many rows at a time on a CPU."""
CPU_ROWS = (16, 8, 4, 2)
COPIED = 16
"""Bytes that the copy engine asks an address and a row's distance to be a multiple of."""
MULTIPROCESSORS = 4
"""Taken for those of a device that has none: the interpreter's, the compiler's."""

if triton is not None:

    @triton.jit
    def _place(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
        """Row and column of a tile: groups of GROUP_M rows of tiles share columns in L2."""
        in_group = GROUP_M * tiles_n
        first_m = (tile // in_group) * GROUP_M
        group_m = min(tiles_m - first_m, GROUP_M)
        return first_m + (tile % in_group) % group_m, (tile % in_group) // group_m

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
        EVEN_K: tl.constexpr, SWAP: tl.constexpr, HAS_BIAS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
        FOLLOWS: tl.constexpr,
    ):  # fmt: skip
        """c[m, n] = round(bias[n] + sum over k ascending of a[m, k]·b[k, n]), one tile of one batch entry a program."""
        if FOLLOWS:
            dependent.follow()
        tile_m, tile_n = _place(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
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

        # times 0.0 it leaves a sum of fp32 as it is, also one of -0.0, as of products that are too small for fp32
        NOTHING: tl.constexpr = -0.0 if a_ptr.dtype.element_ty == tl.float32 else 0.0
        # never 0, else there is a way around the loop, for which ptxas has each wgmma wait for the one before
        for k in range(0, tl.maximum(tl.cdiv(K, BLOCK_K), 1)):
            if EVEN_K:
                a = tl.load(a_at)
                b = tl.load(b_at)
            else:
                inside = ks < K - k * BLOCK_K
                if SWAP:
                    a = tl.load(a_at, mask=inside[:, None], other=NOTHING)
                    b = tl.load(b_at, mask=inside[None, :], other=0.0)
                else:
                    a = tl.load(a_at, mask=inside[None, :], other=NOTHING)
                    b = tl.load(b_at, mask=inside[:, None], other=0.0)
            if SWAP:
                sums = tl.dot(b, a, sums, input_precision=PRECISION)
            else:
                sums = tl.dot(a, b, sums, input_precision=PRECISION)
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

    @triton.jit
    def _copied_tile(
        a_of, b_of, bias_ptr, c_of, tile, M, N, K,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
        SWAP: tl.constexpr, HAS_BIAS: tl.constexpr, PARTS: tl.constexpr,
    ):  # fmt: skip
        """One tile of c. What lies beyond an edge is read as 0, which adds nothing, and is not written."""
        tile_m, tile_n = _place(tile, tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
        m = tile_m * BLOCK_M
        n = tile_n * BLOCK_N
        # never 0, else there is a way around the loop, for which ptxas has each wgmma wait for the one before
        steps = tl.maximum(tl.cdiv(K, BLOCK_K), 1)
        if SWAP:
            sums = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        else:
            sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for step in range(steps):
            a = a_of.load([m, step * BLOCK_K])
            b = b_of.load([n, step * BLOCK_K])
            if SWAP:
                sums = tl.dot(b, a.T, sums, input_precision="ieee")
            else:
                sums = tl.dot(a, b.T, sums, input_precision="ieee")
        if HAS_BIAS:
            columns = n + tl.arange(0, BLOCK_N)
            bias = tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)
            if SWAP:
                sums += bias[:, None]
            else:
                sums += bias[None, :]
        if SWAP:
            c_of.store([m, n], sums.to(c_of.dtype).T)
        elif PARTS == 2:
            left, right = tl.split(tl.permute(tl.reshape(sums, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
            c_of.store([m, n], left.to(c_of.dtype))
            c_of.store([m, n + BLOCK_N // 2], right.to(c_of.dtype))
        else:
            c_of.store([m, n], sums.to(c_of.dtype))

    # descriptors carry shapes and strides, so that one compiled kernel serves all of them
    @triton.jit(do_not_specialize=["M", "N", "K"])
    def _copying_kernel(
        a_of, b_of, bias_ptr, c_of, M, N, K,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
        SWAP: tl.constexpr, HAS_BIAS: tl.constexpr, PARTS: tl.constexpr,
        PERSISTENT: tl.constexpr, FLATTENED: tl.constexpr, FOLLOWS: tl.constexpr,
    ):  # fmt: skip
        """c[m, n] = round(bias[n] + sum over k ascending of a[m, k]·b[n, k]), by descriptors of a, b and c.

        A program works on one tile, or on every so manieth; flattened, it reads the next one's first operands while
        it writes what it has.
        """
        if FOLLOWS:
            dependent.follow()
        if PERSISTENT:
            tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
            for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTENED):
                _copied_tile(
                    a_of, b_of, bias_ptr, c_of, tile, M, N, K,
                    BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, SWAP, HAS_BIAS, PARTS,
                )  # fmt: skip
        else:
            _copied_tile(
                a_of, b_of, bias_ptr, c_of, tl.program_id(0), M, N, K,
                BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, SWAP, HAS_BIAS, PARTS,
            )  # fmt: skip

    KERNELS = (_place, _copied_tile, _copying_kernel, _matmul_kernel, *dependent.KERNELS, *specialised.KERNELS)


def gemm(
    a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None, *, tile: Tile | None = None
) -> torch.Tensor:
    """a [M, K] · b [K, N] + bias [N] → [M, N], all of one type of fp32, bf16 and fp16, any strides.

    On a GPU, fp32 operands are cut to TF32 where ``torch.backends.cuda.matmul.fp32_precision`` is "tf32", as
    ``torch.set_float32_matmul_precision("high")`` makes it: other bits, as batch invariant.

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
    return _launch(a, b, bias, tile or tiles.choose(num_rows, num_columns, depth, a.dtype, *card(a.device)))


def warm_up(a: torch.Tensor, b: torch.Tensor, *, tile: Tile) -> Any:
    """Compile the kernel that :func:`gemm` would run, without running it; the operands may be on torch's meta device.

    Returns:
        Triton's compiled kernel.
    """
    kernel, grid, operands, options = _call(a[None], b[None], None, a.new_empty(1, a.shape[0], b.shape[1]), tile)
    return kernel.warmup(*operands, grid=grid, **options)


def _launch(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, tile: Tile) -> torch.Tensor:
    c = a.new_empty(a.shape[0], a.shape[1], b.shape[2])
    bias = None if bias is None else bias.contiguous()
    kernel, grid, operands, options = _call(a, b, bias, c, tile)
    with on_device_of(a):
        try:
            _launcher(kernel)(_launch_key(a, operands, options), (*grid, 1), operands, options)
        except Exception as error:  # whatever a compiler may raise
            if kernel not in specialised.KERNELS:
                raise
            specialised.give_up(error)
            return _launch(a, b, bias, tile)
    return c


_launcher = functools.cache(Launcher)


def _launch_key(a: torch.Tensor, operands: tuple[Any, ...], options: dict[str, Any]) -> Hashable:
    return a.get_device(), *options.values(), *map(seen, operands)


Call = tuple[Any, tuple[int, int], tuple[Any, ...], dict[str, Any]]
"""A kernel, its grid, its arguments and its options."""


def _call(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, c: torch.Tensor, tile: Tile) -> Call:
    """What computes c [Z, M, N] of a [Z, M, K] and b [Z, K, N]: in the tile's form, or with pointers if need be."""
    kernel, grid, operands, options = _formed(a, b, bias, c, tile)
    follows = tile.follows and dependent.follows(_capability(a.device))
    return kernel, grid, operands, options | {"FOLLOWS": follows} | dependent.options(follows)


def _formed(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, c: torch.Tensor, tile: Tile) -> Call:
    if tile.form != PLAIN and a.itemsize != 2:
        tile = tiles.FP32  # the other's stages were counted for 16-bit operands
    if tile.form != PLAIN and a.shape[0] == 1 and _has_copy_engine(a.device):
        x, w, y = a[0], b[0].t(), c[0]
        if _copies(x) and _copies(w) and _copies(y):
            if tile.form == SPECIALISED and specialised.serves(tile, a.shape[2], _capability(a.device)):
                return specialised.call(x, w, bias, y, tile)
            return _by_copies(x, w, bias, y, tile.general)
    return _by_pointers(a, b, bias, c, tile.general)


def _by_pointers(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, c: torch.Tensor, tile: Tile) -> Call:
    entries, num_rows, depth = a.shape
    num_columns = b.shape[2]
    extents = (t.numel() if t.is_contiguous() else _extent(t) for t in (a, b, c))
    # one entry's stride would be M*K, by which Triton would compile anew for some numbers of rows
    strides = [t.stride() if entries > 1 else (0, *t.stride()[1:]) for t in (a, b, c)]
    grid = (tile.programs(num_rows, num_columns), entries)
    operands = (a, b, bias, c, num_rows, num_columns, depth, *strides[0], *strides[1], *strides[2])
    return _matmul_kernel, grid, operands, {
        "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "GROUP_M": tile.group,
        "EVEN_K": depth % tile.k == 0, "SWAP": tile.swap, "HAS_BIAS": bias is not None, "WIDE": max(extents) >= 2**31,
        "PRECISION": "tf32" if reduction.in_tf32(a.dtype) else "ieee",
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip


def _by_copies(a: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, c: torch.Tensor, tile: Tile) -> Call:
    """For a [M, K], w [N, K] and c [M, N], each of which the copy engine can read or write."""
    (num_rows, depth), num_columns = a.shape, w.shape[0]
    blocks = ((a, tile.m, tile.k), (w, tile.n, tile.k), (c, tile.m, tile.n // tile.parts))
    described = [TensorDescriptor(t, [*t.shape], [row_step(t), 1], [height, width]) for t, height, width in blocks]
    programs = tile.programs(num_rows, num_columns)
    if tile.stays:
        programs = min(programs, _multiprocessors(a.device) * tile.residents)
    operands = (described[0], described[1], bias, described[2], num_rows, num_columns, depth)
    return _copying_kernel, (programs, 1), operands, {
        "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "GROUP_M": tile.group, "SWAP": tile.swap,
        "HAS_BIAS": bias is not None, "PARTS": tile.parts, "PERSISTENT": tile.stays, "FLATTENED": tile.flattened,
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip


def copies(n: int, k: int) -> bool:
    """Whether the copy engine, where there is one, serves x [m, k] · w [n, k]ᵀ of contiguous 16-bit operands."""
    return n * 2 % COPIED == 0 and k * 2 % COPIED == 0


def _copies(tensor: torch.Tensor) -> bool:
    """Whether the copy engine can read and write a matrix of 16-bit elements."""
    address = 0 if tensor.is_meta else tensor.data_ptr()
    row = row_step(tensor)
    return (
        (tensor.stride(1) == 1 or tensor.shape[1] == 1)
        and 0 < row < 2**31
        and row * tensor.itemsize % COPIED == 0
        and address % COPIED == 0
        and max(tensor.shape) < 2**31 - 2**16  # a block that begins before the end may reach beyond it
    )


def _extent(tensor: torch.Tensor) -> int:
    """Elements between a tensor's first and last, plus one: what an offset into it must be able to hold."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _interpreted() -> bool:
    return triton is not None and triton.knobs.runtime.interpret


def _has_copy_engine(device: torch.device) -> bool:
    """Whether there is one, and a Triton that knows it; the interpreter imitates it."""
    if TensorDescriptor is None:
        return False
    return _capability(device) >= (9, 0) or (device.type == "cpu" and _interpreted())


def _capability(device: torch.device) -> tuple[int, int]:
    """Of a GPU, or of the one that a meta tensor's kernels are compiled for; (0, 0) elsewhere."""
    if device.type == "meta":
        major, minor = divmod(triton.runtime.driver.active.get_current_target().arch, 10)
        return major, minor
    return card(device)[1]


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


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
