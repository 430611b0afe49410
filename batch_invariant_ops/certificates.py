"""What was proven, kept: one JSON file for each GEMM and machine in a cache folder.

A certificate holds for what it names: the GEMM, and all that a vendor's choice of kernel was seen to follow from, or
that nobody can rule out (the card and its multiprocessors, driver, cuBLAS, torch, Triton, workspaces, contract). Any
other is not found, and one that is damaged, or was copied from elsewhere, is ignored with one line in the log: a lost
certificate costs a proof, never bits.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import json
import logging
import os
import platform
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from batch_invariant_ops.ops import cublaslt, vendor_gemm
from batch_invariant_ops.proof import Window
from batch_invariant_ops.reduction import CONTRACT_VERSION
from batch_invariant_ops.vendor import WORKSPACES
from batch_invariant_ops.whole_files import write_whole

logger = logging.getLogger(__name__)
FORMAT = 4


@dataclass(frozen=True)
class Case:
    """One GEMM, y [M, N] = x [M, K]·w [N, K]ᵀ + b, over all M.

    Attributes:
        n, k: N and K.
        dtype: of all operands.
        has_bias: whether there is a b.
        weight_is_packed: w [N, K] is contiguous, as a layer's weight is; else wᵀ [K, N] is.
    """

    n: int
    k: int
    dtype: torch.dtype
    has_bias: bool = False
    weight_is_packed: bool = True

    def facts(self) -> dict[str, Any]:
        return asdict(self) | {"dtype": str(self.dtype).removeprefix("torch.")}

    def __str__(self) -> str:
        layout = "" if self.weight_is_packed else ", wᵀ packed"
        return f"N={self.n} K={self.k} {self.facts()['dtype']}{' with bias' if self.has_bias else ''}{layout}"


@dataclass(frozen=True)
class Certificate:
    """The outcome of comparing every M from 1 to ``largest``, or a sample that showed each kernel of the vendor's.

    Attributes:
        largest: the largest M compared.
        disagree: the values of M at which the bits were others, as ranges, both ends included.
        window: where the vendor may run; None where it may not.
        seconds: how long it took.
        kernels: of a sample, in hexadecimal: those of the vendor's that ran in it.
    """

    largest: int
    disagree: tuple[tuple[int, int], ...]
    window: Window | None
    seconds: float
    kernels: tuple[str, ...] = ()


def folder() -> Path:
    """``BATCH_INVARIANT_CACHE``, or ``batch_invariant`` in the user's cache folder."""
    chosen = os.environ.get("BATCH_INVARIANT_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "batch_invariant")


def save(case: Case, device: torch.device, certificate: Certificate) -> Path:
    """Write the certificate at once, whole or not at all, and return its file.

    Raises:
        OSError: the folder cannot be made or written.
    """
    content = {
        "format": FORMAT,
        "case": _facts(case, device),
        "machine": machine(device),
        "largest": certificate.largest,
        "disagree": certificate.disagree,
        "window": certificate.window and asdict(certificate.window),
        "seconds": round(certificate.seconds, 3),
        "kernels": certificate.kernels,
    }
    path = _path(case, device)
    write_whole(path, json.dumps(content, indent=2) + "\n")
    return path


def load(case: Case, device: torch.device) -> Certificate | None:
    """The certificate for this GEMM on this machine, or None; one that cannot be used is named in the log."""
    path = _path(case, device)
    try:
        return _read(path, {"format": FORMAT, "case": _facts(case, device), "machine": machine(device)})
    except FileNotFoundError:
        return None
    except KeyError as error:
        reason = f"it has no {error}"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
    logger.warning("certificate %s is ignored: %s", path, reason)
    return None


def _read(path: Path, here: dict[str, Any]) -> Certificate:
    content = json.loads(path.read_text(encoding="utf-8"))
    for part, expected in here.items():
        if content[part] != expected:
            raise ValueError(f"it is of another {part}: {content[part]}, not {expected}")
    return _parsed(content)


def _parsed(content: dict[str, Any]) -> Certificate:
    """The certificate in a file's content; ValueError, KeyError or TypeError where it contradicts itself."""
    largest = _natural(content["largest"])
    disagree = tuple((_natural(low), _natural(high)) for low, high in content["disagree"])
    window = content["window"] and Window(**{name: _natural(value) for name, value in content["window"].items()})
    kernels = tuple(bytes.fromhex(kernel).hex() for kernel in content["kernels"])
    if window is not None:
        every = window.cap - window.floor + 1
        if not window.floor <= window.cap <= largest or window.tried > every or (window.tried < every and not kernels):
            raise ValueError(f"{window} is not a window over every M up to {largest}")
        if any(high >= window.floor and low <= window.cap for low, high in disagree):
            raise ValueError(f"{window} holds values of M that disagree")
    return Certificate(largest, disagree, window, float(content["seconds"]), kernels)


def _natural(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"{value!r} is not a number of rows")
    return value


def _path(case: Case, device: torch.device) -> Path:
    key = json.dumps([FORMAT, _facts(case, device), machine(device)], sort_keys=True)
    name = f"gemm-{case.n}x{case.k}-{case.facts()['dtype']}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    return folder() / name


def _facts(case: Case, device: torch.device) -> dict[str, Any]:
    """The GEMM, and which of the vendor's kernels are its."""
    if device.type != "cuda":
        return case.facts()
    return case.facts() | {"kernels": [list(pair) for pair in cublaslt.ranks(case.n, case.k, case.dtype, device)]}


def machine(device: torch.device) -> dict[str, Any]:
    """What a proof on this device holds for, besides the GEMM."""
    facts: dict[str, Any] = {"contract": CONTRACT_VERSION, "torch": str(torch.__version__), "triton": _triton()}
    facts["gemm"] = vendor_gemm.name(device)
    if device.type != "cuda":
        capability = torch.backends.cpu.get_cpu_capability()
        return facts | {"device": f"{_processor()}, {capability}", "threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(device)
    facts |= {"device": properties.name, "multiprocessors": properties.multi_processor_count}
    facts |= {"driver": _driver(), "cublas": cublaslt.version()}
    return facts | {name: os.environ.get(name) for name in WORKSPACES}


def _triton() -> str | None:
    try:
        from triton import __version__
    except ImportError:
        return None
    return str(__version__)


@functools.cache
def _processor() -> str:
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
        if found:
            return found[1]
    return platform.processor() or platform.machine()


@functools.cache
def _driver() -> str | None:
    """The kernel driver's version, or the number of CUDA's that it has, where the former is not told."""
    with contextlib.suppress(OSError):
        found = re.search(r"\b\d{3,}(\.\d+)+\b", Path("/proc/driver/nvidia/version").read_text(encoding="utf-8"))
        if found:
            return found[0]
    with contextlib.suppress(OSError, AttributeError):
        version = ctypes.c_int()
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)) == 0:
            return f"CUDA {version.value}"
    return None
