"""mean(x) = Σ x / n over any dimensions; one program an element of the result."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from batch_invariant_ops.ops import opaque
from batch_invariant_ops.ops.log_softmax import check_dim
from batch_invariant_ops.ops.rows import as_rows, check_dtype, is_aligned, on_device_of, split_dims, uses_triton
from batch_invariant_ops.reduction import block_size, num_warps, tree_sum

try:
    import triton
    import triton.language as tl
except ImportError:  # the CPU form needs no Triton
    triton = None

if triton is not None:

    @triton.jit(do_not_specialize=["x_stride"], do_not_specialize_on_alignment=["x_ptr", "out_ptr"])
    def _mean_kernel(x_ptr, out_ptr, x_stride, n_cols, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
        """out = (Σ x in fp32) / n_cols, one row a program."""
        row = tl.program_id(0).to(tl.int64)
        x_row = x_ptr + row * x_stride
        if ALIGNED:
            x_row = tl.multiple_of(x_row, 16)
        lanes = tl.arange(0, BLOCK)
        sums = tl.zeros((BLOCK,), dtype=tl.float32)
        for start in range(0, n_cols, BLOCK):
            columns = start + lanes
            sums += tl.load(x_row + columns, mask=columns < n_cols, other=0.0).to(tl.float32)
        tl.store(out_ptr + row, (tl.sum(sums) / n_cols).to(out_ptr.dtype.element_ty))


def mean(
    input: torch.Tensor,
    dim: int | Sequence[int] | None = None,
    keepdim: bool = False,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Mean over ``dim`` (all dimensions for None or an empty list), each result's bits independent of all others.

    The sum is fp32; one rounding. Opaque to ``torch.compile``, differentiable.

    Args:
        input: fp32, fp16 or bf16, any shape and strides.
        dim: one or more dimensions.
        keepdim: keep the reduced dimensions with size 1.
        dtype: type that the input is taken in, and of the result; the input's by default.

    Raises:
        ValueError: another type.
        IndexError: no such dimension.
    """
    dims = [] if dim is None else [dim] if isinstance(dim, int) else list(dim)
    return torch.ops.batch_invariant_ops.mean(input, dims, keepdim, dtype)


def mean_dim(input: torch.Tensor, dim: int, keepdim: bool = False, dtype: torch.dtype | None = None) -> torch.Tensor:
    """:func:`mean` under the name and with the arguments that Thinking Machines' package gives it.

    Integers give fp32, as there.

    Raises:
        AssertionError: no such dimension, as there.
    """
    assert -input.ndim <= dim < input.ndim, f"Invalid dimension {dim} for tensor with {input.ndim} dimensions"
    if dtype is None and not input.dtype.is_floating_point:
        dtype = torch.float32
    return mean(input if dtype is None else input.to(dtype), dim, keepdim)


def _mean(x: torch.Tensor, dim: Sequence[int], keepdim: bool = False, dtype: torch.dtype | None = None) -> torch.Tensor:
    check_dtype(x, "mean")
    dtype = dtype or x.dtype
    if dtype.itemsize < x.dtype.itemsize or (dtype != x.dtype and dtype != torch.float32):
        x = x.to(dtype)
        check_dtype(x, "mean")
    dims = _dims(x, dim)
    shape = _shape(x, dims, keepdim)
    out = torch.empty(shape, dtype=dtype, device=x.device)
    if out.numel() == 0:
        return out
    rows, length = split_dims(x, dims)
    if length == 0:
        return out.fill_(math.nan)
    if not uses_triton(x):
        return (tree_sum(rows.contiguous()) / length).to(dtype).reshape(shape)
    rows = as_rows(rows, length)
    block = block_size(length)
    with on_device_of(x):
        _mean_kernel[(rows.shape[0],)](
            rows, out, rows.stride(0), length,
            BLOCK=block, ALIGNED=is_aligned(length, x.dtype), num_warps=num_warps(block),
        )  # fmt: skip
    return out


def _dims(x: torch.Tensor, dim: Sequence[int]) -> list[int]:
    dims = sorted(check_dim(x, d) for d in dim) if len(dim) else list(range(x.dim()))
    if len(set(dims)) < len(dims):
        raise ValueError(f"mean: a dimension appears twice in {list(dim)}")
    return dims if x.dim() else []


def _shape(x: torch.Tensor, dims: list[int], keepdim: bool) -> list[int]:
    return [1 if i in dims else n for i, n in enumerate(x.shape) if keepdim or i not in dims]


def _fake(x: torch.Tensor, dim: Sequence[int], keepdim: bool = False, dtype: torch.dtype | None = None) -> torch.Tensor:
    return torch.empty(_shape(x, _dims(x, dim), keepdim), dtype=dtype or x.dtype, device=x.device)


def _save(ctx, inputs, output) -> None:
    x, dim, ctx.keepdim, _ = inputs
    ctx.dims, ctx.shape, ctx.dtype = _dims(x, dim), x.shape, x.dtype


def _backward(ctx, dy: torch.Tensor):
    """dx = dy / n."""
    if not ctx.keepdim:
        for dim in ctx.dims:
            dy = dy.unsqueeze(dim)
    n = math.prod(ctx.shape[dim] for dim in ctx.dims)
    return (dy / n).expand(ctx.shape).to(ctx.dtype), None, None, None


opaque.define(
    "mean(Tensor x, int[] dim, bool keepdim=False, ScalarType? dtype=None) -> Tensor",
    gpu=_mean, cpu=_mean, fake=_fake, save=_save, backward=_backward,
)  # fmt: skip
