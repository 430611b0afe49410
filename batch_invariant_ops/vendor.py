"""The settings under which a vendor's GEMM may keep the contract, set in one place, before it reads them.

cuBLAS and cuBLASLt choose kernels that split K when they have workspace for the partial sums; without it they do not.
So :mod:`batch_invariant_ops.ops.cublaslt` gives it none, and these settings deny it to torch's own calls. cuBLASLt then
was seen to give the bits of the ascending-K Triton kernel on Hopper. They are necessary, not sufficient:
:mod:`batch_invariant_ops.proof` decides, shape by shape, on the device at hand.
"""

from __future__ import annotations

import os
from typing import Any

import torch

WORKSPACES = {"CUBLAS_WORKSPACE_CONFIG": ":16:8", "CUBLASLT_WORKSPACE_SIZE": "1"}
_asked_for: dict[str, str] = {}


def set_environment() -> None:
    """Deny cuBLAS and cuBLASLt the workspace to split K; read by torch when the first handle is made.

    A value that the user set stays: where torch calls the vendor and it then splits K, the proof fails and our kernel
    runs. What was found first is what is set again later, because vLLM's mode writes its own value in between.
    """
    for name, value in WORKSPACES.items():
        os.environ[name] = _asked_for.setdefault(name, os.environ.get(name, value))


def prepare() -> None:
    """Set everything in this process that the vendor's GEMM and the proof depend on, and check that it took.

    Raises:
        RuntimeError: CUDA is in use and the workspace was not denied before, so that the settings come too late; or
            a setting does not stay as it was set.
    """
    if torch.cuda.is_initialized() and (late := [name for name in WORKSPACES if name not in os.environ]):
        missing = " and ".join(f"{name}={WORKSPACES[name]}" for name in late)
        raise RuntimeError(f"CUDA was used before {missing} was set: set it in the environment of the process")
    set_environment()
    matmul: Any = torch.backends.cuda.matmul
    matmul.allow_bf16_reduced_precision_reduction = (False, False)
    matmul.allow_fp16_reduced_precision_reduction = (False, False)
    matmul.allow_fp16_accumulation = False
    cudnn: Any = torch.backends.cudnn
    for backend in (matmul, cudnn.conv, cudnn.rnn):
        backend.fp32_precision = "ieee"
    if torch.cuda.is_available():
        torch.backends.cuda.preferred_blas_library("cublaslt")
    if changed := unsettled():
        raise RuntimeError(f"settings that the vendor's GEMM needs did not stay: {', '.join(changed)}")


def unsettled() -> list[str]:
    """What of :func:`prepare`'s settings is not, or no longer, in force in this process."""
    matmul: Any = torch.backends.cuda.matmul
    found: dict[str, tuple[Any, Any]] = {
        f"torch.backends.cuda.matmul.{name}": (getattr(matmul, name), needed)
        for name, needed in (
            ("allow_bf16_reduced_precision_reduction", False),
            ("allow_fp16_reduced_precision_reduction", False),
            ("allow_fp16_accumulation", False),
            ("fp32_precision", "ieee"),
        )
    }
    found |= {name: (os.environ.get(name), _asked_for.get(name)) for name in WORKSPACES}
    if torch.cuda.is_available():
        library = torch.backends.cuda.preferred_blas_library()
        found["torch.backends.cuda.preferred_blas_library()"] = (library, torch._C._BlasBackend.Cublaslt)
    return [f"{name} is {value!r}, not {needed!r}" for name, (value, needed) in found.items() if value != needed]
