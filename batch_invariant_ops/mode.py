"""The mode: while it is on, aten's own matrix products, softmaxes and means keep one row's bits in any batch.

The kernels are registered with torch's dispatcher below autograd, so gradients work and run on them too. What they do
not compute (fp64, integers, complex numbers) goes to aten's own kernel, unchanged.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from batch_invariant_ops.ops import linear, log_softmax, matmul, mean, rms_norm, softmax  # noqa: F401 (ops registered)

Kernel = Callable[..., Any]
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
            warnings.filterwarnings("ignore", message=".*[Oo]verrid")
            for device in _devices():
                for name, make in _OVERRIDES.items():
                    kernel = make(_original(name, device))
                    library.impl(name, kernel, device, allow_override=True)
        _library = library


def disable_batch_invariant_mode() -> None:
    """Turn the mode off; aten's own kernels are back."""
    global _library
    with _lock:
        if _library is not None:
            _library._destroy()
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
    return ["CPU", "CUDA"] if torch.cuda.is_available() else ["CPU"]


_originals: dict[tuple[str, str], Kernel] = {}


def _original(name: str, device: str) -> Kernel:
    """aten's own kernel as a function; looked up while the mode is off, and kept."""
    if (name, device) not in _originals:
        kernel = torch.library.get_kernel(name, device)
        keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, device))
        _originals[name, device] = lambda *args, **kwargs: kernel.call_boxed(keys, *args, **kwargs)
    return _originals[name, device]


def _ours(*tensors: torch.Tensor) -> bool:
    first = tensors[0]
    return first.dtype in matmul.SUPPORTED_DTYPES and all(
        t.dtype == first.dtype and t.device == first.device for t in tensors
    )


def _gemm(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return linear.gemm(a, b, bias) if a.is_cuda else matmul.gemm(a, b, bias)


def _fits(a: torch.Tensor, b: torch.Tensor, dims: int) -> bool:
    """Whether the shapes go together; where they do not, aten's own kernel gives aten's own error."""
    return a.dim() == b.dim() == dims and a.shape[-1] == b.shape[-2] and (dims == 2 or a.shape[0] == b.shape[0])


def _mm(original: Kernel) -> Kernel:
    def mm(self: torch.Tensor, mat2: torch.Tensor) -> torch.Tensor:
        return _gemm(self, mat2) if _ours(self, mat2) and _fits(self, mat2, 2) else original(self, mat2)

    return mm


def _bmm(original: Kernel) -> Kernel:
    def bmm(self: torch.Tensor, mat2: torch.Tensor) -> torch.Tensor:
        return matmul.bmm(self, mat2) if _ours(self, mat2) and _fits(self, mat2, 3) else original(self, mat2)

    return bmm


def _scaled_sum(product: torch.Tensor, self: torch.Tensor, beta: Any, alpha: Any) -> torch.Tensor:
    """beta·self + alpha·product; beta = 0 leaves even a NaN in self out, as aten does."""
    scaled = product if alpha == 1 else product * alpha
    return scaled if beta == 0 else scaled + (self if beta == 1 else self * beta)


def _addmm(original: Kernel) -> Kernel:
    def addmm(
        self: torch.Tensor, mat1: torch.Tensor, mat2: torch.Tensor, *, beta: Any = 1, alpha: Any = 1
    ) -> torch.Tensor:
        if not (_ours(mat1, mat2, self) and _fits(mat1, mat2, 2)):
            return original(self, mat1, mat2, beta=beta, alpha=alpha)
        shape = torch.broadcast_shapes(self.shape, (mat1.shape[0], mat2.shape[1]))
        if list(shape) != [mat1.shape[0], mat2.shape[1]]:
            return original(self, mat1, mat2, beta=beta, alpha=alpha)
        if beta == alpha == 1 and list(self.shape) == [mat2.shape[1]]:
            return _gemm(mat1, mat2, self)
        return _scaled_sum(_gemm(mat1, mat2), self, beta, alpha)

    return addmm


def _baddbmm(original: Kernel) -> Kernel:
    def baddbmm(
        self: torch.Tensor, batch1: torch.Tensor, batch2: torch.Tensor, *, beta: Any = 1, alpha: Any = 1
    ) -> torch.Tensor:
        if not (_ours(batch1, batch2, self) and _fits(batch1, batch2, 3)):
            return original(self, batch1, batch2, beta=beta, alpha=alpha)
        return _scaled_sum(matmul.bmm(batch1, batch2), self, beta, alpha)

    return baddbmm


def _softmax_override(op: Kernel) -> Callable[[Kernel], Kernel]:
    def make(original: Kernel) -> Kernel:
        def run(self: torch.Tensor, dim: int, half_to_float: bool) -> torch.Tensor:
            if self.dtype not in matmul.SUPPORTED_DTYPES:
                return original(self, dim, half_to_float)
            return op(self, dim, torch.float32 if half_to_float else None)

        return run

    return make


def _mean(original: Kernel) -> Kernel:
    def run(
        self: torch.Tensor,
        dim: Sequence[int] | None,
        keepdim: bool = False,
        *,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        if self.dtype not in matmul.SUPPORTED_DTYPES or (dtype or self.dtype) not in matmul.SUPPORTED_DTYPES:
            return original(self, dim, keepdim, dtype=dtype)
        return mean._mean(self, dim or [], keepdim, dtype)

    return run


def _out(make: Callable[[Kernel], Kernel], functional: str) -> Callable[[Kernel], Kernel]:
    """The ``out=`` form of an override: the functional one, copied into a resized ``out``."""

    def make_out(original: Kernel) -> Kernel:
        def declined(*args: Any, **kwargs: Any) -> Any:
            raise _Declined

        compute = make(declined)

        def run(*args: Any, out: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            try:
                result = compute(*args, **kwargs)
            except _Declined:
                return original(*args, out=out, **kwargs)
            if out.dtype != result.dtype or out.device != result.device:
                return original(*args, out=out, **kwargs)
            if out.shape != result.shape:
                out.resize_(result.shape)
            return out.copy_(result)

        return run

    return make_out


class _Declined(Exception):
    """The override does not compute these inputs."""


_FUNCTIONAL: dict[str, Callable[[Kernel], Kernel]] = {
    "aten::mm": _mm,
    "aten::bmm": _bmm,
    "aten::addmm": _addmm,
    "aten::baddbmm": _baddbmm,
    "aten::_log_softmax": _softmax_override(log_softmax._log_softmax),
    "aten::_softmax": _softmax_override(softmax._softmax),
    "aten::mean.dim": _mean,
}
_OVERRIDES = _FUNCTIONAL | {
    ("aten::mean.out" if name == "aten::mean.dim" else f"{name}.out"): _out(make, name)
    for name, make in _FUNCTIONAL.items()
}
