"""The mode: while it is on, aten's own matrix products, softmaxes and means keep one row's bits in any batch.

Overridden are ``mm``, ``bmm``, ``addmm``, ``baddbmm``, ``_softmax``, ``_log_softmax`` and ``mean`` with their ``out=``
and in-place forms, on the CPU and on CUDA, and with them all that is made of them: ``@``, ``F.linear``, ``einsum``,
``torch.softmax`` and others. Our kernels sit below autograd, so gradients work and run on them too. What they do not
compute (fp64, integers, complex numbers) goes to aten's own kernel, unchanged. Not covered: attention
(``scaled_dot_product_attention``), convolutions, sums.

``torch.compile`` keeps the bits as well (:mod:`batch_invariant_ops.tracing`); turning the mode on or off makes compiled
functions compile again. The mode belongs to the process, as aten's kernels do, not to a thread.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from batch_invariant_ops import overrides, tracing
from batch_invariant_ops.ops import rms_norm  # noqa: F401 (registers its op, as the overrides' imports do theirs)

_lock = threading.RLock()
_library: torch.library.Library | None = None


class AttentionBlockSize(NamedTuple):
    """Rows of queries and of keys that a batch-invariant attention kernel takes at a time."""

    block_m: int
    block_n: int


def get_batch_invariant_attention_block_size() -> AttentionBlockSize:
    """The block sizes under which FlexAttention's bits do not depend on the batch."""
    return AttentionBlockSize(block_m=16, block_n=16)


def is_batch_invariant_mode_enabled() -> bool:
    """Whether the mode is on in this process."""
    return _library is not None


def enable_batch_invariant_mode() -> None:
    """Turn the mode on for this process; once more changes nothing."""
    global _library
    with _lock:
        if _library is not None:
            return
        library = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"Warning only once for all operators")
            for device in _devices():
                for name, make in overrides.overrides(overrides.EAGER).items():
                    library.impl(name, make(_original(name, device)), device, allow_override=True)
        tracing.install()
        _library = library


def disable_batch_invariant_mode() -> None:
    """Turn the mode off; aten's own kernels are back."""
    global _library
    with _lock:
        if _library is None:
            return
        _library._destroy()
        tracing.remove()
        _library = None


@contextlib.contextmanager
def set_batch_invariant_mode(enabled: bool = True) -> Iterator[None]:
    """Turn the mode on, or off, for a block; what was before comes back after it, also after an exception."""
    before = is_batch_invariant_mode_enabled()
    _switch(enabled)
    try:
        yield
    finally:
        _switch(before)


def _switch(enabled: bool) -> None:
    if enabled:
        enable_batch_invariant_mode()
    else:
        disable_batch_invariant_mode()


def _devices() -> list[str]:
    """Asked of the build: after asking the driver, a process can no longer fork one that uses the GPU."""
    return ["CPU", "CUDA"] if torch.backends.cuda.is_built() else ["CPU"]


_originals: dict[tuple[str, str], Callable[..., Any]] = {}


def _original(name: str, device: str) -> Callable[..., Any]:
    """aten's own kernel as a function; looked up while the mode is off, and kept."""
    if (name, device) not in _originals:
        kernel = torch.library.get_kernel(f"aten::{name}", device)
        keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, device))
        _originals[name, device] = lambda *args, **kwargs: kernel.call_boxed(keys, *args, **kwargs)
    return _originals[name, device]
