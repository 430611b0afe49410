"""What ``torch.compile`` makes of the mode: it traces our opaque ops where the model calls aten's.

A compiler would otherwise write its own loops for softmax and mean, take its own GEMM templates, and choose both by
the batch. While the mode is on, the autograd keys of the overridden operations have a kernel in torch's *Python
dispatcher*, which is active only while AOTAutograd traces; it calls ``torch.ops.batch_invariant_ops``. Code that was
compiled with the mode off is dropped when it is turned on, and the reverse; torch's caches on disk are kept apart by
their tag.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from batch_invariant_ops import overrides
from batch_invariant_ops._version import __version__

_KEYS = (torch._C.DispatchKey.AutogradCPU, torch._C.DispatchKey.AutogradCUDA)
_TAG = f"+batch_invariant_ops-{__version__}"


def install() -> None:
    """From here on, tracing takes our opaque ops."""
    for name, make in overrides.overrides(overrides.OPAQUE).items():
        op = _overload(name)
        kernel = make(_untraced(op))
        for key in _KEYS:
            op.py_impl(key)(kernel)
    torch.compiler.config.cache_key_tag += _TAG
    _drop_compiled_code()


def remove() -> None:
    """Tracing takes aten's operations again."""
    for name in overrides.overrides(overrides.OPAQUE):
        op = _overload(name)
        for key in _KEYS:
            op.py_kernels.pop(key, None)
        op._dispatch_cache.clear()
    torch.compiler.config.cache_key_tag = torch.compiler.config.cache_key_tag.replace(_TAG, "")
    _drop_compiled_code()


def _overload(name: str) -> torch._ops.OpOverload:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


def _untraced(op: torch._ops.OpOverload) -> Callable[..., Any]:
    """aten's own kernel for the autograd key, which is in C++."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch._C._DisablePythonDispatcher():
            return op(*args, **kwargs)

    return call


def _drop_compiled_code() -> None:
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset_code_caches()
