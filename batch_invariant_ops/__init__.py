"""Batch-invariant operations: one row's bits do not depend on the batch that it is computed in."""

from batch_invariant_ops._version import __version__
from batch_invariant_ops.mode import (
    AttentionBlockSize,
    disable_batch_invariant_mode,
    enable_batch_invariant_mode,
    get_batch_invariant_attention_block_size,
    is_batch_invariant_mode_enabled,
    set_batch_invariant_mode,
)
from batch_invariant_ops.ops.bmm import bmm
from batch_invariant_ops.ops.linear import linear
from batch_invariant_ops.ops.log_softmax import log_softmax
from batch_invariant_ops.ops.matmul import matmul_persistent
from batch_invariant_ops.ops.mean import mean, mean_dim
from batch_invariant_ops.ops.rms_norm import rms_norm
from batch_invariant_ops.ops.softmax import softmax
from batch_invariant_ops.ops.topk import topk

__all__ = [
    "AttentionBlockSize",
    "__version__",
    "bmm",
    "disable_batch_invariant_mode",
    "enable_batch_invariant_mode",
    "get_batch_invariant_attention_block_size",
    "is_batch_invariant_mode_enabled",
    "linear",
    "log_softmax",
    "matmul_persistent",
    "mean",
    "mean_dim",
    "rms_norm",
    "set_batch_invariant_mode",
    "softmax",
    "topk",
]
