"""Prove, then use: for which numbers of rows M does a vendor's GEMM keep the bits of one row?

A vendor's GEMM picks its kernel by M, and kernels that sum in another order give other bits. Over M its bits fall into
classes; the class that matters is the one that holds all large M. The smallest M from which on every tried M belongs to
it is the *floor*: fewer rows are padded up to it. More rows than were tried (the *cap*) are split. So a proof is a
:class:`Window`, and a call through :meth:`Window.apply` only ever shows the vendor an M inside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

Rows = torch.Tensor
Gemm = Callable[[Rows], torch.Tensor]


@dataclass(frozen=True)
class Window:
    """The numbers of rows at which a vendor's GEMM was seen to keep every row's bits.

    Attributes:
        floor: smallest M it may be called with; fewer rows are padded with zeros up to it.
        cap: largest M it may be called with; more rows are split.
        tried: how many values of M were compared between the two.
    """

    floor: int
    cap: int
    tried: int

    def apply(self, gemm: Gemm, x: Rows) -> torch.Tensor:
        """``gemm(x)`` for x [M, K], with the vendor never called outside the window.

        Raises:
            ValueError: x is not two-dimensional.
        """
        if x.dim() != 2:
            raise ValueError(f"expected x of shape [M, K], got {list(x.shape)}")
        num_rows = x.shape[0]
        if self.floor <= num_rows <= self.cap:
            return gemm(x)
        if num_rows < self.floor:
            return gemm(torch.nn.functional.pad(x, (0, 0, 0, self.floor - num_rows)))[:num_rows]
        return torch.cat([self.apply(gemm, part) for part in x.split(self.cap)])


def same_bits(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """A 0-d bool on the tensors' device: equal in every bit, NaN payloads and the sign of zero included."""
    as_integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return (a.view(as_integer) == b.view(as_integer)).all()


def agreement(gemm: Gemm, reference: torch.Tensor, x: Rows, sizes: Sequence[int]) -> list[bool]:
    """For each M of ``sizes``: does ``gemm`` on M rows give the reference's bits, at two places of the batch?

    Args:
        gemm: maps [M, K] to [M, N].
        reference: [max M, N], what each row of x should give.
        x: [max M, K] random rows.
        sizes: the values of M to try, none larger than the number of rows of x.
    """
    verdicts = []
    for num_rows in sizes:
        shift = len(x) - num_rows
        verdict = same_bits(gemm(x[:num_rows]), reference[:num_rows])
        if shift:
            verdict &= same_bits(gemm(x[shift:]), reference[shift:])
        verdicts.append(verdict)
    return torch.stack(verdicts).tolist() if verdicts else []


def find_window(
    gemm: Gemm, reference: torch.Tensor, x: Rows, sizes: Iterable[int], largest_floor: int
) -> Window | None:
    """The window of ``gemm`` over the tried ``sizes``, or None when no class holds all large M.

    Args:
        gemm: the vendor's GEMM, [M, K] to [M, N].
        reference: [max M, N], the bits to keep: another kernel's, or the vendor's own at the largest M.
        x: [max M, K] random rows.
        sizes: values of M to try.
        largest_floor: a floor above this is no window: padding that far costs more than another kernel.
    """
    tried = sorted(set(sizes))
    verdicts = agreement(gemm, reference, x, tried)
    if not verdicts or not verdicts[-1]:
        return None
    first = max((i + 1 for i, agrees in enumerate(verdicts) if not agrees), default=0)
    floor = tried[first]
    if floor > largest_floor:
        return None
    return Window(floor=floor, cap=tried[-1], tried=len(tried) - first)
