"""c[z] = a[z]·b[z] as an op that ``torch.compile`` does not look into; the kernel is matmul's."""

from __future__ import annotations

import torch

from batch_invariant_ops.ops import matmul, opaque


def bmm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a [Z, M, K] · b [Z, K, N] → [Z, M, N], fp32, fp16 or bf16: each row's bits independent of all other rows.

    Opaque to ``torch.compile``, differentiable.

    Raises:
        ValueError: shapes, types or devices that do not go together.
    """
    return torch.ops.batch_invariant_ops.bmm(a, b)


def _bmm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return matmul.bmm(a, b).contiguous()


def _fake(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a.new_empty(a.shape[0], a.shape[1], b.shape[2])


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, dc: torch.Tensor):
    """da = dc·bᵀ, db = aᵀ·dc."""
    a, b = ctx.saved_tensors
    return bmm(dc, b.mT), bmm(a.mT, dc)


opaque.define(
    "bmm(Tensor a, Tensor b) -> Tensor",
    gpu=_bmm, cpu=_bmm, fake=_fake, save=_save, backward=_backward,
)  # fmt: skip
