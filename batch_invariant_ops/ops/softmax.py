"""softmax(x) = exp(x - max(x)) / Σ exp(x - max(x)) along one dimension; the kernel is log_softmax's."""

from __future__ import annotations

import torch

from batch_invariant_ops.ops import opaque
from batch_invariant_ops.ops.log_softmax import fake, run, save
from batch_invariant_ops.reduction import tree_sum


def softmax(input: torch.Tensor, dim: int = -1, dtype: torch.dtype | None = None) -> torch.Tensor:
    """softmax along ``dim``, each row's bits independent of all other rows.

    fp32 inside. Opaque to ``torch.compile``, differentiable. The result is contiguous.

    Args:
        input: fp32, fp16 or bf16, any shape and strides.
        dim: the dimension that sums to one.
        dtype: of the result; the input's by default.

    Raises:
        ValueError: another type.
        IndexError: no such dimension.
    """
    return torch.ops.batch_invariant_ops.softmax(input, dim, dtype)


def _softmax(x: torch.Tensor, dim: int = -1, dtype: torch.dtype | None = None) -> torch.Tensor:
    return run(x, dim, dtype, log=False)


def _backward(ctx, dy: torch.Tensor):
    """dx = y·(dy - Σ dy·y)."""
    (y,) = ctx.saved_tensors
    if y.dim() == 0:
        return torch.zeros_like(y, dtype=ctx.dtype), None, None
    y32, dy32 = y.float().movedim(ctx.dim, -1), dy.float().movedim(ctx.dim, -1)
    dx = y32 * (dy32 - tree_sum(dy32 * y32))
    return dx.movedim(-1, ctx.dim).to(ctx.dtype), None, None


opaque.define(
    "softmax(Tensor x, int dim=-1, ScalarType? dtype=None) -> Tensor",
    gpu=_softmax, cpu=_softmax, fake=fake, save=save, backward=_backward,
)  # fmt: skip
