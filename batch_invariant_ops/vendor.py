"""The settings under which a vendor's GEMM may keep the contract, set in one place, before it reads them.

cuBLAS and cuBLASLt choose kernels that split K when they have workspace for the partial sums; without it they do not.
Measured on Hopper (see docs/): with these settings cuBLASLt gives the bits of the ascending-K Triton kernel. They are
necessary, not sufficient: :mod:`batch_invariant_ops.proof` decides, shape by shape.
"""

from __future__ import annotations

import os

import torch

WORKSPACES = {"CUBLAS_WORKSPACE_CONFIG": ":16:8", "CUBLASLT_WORKSPACE_SIZE": "1"}


def set_environment() -> None:
    """Deny cuBLAS and cuBLASLt the workspace to split K; read by torch when the first handle is made."""
    os.environ.update(WORKSPACES)


def prepare() -> None:
    """Set everything in this process that the vendor's GEMM and the proof depend on.

    Raises:
        RuntimeError: a cuBLAS handle was made before, with another workspace, so that the settings come too late.
    """
    if (
        torch.cuda.is_initialized()
        and os.environ.get("CUBLASLT_WORKSPACE_SIZE") != WORKSPACES["CUBLASLT_WORKSPACE_SIZE"]
    ):
        raise RuntimeError(
            "CUDA was used before CUBLASLT_WORKSPACE_SIZE=1 was set: set it in the environment of the process"
        )
    set_environment()
    matmul = torch.backends.cuda.matmul
    matmul.allow_bf16_reduced_precision_reduction = (False, False)
    matmul.allow_fp16_reduced_precision_reduction = (False, False)
    matmul.fp32_precision = "ieee"
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    torch.backends.cudnn.rnn.fp32_precision = "ieee"
    if torch.cuda.is_available():
        torch.backends.cuda.preferred_blas_library("cublaslt")
