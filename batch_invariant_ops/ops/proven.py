"""A vendor's linear layer behind an opaque op that only calls it where its bits were proven.

The vendor is any function ``y = vendor(x, weight, bias)``, for instance oneDNN with a prepacked weight. Its window
(:mod:`batch_invariant_ops.proof`) is found when the layer is loaded. The op is opaque to ``torch.compile``: the choice
by M is made when it runs, because a branch on M in traced code would be frozen by the compiler.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from batch_invariant_ops.proof import Window, find_window

logger = logging.getLogger(__name__)
VendorLinear = Callable[[torch.Tensor, torch.Tensor, "torch.Tensor | None"], torch.Tensor]

CAP = 128
LARGEST_FLOOR = 32
FALLBACK_ROWS = 16
EXHAUSTIVE_FLOP = 4e11
LEAST_ELEMENTS = 2**16


@dataclass
class ProvenLinear:
    """One layer's vendor call and, for calls with and without bias, its window.

    Attributes:
        vendor: y [M, N] = vendor(x [M, K], weight, bias); weight is what the layer passes, and may be ignored.
        n, k: output and input features.
        dtype: of x.
        windows: window by "has a bias".
    """

    vendor: VendorLinear
    n: int
    k: int
    dtype: torch.dtype
    windows: dict[bool, Window] = field(default_factory=dict)

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        window = self.windows.get(bias is not None) or self.prove(weight, bias)
        rows = x.reshape(-1, self.k)
        if rows.shape[0] == 0:
            return x.new_empty((*x.shape[:-1], self.n))
        y = window.apply(lambda part: self.vendor(part, weight, bias), rows)
        return y.view(*x.shape[:-1], self.n)

    def prove(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Window:
        """Find the window for this layer, remember it, and return it.

        The bits to keep are the vendor's own at the largest M. Where no window is found, every call is cut and padded
        to one constant number of rows, which leaves the vendor no M to choose by.
        """
        start = time.perf_counter()
        sizes = _sizes(self.n, self.k)
        x = torch.randn(sizes[-1], self.k, generator=torch.Generator().manual_seed(0)).to(self.dtype)

        def gemm(rows: torch.Tensor) -> torch.Tensor:
            return self.vendor(rows, weight, bias)

        # the weights are the layer's own, so that one order of summation shows in one of thousands of elements alone
        least_rows = LEAST_ELEMENTS // self.n
        window = find_window(gemm, gemm(x), x, sizes, LARGEST_FLOOR, least_rows)
        if window is None:
            window = self._constant_rows(gemm, x[:FALLBACK_ROWS])
        what = f"linear N={self.n} K={self.k} {str(self.dtype).removeprefix('torch.')}"
        if window is None:
            raise RuntimeError(f"{what}: a row's bits vary with its place in the batch, or from call to call")
        seconds = time.perf_counter() - start
        logger.info(
            "%s: %d to %d rows at a time, %d sizes proven in %.1f s",
            what,
            window.floor,
            window.cap,
            window.tried,
            seconds,
        )
        self.windows[bias is not None] = window
        return window

    @staticmethod
    def _constant_rows(gemm: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> Window | None:
        """The window of one constant number of rows, if a row keeps its bits one place further down too."""
        return find_window(lambda rows: gemm(rows.roll(1, 0)).roll(-1, 0), gemm(x), x, [len(x)], len(x))


def _sizes(n: int, k: int) -> list[int]:
    """Every M up to the cap where that is cheap, else small M and a spread of larger ones."""
    flop_of_all = 2 * n * k * CAP * CAP
    if flop_of_all <= EXHAUSTIVE_FLOP:
        return list(range(1, CAP + 1))
    return [*range(1, 18), 23, 24, 31, 32, 33, 48, 63, 64, 65, 96, 127, CAP]


_layers: list[ProvenLinear] = []


def register(layer: ProvenLinear) -> int:
    """Give the layer a number under which :func:`proven_linear` finds it."""
    _layers.append(layer)
    return len(_layers) - 1


def registered() -> list[ProvenLinear]:
    """All layers registered in this process, in order of registration."""
    return list(_layers)


def proven_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, layer: int, n: int) -> torch.Tensor:
    """y [..., N] = layer number ``layer`` applied to x [..., K]; opaque to ``torch.compile``."""
    return torch.ops.batch_invariant_ops.proven_linear(x, weight, bias, layer, n)


def _run(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, layer: int, n: int) -> torch.Tensor:
    return _layers[layer](x, weight, bias)


def _fake(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, layer: int, n: int) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], n))


_library = torch.library.Library("batch_invariant_ops", "FRAGMENT")
_library.define("proven_linear(Tensor x, Tensor weight, Tensor? bias, int layer, int n) -> Tensor")
_library.impl("proven_linear", _run, "CompositeExplicitAutograd")
torch.library.register_fake("batch_invariant_ops::proven_linear", _fake, lib=_library)
