"""A vendor's linear layer behind an opaque op that only calls it where its bits were proven.

The vendor is any function ``y = vendor(x, weight, bias)``, for instance oneDNN with a prepacked weight. Its window
(:mod:`batch_invariant_ops.proof`) is found when the layer is loaded. The op is opaque to ``torch.compile``: the choice
by M is made when it runs, because a branch on M in traced code would be frozen by the compiler.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from batch_invariant_ops.proof import Window, find_window

logger = logging.getLogger(__name__)
VendorLinear = Callable[[torch.Tensor, torch.Tensor, "torch.Tensor | None"], torch.Tensor]

CAP = 256
LARGEST_FLOOR = 32
FALLBACK_ROWS = 16
EXHAUSTIVE_FLOP = 4e11


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
        sizes = _sizes(self.n, self.k)
        x = torch.randn(sizes[-1], self.k, generator=torch.Generator().manual_seed(0)).to(self.dtype)

        def gemm(rows: torch.Tensor) -> torch.Tensor:
            return self.vendor(rows, weight, bias)

        window = find_window(gemm, gemm(x), x, sizes, LARGEST_FLOOR)
        if window is None:
            window = find_window(gemm, gemm(x[:FALLBACK_ROWS]), x[:FALLBACK_ROWS], [FALLBACK_ROWS], FALLBACK_ROWS)
            logger.warning(
                "linear %d x %d %s: bits vary with M, running %d rows at a time",
                self.n,
                self.k,
                self.dtype,
                FALLBACK_ROWS,
            )
        if window is None:
            raise RuntimeError(
                f"linear N={self.n} K={self.k} {self.dtype}: two equal calls gave different bits; "
                "no batch-invariant way to run it was found"
            )
        self.windows[bias is not None] = window
        return window


def _sizes(n: int, k: int) -> list[int]:
    """Every M up to the cap where that is cheap, else small M and a spread of larger ones."""
    flop_of_all = 2 * n * k * CAP * CAP
    if flop_of_all <= EXHAUSTIVE_FLOP:
        return list(range(1, CAP + 1))
    return [*range(1, 18), 23, 24, 31, 32, 33, 48, 63, 64, 65, 96, 127, 128, 129, 200, 255, CAP]


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
