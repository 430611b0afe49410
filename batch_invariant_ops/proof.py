"""Prove, then use: for which numbers of rows M does a vendor's GEMM keep the bits of one row?

A vendor's GEMM picks its kernel by M, and kernels that sum in another order give other bits. Over M its bits fall into
classes; the class that matters is the one that holds all large M. The smallest M from which on every tried M belongs to
it is the *floor*: fewer rows are padded up to it. More rows than were tried (the *cap*) are split. So a proof is a
:class:`Window`, and a call through :meth:`Window.apply` only ever shows the vendor an M inside it.

Random numbers are a weak witness: two orders of summation differ in the last bits of fp32, and rounding to 16 bits
hides that in all but one of thousands of elements. :func:`probe` makes operands whose sums cancel, so that what is
left is the rounding errors alone, and nearly every element tells one order from another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

Rows = torch.Tensor
Gemm = Callable[[Rows], torch.Tensor]
Progress = Callable[[int, int], None]

PROBE_SCALE = 256.0
CHUNK = 128


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


def probe(
    num_rows: int, n: int, k: int, dtype: torch.dtype, device: torch.device, has_bias: bool = False, seed: int = 0
) -> tuple[Rows, torch.Tensor, torch.Tensor | None]:
    """x [num_rows, K], w [N, K] and, if asked for, a bias [N], by which x·wᵀ tells its order of summation.

    The second half of K holds the products of the first half again, permuted and with the other sign. Exactly, each
    sum is 0; computed, it is what rounding left behind on the way up and down, about 1 for K = 4096. Every second row
    of x is of plain random numbers.
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    half = k // 2
    order = torch.randperm(half, generator=generator, device=device)

    def mirrored(rows: int, sign: int) -> torch.Tensor:
        y = torch.zeros(rows, k, dtype=dtype, device=device)
        first = y[:, :half].normal_(generator=generator).mul_(PROBE_SCALE)
        y[:, half : 2 * half] = first[:, order] * sign
        return y

    x, w = mirrored(num_rows, -1), mirrored(n, 1)
    x[1::2].normal_(generator=generator).div_(16)
    bias = torch.randn(n, generator=generator, device=device).to(dtype) if has_bias else None
    return x, w, bias


def agreement(
    gemm: Gemm,
    reference: torch.Tensor,
    x: Rows,
    sizes: Sequence[int],
    places: int = 2,
    least_rows: int = 0,
    progress: Progress | None = None,
) -> list[bool]:
    """For each M of ``sizes``: does ``gemm`` on M rows give the reference's bits, in all rows, at several places?

    Verdicts stay on the device and are read once for each chunk of values of M.

    Args:
        gemm: maps [M, K] to [M, N].
        reference: [max M, N], what each row of x should give.
        x: [max M, K].
        sizes: the values of M to try, none larger than the number of rows of x.
        places: windows of M consecutive rows to try at each M: the first rows, the last, and between.
        least_rows: as many windows more as it takes to compare that many rows at each M.
        progress: called with the number of values of M done, and of all, after each chunk.
    """
    found: list[bool] = []
    for start in range(0, len(sizes), CHUNK):
        verdicts = []
        for num_rows in sizes[start : start + CHUNK]:
            rest = len(x) - num_rows
            wanted = min(max(places, -(-least_rows // num_rows)), rest + 1)
            starts = {rest * i // max(wanted - 1, 1) for i in range(wanted)}
            here = [same_bits(gemm(x[at : at + num_rows]), reference[at : at + num_rows]) for at in sorted(starts)]
            verdicts.append(here[0] if len(here) == 1 else torch.stack(here).all())
        found += torch.stack(verdicts).tolist()
        if progress is not None:
            progress(len(found), len(sizes))
    return found


def window_of(sizes: Sequence[int], verdicts: Sequence[bool], largest_floor: int) -> Window | None:
    """The window that the verdicts on ``sizes``, ascending, leave, or None when no class holds all large M.

    A floor above ``largest_floor`` is no window: padding that far costs more than another kernel.
    """
    if not verdicts or not verdicts[-1]:
        return None
    first = max((i + 1 for i, agrees in enumerate(verdicts) if not agrees), default=0)
    if sizes[first] > largest_floor:
        return None
    return Window(floor=sizes[first], cap=sizes[-1], tried=len(sizes) - first)


def find_window(
    gemm: Gemm, reference: torch.Tensor, x: Rows, sizes: Iterable[int], largest_floor: int, least_rows: int = 0
) -> Window | None:
    """The window of ``gemm`` over the tried ``sizes``, or None when no class holds all large M.

    Args:
        gemm: the vendor's GEMM, [M, K] to [M, N].
        reference: [max M, N], the bits to keep: another kernel's, or the vendor's own at the largest M.
        x: [max M, K].
        sizes: values of M to try.
        largest_floor, least_rows: as in :func:`window_of` and :func:`agreement`.
    """
    tried = sorted(set(sizes))
    return window_of(tried, agreement(gemm, reference, x, tried, least_rows=least_rows), largest_floor)
