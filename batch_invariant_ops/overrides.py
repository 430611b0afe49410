"""What each of aten's operations computes while the mode is on.

An override gives the result, or ``NotImplemented`` for inputs that it does not take: fp64, integers, complex numbers,
mixed types and devices, shapes that do not go together. Those go to aten's own kernel, so that what it computes, and
the errors it raises, stay its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from batch_invariant_ops.ops import bmm, linear, log_softmax, matmul, mean, softmax

Kernel = Callable[..., Any]


class Primitives(NamedTuple):
    """The operations that overrides are made of.

    Attributes:
        gemm: a [M, K] · b [K, N] + bias [N] or None.
        bmm: a [Z, M, K] · b [Z, K, N].
        log_softmax, softmax: of (x, dim, dtype).
        mean: of (x, dims, keepdim, dtype).
    """

    gemm: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
    bmm: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    log_softmax: Callable[[torch.Tensor, int, torch.dtype | None], torch.Tensor]
    softmax: Callable[[torch.Tensor, int, torch.dtype | None], torch.Tensor]
    mean: Callable[[torch.Tensor, Sequence[int], bool, torch.dtype | None], torch.Tensor]


def _gemm(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return linear.gemm(a, b, bias) if a.is_cuda else matmul.gemm(a, b, bias)


EAGER = Primitives(
    gemm=_gemm,
    bmm=bmm._bmm,
    log_softmax=log_softmax._log_softmax,
    softmax=softmax._softmax,
    mean=mean._mean,
)

OPAQUE = Primitives(
    gemm=linear.opaque_gemm,
    bmm=bmm.bmm,
    log_softmax=log_softmax.log_softmax,
    softmax=softmax.softmax,
    mean=mean.mean,
)


def functional(ops: Primitives) -> dict[str, Kernel]:
    """The overrides by the name of the aten overload, computed by ``ops``."""

    def mm(self: torch.Tensor, mat2: torch.Tensor) -> Any:
        return ops.gemm(self, mat2, None) if _taken(self, mat2) and _fits(self, mat2, 2) else NotImplemented

    def bmm(self: torch.Tensor, mat2: torch.Tensor) -> Any:
        return ops.bmm(self, mat2) if _taken(self, mat2) and _fits(self, mat2, 3) else NotImplemented

    def addmm(self: torch.Tensor, mat1: torch.Tensor, mat2: torch.Tensor, *, beta: Any = 1, alpha: Any = 1) -> Any:
        if not (_taken(mat1, mat2, self) and _fits(mat1, mat2, 2) and _scales(beta, alpha)):
            return NotImplemented
        m, n = mat1.shape[0], mat2.shape[1]
        if not _broadcasts(self, (m, n)):
            return NotImplemented
        if beta == 1 and alpha == 1 and (self.dim() < 2 or self.shape[0] == 1 != m):
            return ops.gemm(mat1, mat2, self.expand(1, n)[0].contiguous())
        return _scaled_sum(ops.gemm(mat1, mat2, None), self, beta, alpha)

    def baddbmm(
        self: torch.Tensor, batch1: torch.Tensor, batch2: torch.Tensor, *, beta: Any = 1, alpha: Any = 1
    ) -> Any:
        if not (_taken(batch1, batch2, self) and _fits(batch1, batch2, 3) and _scales(beta, alpha)):
            return NotImplemented
        if not _broadcasts(self, (batch1.shape[0], batch1.shape[1], batch2.shape[2])):
            return NotImplemented
        return _scaled_sum(ops.bmm(batch1, batch2), self, beta, alpha)

    def softmax_of(op: Callable[..., torch.Tensor]) -> Kernel:
        def run(self: torch.Tensor, dim: int, half_to_float: bool) -> Any:
            if not _taken(self) or not _are_dims(self, [dim]) or (half_to_float and not self.is_cuda):
                return NotImplemented
            return op(self, dim, torch.float32 if half_to_float else None)

        return run

    def mean(
        self: torch.Tensor, dim: Sequence[int] | None, keepdim: bool = False, *, dtype: torch.dtype | None = None
    ) -> Any:
        if dtype is not None and not _taken(self):
            self = self.to(dtype)
        dims = dim or []
        if not _taken(self) or dtype not in (None, *matmul.SUPPORTED_DTYPES) or not _are_dims(self, dims):
            return NotImplemented
        return ops.mean(self, dims, keepdim, dtype)

    return {
        "mm": mm,
        "bmm": bmm,
        "addmm": addmm,
        "baddbmm": baddbmm,
        "_log_softmax": softmax_of(ops.log_softmax),
        "_softmax": softmax_of(ops.softmax),
        "mean.dim": mean,
    }


def overrides(ops: Primitives) -> dict[str, Callable[[Kernel], Kernel]]:
    """Makers of the kernels that replace aten's, by overload: functional, ``out=`` and in place.

    Each takes aten's own kernel, which the new one calls for inputs that are not ours.
    """
    made: dict[str, Callable[[Kernel], Kernel]] = {}
    for name, compute in functional(ops).items():
        made[name] = _functional(compute)
        made["mean.out" if name == "mean.dim" else f"{name}.out"] = _out(compute)
        if "addmm" in name or name == "baddbmm":
            made[f"{name}_"] = _in_place(compute)
    return made


def _functional(compute: Kernel) -> Callable[[Kernel], Kernel]:
    def make(original: Kernel) -> Kernel:
        def run(*args: Any, **kwargs: Any) -> Any:
            result = compute(*args, **kwargs)
            return original(*args, **kwargs) if result is NotImplemented else result

        return run

    return make


def _out(compute: Kernel) -> Callable[[Kernel], Kernel]:
    def make(original: Kernel) -> Kernel:
        def run(*args: Any, out: torch.Tensor, **kwargs: Any) -> Any:
            result = compute(*args, **kwargs)
            if result is NotImplemented or (out.dtype, out.device) != (result.dtype, result.device):
                return original(*args, **kwargs, out=out)
            if out.shape != result.shape:
                original(*args, **kwargs, out=out)  # resizes, and warns or refuses, by aten's own rules
            return out.copy_(result)

        return run

    return make


def _in_place(compute: Kernel) -> Callable[[Kernel], Kernel]:
    def make(original: Kernel) -> Kernel:
        def run(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            result = compute(self, *args, **kwargs)
            if result is NotImplemented or result.shape != self.shape:
                return original(self, *args, **kwargs)
            return self.copy_(result)

        return run

    return make


def _taken(*tensors: torch.Tensor) -> bool:
    first = tensors[0]
    return first.dtype in matmul.SUPPORTED_DTYPES and all(
        t.dtype == first.dtype and t.device == first.device for t in tensors
    )


def _fits(a: torch.Tensor, b: torch.Tensor, dims: int) -> bool:
    return a.dim() == b.dim() == dims and a.shape[-1] == b.shape[-2] and (dims == 2 or a.shape[0] == b.shape[0])


def _broadcasts(x: torch.Tensor, shape: tuple[int, ...]) -> bool:
    """Whether x can be expanded to ``shape``."""
    return x.dim() <= len(shape) and all(
        have in (1, want) for have, want in zip(reversed(x.shape), reversed(shape), strict=False)
    )


def _scales(beta: Any, alpha: Any) -> bool:
    """Whether both are real, and the product counts at all: aten does not compute it for alpha = 0."""
    return alpha != 0 and not isinstance(alpha, complex) and not isinstance(beta, complex)


def _are_dims(x: torch.Tensor, dims: Sequence[int]) -> bool:
    """Whether all are dimensions of x, none of them named twice."""
    bound = max(x.dim(), 1)
    return all(-bound <= dim < bound for dim in dims) and len({dim % bound for dim in dims}) == len(dims)


def _scaled_sum(product: torch.Tensor, self: torch.Tensor, beta: Any, alpha: Any) -> torch.Tensor:
    """beta·self + alpha·product in fp32; beta = 0 leaves even a NaN in self out, as aten does."""
    total = product.float() if alpha == 1 else product.float() * alpha
    if beta != 0:
        total = total + (self.float() if beta == 1 else self.float() * beta)
    return total.to(product.dtype)
