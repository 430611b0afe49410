"""log_softmax(x) = x - max(x) - log Σ exp(x - max(x)) along one dimension; a row a program."""

from __future__ import annotations

import torch

from batch_invariant_ops.ops import opaque
from batch_invariant_ops.ops.rows import as_rows, check_dtype, is_aligned, on_device_of, uses_triton
from batch_invariant_ops.reduction import block_size, num_warps, tree_sum

try:
    import triton
    import triton.language as tl
except ImportError:  # the CPU form needs no Triton
    triton = None

if triton is not None:

    @triton.jit(do_not_specialize=["x_stride"], do_not_specialize_on_alignment=["x_ptr", "out_ptr"])
    def _softmax_kernel(
        x_ptr, out_ptr, x_stride, n_cols,
        BLOCK: tl.constexpr, ONE_BLOCK: tl.constexpr, ALIGNED: tl.constexpr, LOG: tl.constexpr,
    ):  # fmt: skip
        """LOG: out = (x - max) - log Σ exp(x - max), else out = exp(x - max) / Σ exp(x - max)."""
        row = tl.program_id(0).to(tl.int64)
        x_row = x_ptr + row * x_stride
        out_row = out_ptr + row * n_cols
        if ALIGNED:
            x_row = tl.multiple_of(x_row, 16)
            out_row = tl.multiple_of(out_row, 16)
        lanes = tl.arange(0, BLOCK)
        lowest = -float("inf")
        if ONE_BLOCK:
            inside = lanes < n_cols
            x = tl.load(x_row + lanes, mask=inside, other=lowest).to(tl.float32)
            x -= tl.max(x)
            e = tl.where(inside, tl.exp(x), 0.0)
            if LOG:
                y = x - tl.log(tl.sum(e))
            else:
                y = e / tl.sum(e)
            tl.store(out_row + lanes, y.to(out_ptr.dtype.element_ty), mask=inside)
        else:
            largest = tl.full((BLOCK,), lowest, dtype=tl.float32)
            for start in range(0, n_cols, BLOCK):
                columns = start + lanes
                x = tl.load(x_row + columns, mask=columns < n_cols, other=lowest).to(tl.float32)
                largest = tl.maximum(largest, x)
            top = tl.max(largest)
            sums = tl.zeros((BLOCK,), dtype=tl.float32)
            for start in range(0, n_cols, BLOCK):
                columns = start + lanes
                inside = columns < n_cols
                x = tl.load(x_row + columns, mask=inside, other=lowest).to(tl.float32)
                sums += tl.where(inside, tl.exp(x - top), 0.0)
            total = tl.sum(sums)
            for start in range(0, n_cols, BLOCK):
                columns = start + lanes
                inside = columns < n_cols
                x = tl.load(x_row + columns, mask=inside, other=lowest).to(tl.float32) - top
                if LOG:
                    y = x - tl.log(total)
                else:
                    y = tl.exp(x) / total
                tl.store(out_row + columns, y.to(out_ptr.dtype.element_ty), mask=inside)


def log_softmax(input: torch.Tensor, dim: int = -1, dtype: torch.dtype | None = None) -> torch.Tensor:
    """log_softmax along ``dim``, each row's bits independent of all other rows.

    fp32 inside. Opaque to ``torch.compile``, differentiable. The result is contiguous.

    Args:
        input: fp32, fp16 or bf16, any shape and strides.
        dim: the dimension that sums to one.
        dtype: of the result; the input's by default.

    Raises:
        ValueError: another type.
        IndexError: no such dimension.
    """
    return torch.ops.batch_invariant_ops.log_softmax(input, dim, dtype)


def run(x: torch.Tensor, dim: int, dtype: torch.dtype | None, log: bool) -> torch.Tensor:
    """The softmax of x along ``dim``, or its logarithm, in ``dtype``; contiguous."""
    check_dtype(x, "log_softmax" if log else "softmax")
    dtype = dtype or x.dtype
    if dtype not in (torch.float32, x.dtype):
        raise ValueError(f"softmax of {x.dtype} as {dtype} is not supported: {x.dtype} or torch.float32")
    dim = check_dim(x, dim)
    if x.numel() == 0 or x.dim() == 0:
        return torch.empty(x.shape, dtype=dtype, device=x.device).fill_(0.0 if log else 1.0)
    moved = x.movedim(dim, -1)
    length = moved.shape[-1]
    if uses_triton(x):
        rows = as_rows(moved, length)
        out = torch.empty(moved.shape, dtype=dtype, device=x.device)
        block = block_size(length)
        with on_device_of(x):
            _softmax_kernel[(rows.shape[0],)](
                rows, out, rows.stride(0), length,
                BLOCK=block, ONE_BLOCK=length <= block, ALIGNED=is_aligned(length, x.dtype), LOG=log,
                num_warps=num_warps(block),
            )  # fmt: skip
    else:
        x32 = moved.contiguous().float()
        x32 = x32 - x32.amax(-1, keepdim=True)
        e = torch.exp(x32)
        total = tree_sum(e)
        out = (x32 - torch.log(total) if log else e / total).to(dtype)
    return out.movedim(-1, dim).contiguous()


def check_dim(x: torch.Tensor, dim: int) -> int:
    """``dim`` counted from the front; IndexError as torch raises it."""
    bound = max(x.dim(), 1)
    if not -bound <= dim < bound:
        raise IndexError(f"Dimension out of range (expected to be in range of [{-bound}, {bound - 1}], but got {dim})")
    return dim % bound


def fake(x: torch.Tensor, dim: int = -1, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Shape and type of :func:`run`'s result."""
    return torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)


def _log_softmax(x: torch.Tensor, dim: int = -1, dtype: torch.dtype | None = None) -> torch.Tensor:
    return run(x, dim, dtype, log=True)


def save(ctx, inputs, output) -> None:
    """What a backward pass needs: the output, not the input."""
    x, ctx.dim, _ = inputs
    ctx.dtype = x.dtype
    ctx.save_for_backward(output)


def _backward(ctx, dy: torch.Tensor):
    """dx = dy - exp(y)·Σ dy."""
    (y,) = ctx.saved_tensors
    if y.dim() == 0:
        return torch.zeros_like(y, dtype=ctx.dtype), None, None
    dy32 = dy.float().movedim(ctx.dim, -1)
    dx = dy32 - torch.exp(y.float()).movedim(ctx.dim, -1) * tree_sum(dy32)
    return dx.movedim(-1, ctx.dim).to(ctx.dtype), None, None


opaque.define(
    "log_softmax(Tensor x, int dim=-1, ScalarType? dtype=None) -> Tensor",
    gpu=_log_softmax, cpu=_log_softmax, fake=fake, save=save, backward=_backward,
)  # fmt: skip
