"""y = x / √(mean(x²) + ε) · w over the last dimension, alone or after x + residual; a row a program."""

from __future__ import annotations

import functools
from typing import Any

import torch

from batch_invariant_ops.ops import dependent, opaque
from batch_invariant_ops.ops.launching import Launcher, empty
from batch_invariant_ops.ops.rows import ALIGNMENT, as_rows, check_dtype, is_aligned, on_device_of, uses_triton
from batch_invariant_ops.reduction import block_size, num_warps, tree_sum
from batch_invariant_ops.tiles import card

try:
    import triton
    import triton.language as tl
except ImportError:  # the CPU form needs no Triton
    triton = None

if triton is not None:

    @triton.jit(
        do_not_specialize=["x_stride", "residual_stride"],
        do_not_specialize_on_alignment=["x_ptr", "residual_ptr", "weight_ptr", "out_ptr", "sum_ptr"],
    )
    def _rms_norm_kernel(
        x_ptr, residual_ptr, weight_ptr, out_ptr, sum_ptr,
        x_stride, residual_stride, n_cols, eps,
        BLOCK: tl.constexpr, ONE_BLOCK: tl.constexpr, ALIGNED: tl.constexpr, FOLLOWS: tl.constexpr,
        HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    ):  # fmt: skip
        """s = round(x + residual); out = round(round_w(s·rsqrt(mean(s²) + eps))·w), where round_w is to w's type."""
        if FOLLOWS:
            dependent.follow()
        row = tl.program_id(0).to(tl.int64)
        x_row = x_ptr + row * x_stride
        residual_row = residual_ptr + row * residual_stride
        out_row = out_ptr + row * n_cols
        sum_row = sum_ptr + row * n_cols
        if ALIGNED:
            x_row = tl.multiple_of(x_row, 16)
            residual_row = tl.multiple_of(residual_row, 16)
            out_row = tl.multiple_of(out_row, 16)
            sum_row = tl.multiple_of(sum_row, 16)
            weight_ptr = tl.multiple_of(weight_ptr, 16)
        lanes = tl.arange(0, BLOCK)
        out_type = out_ptr.dtype.element_ty
        weight_type = weight_ptr.dtype.element_ty

        if ONE_BLOCK:
            inside = lanes < n_cols
            x = tl.load(x_row + lanes, mask=inside, other=0.0).to(tl.float32)
            if HAS_RESIDUAL:
                x += tl.load(residual_row + lanes, mask=inside, other=0.0).to(tl.float32)
                rounded = x.to(out_type)
                tl.store(sum_row + lanes, rounded, mask=inside)
                x = rounded.to(tl.float32)
            scale = tl.rsqrt(tl.sum(x * x) / n_cols + eps)
            y = x * scale
            if HAS_WEIGHT:
                weight = tl.load(weight_ptr + lanes, mask=inside, other=0.0).to(tl.float32)
                y = (y.to(weight_type).to(tl.float32) * weight).to(weight_type)
            tl.store(out_row + lanes, y.to(out_type), mask=inside)
        else:
            squares = tl.zeros((BLOCK,), dtype=tl.float32)
            for start in range(0, n_cols, BLOCK):
                columns = start + lanes
                inside = columns < n_cols
                x = tl.load(x_row + columns, mask=inside, other=0.0).to(tl.float32)
                if HAS_RESIDUAL:
                    x += tl.load(residual_row + columns, mask=inside, other=0.0).to(tl.float32)
                    rounded = x.to(out_type)
                    tl.store(sum_row + columns, rounded, mask=inside)
                    x = rounded.to(tl.float32)
                squares += x * x
            scale = tl.rsqrt(tl.sum(squares) / n_cols + eps)
            for start in range(0, n_cols, BLOCK):
                columns = start + lanes
                inside = columns < n_cols
                x = tl.load(x_row + columns, mask=inside, other=0.0).to(tl.float32)
                if HAS_RESIDUAL:
                    # added again rather than read back: another thread may have stored this lane's sum
                    x += tl.load(residual_row + columns, mask=inside, other=0.0).to(tl.float32)
                    x = x.to(out_type).to(tl.float32)
                y = x * scale
                if HAS_WEIGHT:
                    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
                    y = (y.to(weight_type).to(tl.float32) * weight).to(weight_type)
                tl.store(out_row + columns, y.to(out_type), mask=inside)

    _launch = Launcher(_rms_norm_kernel)


