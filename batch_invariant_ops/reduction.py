"""The numerics contract: what fixes a row's bits, in words and as plain code.

A GEMM's element, y = x·Wᵀ (+ b), is one fp32 sum with k ascending in the tensor core's own steps, K never split; the
bias joins in fp32; one rounding to the output type. Its tile, warps, stages and operand order are free
(:mod:`batch_invariant_ops.tiles`). fp32 operands are multiplied as they are, each product and sum rounded once (IEEE's
fused multiply-add); where torch's switch asks for TF32, a GPU cuts them to that first. Of either the tile is one,
but on sm_90, where others were seen to have its bits.

A row reduction (norm, softmax, mean) runs in fp32, in an order that follows from the row's length and type alone:

- On a GPU one program reduces one row. Element i belongs to lane i modulo :func:`block_size`; a lane adds its elements
  in ascending order, then the lanes are reduced once, in the order that the block and :func:`num_warps` fix. How
  elements are spread over threads also follows from alignment, so rows are aligned whenever their length allows it,
  and are taken for unaligned otherwise (:mod:`batch_invariant_ops.ops.rows`).
- On a CPU the lanes are added by :func:`tree_sum`.

The two devices give different bits; each is batch invariant.
"""

from __future__ import annotations

import torch

CONTRACT_VERSION = 2
"""Part of every fingerprint; raised whenever a change to this contract changes a bit of any operation's result.

2: an fp32 sum of -0.0 stays -0.0 on a GPU, whatever K.
"""
LARGEST_BLOCK = 8192
SMALLEST_BLOCK = 32


def in_tf32(dtype: torch.dtype) -> bool:
    """Whether products of this type are to be taken in TF32: fp32 ones, where torch's own switch asks for it."""
    return dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"


def block_size(length: int) -> int:
    """Lanes that reduce a row of that length: the power of two that holds it, within bounds."""
    return min(LARGEST_BLOCK, max(SMALLEST_BLOCK, 1 << (length - 1).bit_length()))


def num_warps(block: int) -> int:
    """Warps that a block's lanes are spread over."""
    return max(1, min(16, block // 512))


def tree_sum(x: torch.Tensor) -> torch.Tensor:
    """Σ over the last dimension in fp32, kept as a dimension of size 1.

    The row is padded with zeros to a power of two, then its upper half is added to its lower half until one element
    is left. Only elementwise additions are used: their bits depend neither on threads nor on vector tails, as those of
    ``torch.sum`` do.
    """
    x = x.to(torch.float32)
    length = x.shape[-1]
    width = 1 << max(length - 1, 0).bit_length()
    if width != length:
        x = torch.nn.functional.pad(x, (0, width - length))
    while width > 1:
        width //= 2
        x = x[..., :width] + x[..., width:]
    return x
