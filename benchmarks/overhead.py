#!/usr/bin/env python3
"""Microseconds of Python that the linear op adds to a call, the GEMM itself left out; needs no GPU.

The GPU's path of the op runs on CPU tensors with a proof in place and a vendor that returns a tensor made before, so
that what is timed is dispatch, the choice between kernels, and reshaping. Each figure is the least of many rounds.

    python3 benchmarks/overhead.py [--rounds 50]
"""

import argparse
import sys
import timeit
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from batch_invariant_ops.ops import linear, vendor_gemm
from batch_invariant_ops.proof import Window

CALLS = 2000
M, N, K = 8, 64, 64


def aligned(*shape):
    """Zeros at an address that is a multiple of 256, as a GPU's allocator gives them."""
    numel = torch.Size(shape).numel()
    room = torch.zeros(numel + 256, dtype=torch.bfloat16)
    start = -room.data_ptr() % 256 // 2
    return room[start : start + numel].view(shape)


def microseconds(call, rounds):
    return min(timeit.repeat(call, number=CALLS, repeat=rounds)) / CALLS * 1e6


def cases():
    """By name: a call whose time is dispatch and choice alone."""
    x, w, bias, y = aligned(M, K), aligned(N, K), aligned(N), aligned(M, N)
    deep = x.view(2, 4, K)
    op = torch.ops.batch_invariant_ops.gemm.default
    vendor_gemm.call = lambda a, b, bias: y
    for has_bias in (False, True):
        key = N, K, torch.bfloat16, has_bias, True, -1
        linear._decisions[key] = linear.Decision(Window(1, 8192, 1), ((1, 2), (97, 128), (193, 256)))
    library = torch.library.Library("batch_invariant_ops", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library.impl("gemm", linear._on_gpu, "CPU", allow_override=True)
    return library, {
        "the choice alone": lambda: linear.gemm(x, w.t(), None),
        "the op": lambda: op(x, w.t(), None),
        "the op with a bias": lambda: op(x, w.t(), bias),
        "the op, three dimensions": lambda: op(deep, w.t(), None),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50)
    arguments = parser.parse_args()
    _library, named = cases()
    for context in (torch.inference_mode, torch.no_grad):
        with context():
            for name, call in named.items():
                print(f"{context.__name__:>15}  {name:<26} {microseconds(call, arguments.rounds):5.2f} us", flush=True)


if __name__ == "__main__":
    main()