def rms_norm(
    input: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    residual: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Root-mean-square norm over the last dimension, each row's bits independent of all other rows.

    The mean and the scale are fp32. The scaled row is rounded to the weight's type, multiplied by the weight in that
    type, and rounded to the input's type, as in vLLM's ``RMSNorm``. Opaque to ``torch.compile``, differentiable.

    Args:
        input: [..., n], fp32, fp16 or bf16, any strides.
        weight: [n] of one of these types, or None.
        eps: ε.
        residual: shape and type of ``input``; added first.

    Returns:
        The norm; with a residual, the norm of ``input + residual`` rounded to the input's type, and that sum.

    Raises:
        ValueError: shapes, types or devices that do not go together.
    """
    if residual is None:
        return torch.ops.batch_invariant_ops.rms_norm(input, weight, eps)
    return torch.ops.batch_invariant_ops.fused_add_rms_norm(input, residual, weight, eps)


def _rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    return _run(x, None, weight, eps)[0]


def _fused_add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return _run(x, residual, weight, eps)


def _run(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(x, residual, weight)
    if x.numel() == 0:
        return x.new_empty(x.shape), x.new_empty(x.shape)
    if not uses_triton(x):
        return _on_cpu(x, residual, weight, eps)
    length = x.shape[-1]
    rows = as_rows(x, length)
    residual_rows = rows if residual is None else as_rows(residual, length)
    if weight is not None and (weight.data_ptr() % ALIGNMENT or not weight.is_contiguous()):
        weight = weight.clone(memory_format=torch.contiguous_format)
    steps = rows.stride(0), residual_rows.stride(0)
    num_rows, has_residual, has_weight = rows.shape[0], residual is not None, weight is not None
    with on_device_of(x):
        out = empty(num_rows, length, x)
        total = empty(num_rows, length, x) if has_residual else out
        weight_or_any = out if weight is None else weight
        constants, options = _compiled_for(length, x.dtype, x.device)
        key = (
            x.get_device(), x.dtype, weight_or_any.dtype, length, has_residual, has_weight,
            steps[0] < 2**31, steps[1] < 2**31,
        )  # fmt: skip
        operands = (
            rows, residual_rows, weight_or_any, out, total, *steps, length, eps, *constants, has_residual, has_weight,
        )  # fmt: skip
        _launch(key, (num_rows, 1, 1), operands, options)
    if x.dim() != 2:
        return out.view(x.shape), total.view(x.shape)
    return out, total


@functools.cache
def _compiled_for(
    length: int, dtype: torch.dtype, device: torch.device
) -> tuple[tuple[int, bool, bool, bool], dict[str, Any]]:
    """The kernel's BLOCK, ONE_BLOCK, ALIGNED and FOLLOWS, and its options."""
    block, follows = block_size(length), dependent.follows(card(device)[1])
    constants = block, length <= block, is_aligned(length, dtype), follows
    return constants, {"num_warps": num_warps(block)} | dependent.options(follows)


def _on_cpu(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    total = x.contiguous()
    if residual is not None:
        total = (total.float() + residual.contiguous().float()).to(x.dtype)
    total32 = total.float()
    out = total32 * torch.rsqrt(tree_sum(total32 * total32) / x.shape[-1] + eps)
    if weight is not None:
        out = out.to(weight.dtype) * weight
    return out.to(x.dtype), total


def _check(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor | None) -> None:
    check_dtype(x, "rms_norm")
    if x.dim() == 0:
        raise ValueError("rms_norm: the input needs at least one dimension")
    if residual is not None and not (
        residual.shape == x.shape and residual.dtype == x.dtype and residual.device == x.device
    ):
        raise ValueError(
            f"rms_norm: the residual is {residual.dtype} {list(residual.shape)} on {residual.device}, "
            f"the input is {x.dtype} {list(x.shape)} on {x.device}: they must be alike"
        )
    if weight is not None:
        check_dtype(weight, "rms_norm's weight")
        if weight.shape != x.shape[-1:] or weight.device != x.device:
            raise ValueError(
                f"rms_norm: the weight is {list(weight.shape)} on {weight.device}, "
                f"{list(x.shape[-1:])} on {x.device} is needed"
            )


def _fake(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    return x.new_empty(x.shape)


def _fake_fused(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _save(ctx, inputs, output) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _save_fused(ctx, inputs, output) -> None:
    _, _, weight, ctx.eps = inputs
    ctx.save_for_backward(output[1], weight)


def _backward(ctx, dy: torch.Tensor):
    """With s = rsqrt(mean(x²) + ε) and g = dy·w: dx = s·g - x·s³·mean(g·x), dw = Σ over rows of dy·x·s."""
    x, weight = ctx.saved_tensors
    x32, dy32, n = x.float(), dy.float(), x.shape[-1]
    scale = torch.rsqrt(tree_sum(x32 * x32) / n + ctx.eps)
    g = dy32 if weight is None else dy32 * weight.float()
    dx = scale * g - x32 * scale**3 * (tree_sum(g * x32) / n)
    dw = None if weight is None else (dy32 * x32 * scale).reshape(-1, n).sum(0).to(weight.dtype)
    return dx.to(x.dtype), dw, None


def _backward_fused(ctx, dy: torch.Tensor, dsum: torch.Tensor):
    dx, dw, _ = _backward(ctx, dy)
    dx = dx + dsum
    return dx, dx.clone(), dw, None


opaque.define(
    "rms_norm(Tensor x, Tensor? weight, float eps) -> Tensor",
    gpu=_rms_norm, cpu=_rms_norm, fake=_fake, save=_save, backward=_backward,
)  # fmt: skip
opaque.define(
    "fused_add_rms_norm(Tensor x, Tensor residual, Tensor? weight, float eps) -> (Tensor, Tensor)",
    gpu=_fused_add_rms_norm, cpu=_fused_add_rms_norm, fake=_fake_fused, save=_save_fused, backward=_backward_fused,
)  # fmt: skip
