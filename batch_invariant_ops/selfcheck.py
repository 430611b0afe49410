"""The sample of the proof that every start repeats: each operation, on the real device, at several batch sizes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from batch_invariant_ops import tiles
from batch_invariant_ops.ops import linear, matmul, topk
from batch_invariant_ops.proof import same_bits

RowOperation = Callable[[torch.Tensor], torch.Tensor]
BATCH_SIZES = (1, 2, 3, 4, 7, 16, 33, 64, 257)
SAMPLED_BATCH_SIZES = BATCH_SIZES[:-1]
"""Of rows of logits, of which a batch has one a request."""
COLUMNS = 640
"""Of the weights of products, where no model's were proven."""


@dataclass(frozen=True)
class Shape:
    """What of a model decides the rows that its operations see.

    Attributes:
        hidden: length of a row between layers.
        vocabulary: length of a row of logits.
        dtype: of the weights.
    """

    hidden: int = 1536
    vocabulary: int = 1536
    dtype: torch.dtype = torch.bfloat16


class Check(NamedTuple):
    """An operation, the length of the rows to try it on, and in batches of which sizes."""

    run: RowOperation
    length: int
    sizes: tuple[int, ...] = BATCH_SIZES


@dataclass(frozen=True)
class Report:
    """What the self-check found: the operations that kept their bits, and those that did not."""

    device: str
    passed: tuple[str, ...]
    failed: tuple[str, ...]
    seconds: float

    @property
    def ok(self) -> bool:
        return not self.failed and bool(self.passed)

    def line(self) -> str:
        verdict = "passed" if self.ok else "FAILED: " + ", ".join(self.failed)
        return f"self-check on {self.device}: {len(self.passed)} operations, {self.seconds:.1f} s: {verdict}"


def keeps_bits(operation: RowOperation, x: torch.Tensor, batch_sizes: Iterable[int] = BATCH_SIZES) -> bool:
    """Whether each row of x gives the same bits in a batch of every size, at its first, middle and last place.

    Args:
        operation: maps [M, K] to [M, ...], row by row.
        x: [max M, K].
    """
    reference = operation(x)
    for size in batch_sizes:
        for start in {0, (len(x) - size) // 2, len(x) - size}:
            if not same_bits(operation(x[start : start + size]), reference[start : start + size]):
                return False
    return True


def operations(device: torch.device, shape: Shape) -> dict[str, Check]:
    """The operations that a served model runs, as they are reached in it."""
    generator = torch.Generator(device=device).manual_seed(1)
    hidden, dtype = shape.hidden, shape.dtype

    def random(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator, device=device).to(dtype)

    of_logits: dict[str, RowOperation] = {
        "log_softmax": lambda x: torch.log_softmax(x.float(), dim=-1),
        "softmax": lambda x: torch.softmax(x.float(), dim=-1),
        "topk": lambda x: topk.topk(x.float(), min(topk.ASKED, x.shape[-1]))[1],
    }
    of_hidden: dict[str, RowOperation] = {}
    if device.type == "cuda":
        weight = random(proven_columns(shape) or COLUMNS, hidden)
        of_hidden = of_a_gpu(weight, *random_biased(shape, random), scale=random(hidden))
        table = tiles.table_of(*tiles.card(device))
        if table is not None and table.gpu is None:
            # a measured table's tiles were compared when they were measured; a reasoned one's are compared here
            of_hidden["tiles"] = lambda x: matmul.gemm(_cancelling(x, -1), _cancelling(weight, 1).t())
    return {name: Check(run, hidden) for name, run in of_hidden.items()} | {
        name: Check(run, shape.vocabulary, SAMPLED_BATCH_SIZES) for name, run in of_logits.items()
    }


def proven_columns(shape: Shape, has_bias: bool = False) -> int:
    """Of the model's weights over such rows, with or without a bias, the fewest columns that were proven; 0 of none.

    A proof of another shape would take longer than all else here.
    """
    kind = shape.hidden, shape.dtype, has_bias, True
    return min((n for n, *of, _ in linear.windows() if tuple(of) == kind), default=0)


def random_biased(shape: Shape, random: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and its bias: of a shape that was proven, else laid out so that our kernel runs without a proof."""
    columns = proven_columns(shape, has_bias=True)
    if columns:
        return random(columns, shape.hidden), random(columns)
    return random(COLUMNS, shape.hidden), random(COLUMNS + 1)[1:]


def of_a_gpu(
    weight: torch.Tensor, biased: torch.Tensor, bias: torch.Tensor, scale: torch.Tensor
) -> dict[str, RowOperation]:
    """What replaces vLLM's and torch's own on a GPU, for rows as long as ``scale``."""
    ours = torch.ops.batch_invariant_ops
    return {
        "rms_norm": lambda x: ours.rms_norm(x, scale, 1e-6),
        "fused_add_rms_norm": lambda x: ours.fused_add_rms_norm(x, x, scale, 1e-6)[0],
        "linear": lambda x: linear.linear(x, weight),
        "linear with bias": lambda x: linear.linear(x, biased, bias),
        "mm": lambda x: torch.mm(x, weight.t()),
        "addmm": lambda x: torch.addmm(bias, x, biased.t()),
        "mean": lambda x: torch.mean(x, dim=-1),
    }


def holds(check: Check, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether an operation keeps the bits of random rows."""
    generator = torch.Generator(device=device).manual_seed(0)
    x = torch.randn(max(check.sizes), check.length, generator=generator, device=device).to(dtype)
    return keeps_bits(check.run, x, check.sizes)


def _cancelling(x: torch.Tensor, sign: int) -> torch.Tensor:
    """x with its first half once more, turned and signed, in the second's place: see :func:`proof.probe`."""
    half = x[:, : x.shape[1] // 2]
    return torch.cat([half, sign * half.flip(1)], dim=1)


def run(device: torch.device | str, shape: Shape = Shape()) -> Report:
    """Check every operation on the device; takes about a second."""
    device = torch.device(device)
    start = time.perf_counter()
    verdicts = {name: holds(check, device, shape.dtype) for name, check in operations(device, shape).items()}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    return Report(
        device=name,
        passed=tuple(name for name, holds in verdicts.items() if holds),
        failed=tuple(name for name, holds in verdicts.items() if not holds),
        seconds=time.perf_counter() - start,
    )
