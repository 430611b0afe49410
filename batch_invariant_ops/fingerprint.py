"""What a server's bits depend on, field by field, and a short digest of all of it.

Two servers with one fingerprint give one result, whatever they serve beside. The reverse is not promised: a field may
change and no bit with it. Hence a field is in here when it was seen to change a bit, or when nobody can say that it
does not; what only tells how much is served at a time (batch sizes, memory, prefix caching, CUDA graphs) is left out,
because batch invariance is the promise that it does not matter.

A server's name for its model is left out, too: the weights' and settings' bytes are in, which the same model has
under every name.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from batch_invariant_ops._version import __version__
from batch_invariant_ops.reduction import CONTRACT_VERSION

Value = str | int | bool | None
Fields = dict[str, Value]

ISA_FLAGS = (
    *("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni"),
    *("avx_ne_convert", "amx_tile", "amx_int8", "amx_bf16", "amx_fp16"),
    *("asimd", "asimdhp", "asimddp", "bf16", "i8mm", "sve", "sve2", "svebf16"),
)
"""The instruction sets among which oneDNN and ATen choose their kernels."""
VARIABLES = (
    *("CUBLAS_WORKSPACE_CONFIG", "CUBLASLT_WORKSPACE_SIZE", "NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"),
    *("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ONEDNN_DEFAULT_FPMATH_MODE"),
    *("VLLM_BATCH_INVARIANT", "VLLM_CPU_ATTN_SPLIT_KV", "VLLM_CPU_SGL_KERNEL", "VLLM_USE_FLASHINFER_SAMPLER"),
    *("VLLM_USE_BREAKABLE_CUDAGRAPH", "VLLM_FLOAT32_MATMUL_PRECISION"),
)
"""Environment variables that choose kernels or precisions, where they are set."""
NEEDED = ("batch_invariant", "weights", "settings")


def digest(fields: Mapping[str, Value]) -> str:
    """``bi-`` and 16 hex digits of SHA-256; ``plain-`` for a server that is not batch invariant.

    ``partial-`` where the server is, but the model's bytes could not be read: such a fingerprint promises nothing.
    """
    content = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    if not fields.get("batch_invariant"):
        kind = "plain"
    else:
        kind = "partial" if any(fields.get(name) is None for name in NEEDED) else "bi"
    return f"{kind}-{hashlib.sha256(content.encode()).hexdigest()[:16]}"


def libraries() -> Fields:
    """Versions of the code that computes, but vLLM's."""
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = None
    return {
        "kit": __version__,
        "contract": CONTRACT_VERSION,
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "triton": triton,
    }


def device(found: torch.device) -> Fields:
    """What a worker's results depend on of the device that it computes on.

    On a CPU the number of threads is part of it: oneDNN splits the work by it, and fp32 results of few rows were seen
    to differ between one thread and two.
    """
    if found.type == "cuda":
        major, minor = torch.cuda.get_device_capability(found)
        return {"device": torch.cuda.get_device_name(found), "compute_capability": f"{major}.{minor}"}
    if found.type != "cpu":
        return {"device": str(found.type)}
    try:
        model, flags = cpu(Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace"))
    except OSError:
        model, flags = platform.processor() or platform.machine(), ""
    return {"device": model, "instruction_sets": flags, "threads": torch.get_num_threads()}


def cpu(cpuinfo: str) -> tuple[str, str]:
    """(model, its instruction sets that matter) of the first processor in the text of ``/proc/cpuinfo``."""
    first: dict[str, str] = {}
    for line in cpuinfo.split("\n\n")[0].splitlines():
        name, _, value = line.partition(":")
        first[name.strip().lower()] = value.strip()
    numbers = ("cpu family", "model", "stepping", "cpu implementer", "cpu part", "cpu variant")
    words = [first.get("model name"), *(f"{name} {first[name]}" for name in numbers if name in first)]
    model = ", ".join(filter(None, words))
    flags = {*first.get("flags", first.get("features", "")).split()}
    return model or platform.machine(), " ".join(flag for flag in ISA_FLAGS if flag in flags)


def environment(env: Mapping[str, str] | None = None) -> Fields:
    """The variables of the table above that are set, in one field."""
    env = os.environ if env is None else env
    return {"environment": " ".join(f"{name}={env[name]}" for name in VARIABLES if env.get(name))}


def of_text(content: Any) -> str:
    """SHA-256 of a JSON value, in hex."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def names(found: Iterable[str]) -> str | None:
    """Distinct names in one order; None for none."""
    return " ".join(sorted({*found})) or None
