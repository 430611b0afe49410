"""The vendor's GEMM, called past any mode: cuBLASLt on a GPU that has it, else aten's own mm and addmm, by device."""

from __future__ import annotations

import torch

from batch_invariant_ops.ops import cublaslt

_KEYS = {name: torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)) for name in ("CPU", "CUDA")}
# Taken when this module is imported, before a mode can replace them. Which devices there are is asked of the build:
# asking the driver would make CUDA unusable in a process that is forked later.
_DEVICES = ("CPU", "CUDA") if torch.backends.cuda.is_built() else ("CPU",)
_MM = {name: torch.library.get_kernel("aten::mm", name) for name in _DEVICES}
_ADDMM = {name: torch.library.get_kernel("aten::addmm", name) for name in _DEVICES}


def call(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, rank: int | None = None) -> torch.Tensor:
    """a [M, K] · b [K, N] + bias [N], operands laid out as for :func:`cublaslt.gemm`, and ``rank`` as there.

    Raises:
        cublaslt.NoKernel: cuBLASLt has none for this shape.
    """
    device = "CPU"
    if a.is_cuda:
        if cublaslt.library() is not None:
            return cublaslt.gemm(a, b, bias, rank)
        device = "CUDA"
    if rank:
        raise cublaslt.NoKernel("aten has one kernel")
    if bias is None:
        return _MM[device].call_boxed(_KEYS[device], a, b)
    return _ADDMM[device].call_boxed(_KEYS[device], bias, a, b)


def kernel(shape: cublaslt.Shape, num_rows: int) -> bytes | None:
    """What tells the kernel that :func:`call` runs on a GPU from others; None where there is none, or nobody tells."""
    if cublaslt.library() is None:
        return None
    try:
        return cublaslt.kernel(shape, num_rows)
    except cublaslt.NoKernel:
        return None


def name(device: torch.device) -> str:
    """What :func:`call` calls, for which alone a proof holds."""
    return "cublasLtMatmul" if device.type == "cuda" and cublaslt.library() is not None else "aten"
