"""What the tests of the operations share: the check of the promise, and the promise's values in fp64."""

import math
from dataclasses import dataclass

import pytest
import torch

from batch_invariant_ops.ops import log_softmax, mean, rms_norm, softmax
from batch_invariant_ops.proof import same_bits

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = 1e-6


def rows_keep_bits(operation, x, sizes):
    """Whether every row of x gives the bits it gives in the whole batch, in batches of each size, at several places.

    The places are the first, the last, the middle and one that is a function of the size.
    """
    whole = operation(x)
    for size in sizes:
        last = len(x) - size
        for start in {0, last, last // 2, (size * 7919) % (last + 1)}:
            part = operation(x[start : start + size])
            if not bool(same_bits(part.contiguous(), whole[start : start + size].contiguous())):
                return False
    return True


@pytest.fixture
def keeps_bits():
    return rows_keep_bits


@dataclass(frozen=True)
class RowOperation:
    """An operation on rows [..., n], its value in fp64, and how far the two may be apart.

    Attributes:
        run: of x, and of a weight [n] that some ignore.
        exact: the same in fp64.
        spread: of x in fp64, what fp32's rounding errors are proportional to.
    """

    run: object
    exact: object
    spread: object

    def bound(self, x, weight):
        """A few roundings to the type of x, and one fp32 rounding a level of the sum's tree plus those around it."""
        exact, n = self.exact(x.double(), weight.double()), x.shape[-1]
        to_type = 3 * torch.finfo(x.dtype).eps / 2 * exact.abs() + torch.finfo(x.dtype).tiny
        in_fp32 = (math.log2(n) + 16 + n / 8192) * torch.finfo(torch.float32).eps * self.spread(x.double(), exact)
        return to_type + in_fp32


def _norm(x, weight):
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + EPS) * weight


ROW_OPERATIONS = {
    "rms_norm": RowOperation(
        run=lambda x, weight: rms_norm.rms_norm(x, weight, EPS), exact=_norm, spread=lambda x, exact: exact.abs()
    ),
    "rms_norm without weight": RowOperation(
        run=lambda x, weight: rms_norm.rms_norm(x, None, EPS),
        exact=lambda x, weight: _norm(x, 1),
        spread=lambda x, exact: exact.abs(),
    ),
    "log_softmax": RowOperation(
        run=lambda x, weight: log_softmax.log_softmax(x),
        exact=lambda x, weight: torch.log_softmax(x, -1),
        spread=lambda x, exact: exact.abs() + 1,
    ),
    "softmax": RowOperation(
        run=lambda x, weight: softmax.softmax(x),
        exact=lambda x, weight: torch.softmax(x, -1),
        spread=lambda x, exact: exact * (x.amax(-1, keepdim=True) - x + 1),
    ),
    "mean": RowOperation(
        run=lambda x, weight: mean.mean(x, -1, keepdim=True),
        exact=lambda x, weight: x.mean(-1, keepdim=True),
        spread=lambda x, exact: x.abs().mean(-1, keepdim=True),
    ),
}


@pytest.fixture(params=ROW_OPERATIONS)
def row_operation(request):
    return ROW_OPERATIONS[request.param]


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request):
    return request.param


@pytest.fixture
def random():
    """random(*shape, dtype=...) with the same numbers in every run."""
    generators = {}

    def make(*shape, dtype=torch.float32, device="cpu"):
        generator = generators.setdefault(device, torch.Generator(device=device).manual_seed(len(generators)))
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    return make
