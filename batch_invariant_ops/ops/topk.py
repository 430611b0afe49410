"""topk(x, k) = the k largest of each row and where they stand; of equal ones, those that stand first.

aten leaves the order of equal values to the algorithm, and takes another for other numbers of rows and other k. Logits
in bf16 have equal values in most rows, so the alternatives that a server names next to a token would depend on what
else it serves. The order here is by value and then by place: no two elements of a row are equal, and the k largest are
one set in one order, however they are found.
"""

from __future__ import annotations

import torch

from batch_invariant_ops.ops import opaque
from batch_invariant_ops.ops.rows import as_rows, check_dtype, on_device_of, uses_triton

try:
    import triton
    import triton.language as tl
except ImportError:  # the CPU form needs no Triton
    triton = None

LARGEST = 2**31 - 1
"""What NaN counts as, and what places are taken from, so that of equal values the first has the largest key."""
MOST_BY_TRITON = 64
"""k above which rows are sorted: the kernels look through a block k times."""
BLOCK = 4096
ASKED = 20
"""k up to which one compiled kernel serves: the most alternatives that a server names unless told otherwise."""

if triton is not None:
    _LARGEST = tl.constexpr(LARGEST)
    _NONE = tl.constexpr(-(2**63))

    @triton.jit(do_not_specialize=["x_stride", "k"], do_not_specialize_on_alignment=["x_ptr"])
    def _block_kernel(x_ptr, keys_ptr, x_stride, n_cols, k, BLOCK: tl.constexpr):
        """The k largest keys of each block of a row [n_cols], in order; less than any key where the block has fewer."""
        row = tl.program_id(0).to(tl.int64)
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = columns < n_cols
        x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
        bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
        order = tl.where(x != x, _LARGEST, tl.where(bits < 0, bits ^ _LARGEST, bits)).to(tl.int64)
        keys = tl.where(inside, (order << 32) + (_LARGEST - columns), _NONE)
        _store_largest(keys, keys_ptr + (row * tl.num_programs(1) + tl.program_id(1)) * k, k)

    @triton.jit(do_not_specialize=["n_keys", "k"])
    def _merge_kernel(keys_ptr, out_ptr, n_keys, k, BLOCK: tl.constexpr):
        """The k largest of a row's keys [n_keys], in order."""
        row = tl.program_id(0).to(tl.int64)
        lanes = tl.arange(0, BLOCK)
        keys = tl.load(keys_ptr + row * n_keys + lanes, mask=lanes < n_keys, other=_NONE)
        _store_largest(keys, out_ptr + row * k, k)

    @triton.jit
    def _store_largest(keys, out_ptr, k):
        for i in range(k):
            largest = tl.max(keys)
            tl.store(out_ptr + i, largest)
            keys = tl.where(keys == largest, _NONE, keys)


def topk(input: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of each row, from the largest down, and their places; of equal ones, those that stand first.

    A row's result does not depend on other rows, and a smaller k gives the first of a larger one's. As in torch, NaN is
    larger than infinity and 0 is equal to -0. Opaque to ``torch.compile``, differentiable.

    Args:
        input: [..., n], fp32, fp16 or bf16, any strides.
        k: 0 to n.

    Returns:
        Values [..., k] in the input's type, and places [..., k], int64.

    Raises:
        ValueError: another type, no dimension, or another k.
    """
    return torch.ops.batch_invariant_ops.topk(input, k)


def _topk(x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    check_dtype(x, "topk")
    _check(x, k)
    if x.numel() == 0 or k == 0:
        places = torch.empty((*x.shape[:-1], k), dtype=torch.int64, device=x.device)
    elif not uses_triton(x):
        places = _on_cpu(x, k)
    elif k > MOST_BY_TRITON:
        places = _by_sorting(x, k)
    else:
        places = _by_triton(x, k)
    places = places.reshape(*x.shape[:-1], k)
    return x.gather(-1, places), places


def _check(x: torch.Tensor, k: int) -> None:
    if x.dim() == 0:
        raise ValueError("topk: x needs at least one dimension")
    if not 0 <= k <= x.shape[-1]:
        raise ValueError(f"topk: k = {k} is not valid for rows of {x.shape[-1]}: 0 to {x.shape[-1]} is")


def _on_cpu(x: torch.Tensor, k: int) -> torch.Tensor:
    """Places [rows, k]: aten's where a row's largest are all different, and there are no two orders."""
    rows = x.reshape(-1, x.shape[-1])
    values, places = rows.topk(min(k + 1, rows.shape[1]), dim=-1)
    unclear = (values[:, 1:] == values[:, :-1]).any(1) | values[:, 0].isnan()
    places = places[:, :k].contiguous()
    if unclear.any():
        rows, least = rows[unclear], values[unclear, k - 1 : k]
        places[unclear] = _by_sorting(rows, k) if rows.isnan().any() else _first(rows, least, k)
    return places


def _first(rows: torch.Tensor, least: torch.Tensor, k: int) -> torch.Tensor:
    """Places [rows, k]: of a row's elements that are at least its ``least`` [rows, 1], the first k in our order."""
    row, place = (rows >= least).nonzero(as_tuple=True)
    order = rows[row, place].sort(descending=True, stable=True).indices
    order = order[row[order].sort(stable=True).indices]
    starts = torch.searchsorted(row, torch.arange(len(rows)))
    return place[order[starts[:, None] + torch.arange(k)]]


def _by_sorting(x: torch.Tensor, k: int) -> torch.Tensor:
    return x.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def _places(keys: torch.Tensor) -> torch.Tensor:
    return LARGEST - (keys & LARGEST)


def _by_triton(x: torch.Tensor, k: int) -> torch.Tensor:
    """Places [rows, k]: the largest of each block of 4096, then of these."""
    length = x.shape[-1]
    rows = as_rows(x, length)
    blocks = triton.cdiv(length, BLOCK)
    keys = torch.empty((rows.shape[0], blocks * k), dtype=torch.int64, device=x.device)
    with on_device_of(x):
        _block_kernel[(rows.shape[0], blocks)](rows, keys, rows.stride(0), length, k, BLOCK=BLOCK, num_warps=8)
        if blocks == 1:
            return _places(keys)
        merged = torch.empty((rows.shape[0], k), dtype=torch.int64, device=x.device)
        block = triton.next_power_of_2(blocks * max(k, ASKED))
        _merge_kernel[(rows.shape[0],)](keys, merged, blocks * k, k, BLOCK=block, num_warps=8)
    return _places(merged)


def _fake(x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (*x.shape[:-1], k)
    return x.new_empty(shape), torch.empty(shape, dtype=torch.int64, device=x.device)


def _save(ctx, inputs, output) -> None:
    x, _ = inputs
    ctx.shape = x.shape
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, dy: torch.Tensor, _):
    """dx is dy where the largest stand, and 0 elsewhere."""
    (places,) = ctx.saved_tensors
    return dy.new_zeros(ctx.shape).scatter(-1, places, dy), None


opaque.define(
    "topk(Tensor x, int k) -> (Tensor, Tensor)",
    gpu=_topk, cpu=_topk, fake=_fake, save=_save, backward=_backward,
)  # fmt: skip
